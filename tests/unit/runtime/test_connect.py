"""Joining and starting Ray: what is wrong with an address or a folder is one line, before Ray prints anything."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cast_ray.runtime import cluster
from cast_ray.runtime.cluster import ADDRESS_VARIABLE, MAX_SOCKET_PATH, SOCKET_PATH, TEMP_VARIABLE, connect

LONG = "/" + 99 * "x"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Calls of `ray.init`, which starts nothing; the environment is put back."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def init(address: str, **options: Any) -> SimpleNamespace:
        calls.append((address, options | {"temp": os.environ.get(TEMP_VARIABLE)}))
        return SimpleNamespace(dashboard_url="")

    before = dict(os.environ)
    for name in (ADDRESS_VARIABLE, TEMP_VARIABLE, "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [])
    yield calls
    for name in set(os.environ) - set(before):
        del os.environ[name]


def free_port() -> int:
    return cluster._free_port()


SETTINGS_FRAME = bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]) + bytes([0, 4, 0, 1, 0, 0])


@contextlib.contextmanager
def listening(answer: bytes = SETTINGS_FRAME) -> Iterator[int]:
    """Port of a server that gives every connection an answer."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            assert self.request.recv(24).startswith(b"PRI * HTTP/2.0")
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}"])
@pytest.mark.parametrize("argument", [None, "auto"])
def test_an_address_that_nobody_answers_names_the_variable(
    started: list, monkeypatch: pytest.MonkeyPatch, form: str, argument: str | None
) -> None:
    address = form.format(free_port())
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    with pytest.raises(ValueError) as error:
        connect(argument)
    text = str(error.value)
    assert text.startswith(f"RAY_ADDRESS {address}: no Ray answers there (") and "\n" not in text
    assert "Unset RAY_ADDRESS or pass --address local" in text
    assert started == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{port}", "no Ray answers there"),
        ("no.such.host.invalid:6379", "no Ray answers there"),
        ("127.0.0.1:99999", "no Ray answers there"),
        ("localhost", "expected HOST:PORT, ray://HOST:PORT, auto or local"),
        ("127.0.0.1:port", "expected HOST:PORT"),
    ],
)
def test_a_wrong_address_names_the_flag(started: list, address: str, message: str) -> None:
    address = address.format(port=free_port())
    with pytest.raises(ValueError, match=message) as error:
        connect(address)
    assert str(error.value).startswith(f"--address {address}: ") and "RAY_ADDRESS" not in str(error.value)
    assert started == []


def test_an_address_that_answers_is_joined(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        assert "cluster" in connect(f"127.0.0.1:{port}").description
        monkeypatch.setenv(ADDRESS_VARIABLE, f"127.0.0.1:{port}")
        connect(None)
    monkeypatch.setenv(ADDRESS_VARIABLE, "127.0.0.1:1")
    connect("local")  # the flag comes first
    monkeypatch.setenv(ADDRESS_VARIABLE, "local")
    connect(None)
    monkeypatch.delenv(ADDRESS_VARIABLE)
    connect(None)
    connect("auto")  # Ray looks for a cluster of this machine
    address = f"127.0.0.1:{port}"
    assert [address for address, _ in started] == [address, address, "local", "local", "local", "auto"]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b""])
def test_another_kind_of_server_is_not_waited_for(started: list, answer: bytes) -> None:
    with listening(answer) as port, pytest.raises(ValueError, match=r"no Ray answers there .another kind of server"):
        connect(f"127.0.0.1:{port}")
    assert started == []


def test_a_server_that_says_nothing_is_not_waited_for(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PROBE_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ValueError, match=r"no Ray answers.*timed out"),
    ):
        connect(f"127.0.0.1:{server.getsockname()[1]}")


def test_what_answers_may_be_no_ray_of_this_version(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 1.0\n")

    monkeypatch.setattr(ray, "init", fail)
    with listening() as port, pytest.raises(ValueError) as error:
        connect(f"127.0.0.1:{port}")
    assert str(error.value).startswith(f"--address 127.0.0.1:{port}: what answers there cannot be joined: Version mism")
    assert "\n" not in str(error.value)


def test_a_local_ray_that_does_not_start_is_one_line(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Exception("\nThe current node timed out during startup. This could happen because\nthe raylet failed")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ValueError) as error:
        connect("local")
    text = str(error.value)
    assert text.startswith("a local Ray did not start: The current node timed out during startup.") and "\n" not in text
    assert "load of this machine is" in text and "RAY_ADDRESS" in text and "RAY_TMPDIR" in text


def test_a_start_that_takes_long_says_so(
    started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A busy machine may need minutes, in which nothing else is printed."""
    start = ray.init

    def slow(*places: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return start(*places, **options)

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(cluster, "SLOW_S", 0.05)
    connect("local")
    assert capsys.readouterr().err.startswith("Ray is starting for 0 s: the load of this machine is ")
    # else Ray forgets workers that start slowly, and the driver waits for them for ever
    assert int(dict(os.environ)["RAY_worker_register_timeout_seconds"]) > 600


def test_a_long_folder_for_temporary_files_is_left_aside(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", LONG)
    connect("local")
    assert started[0][1]["temp"] == "/tmp"


@pytest.mark.parametrize(("excess", "temp"), [(0, None), (1, "/tmp")])
def test_only_a_folder_that_is_too_long(
    started: list, monkeypatch: pytest.MonkeyPatch, excess: int, temp: str | None
) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "x" * (MAX_SOCKET_PATH - len(SOCKET_PATH) - 1 + excess))
    connect("local")
    assert started[0][1]["temp"] == temp


def test_a_long_folder_that_the_user_chose_for_ray_is_refused(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEMP_VARIABLE, LONG)
    with pytest.raises(ValueError, match=r"^RAY_TMPDIR /xxx.*at most \d+ characters: set RAY_TMPDIR to a short one$"):
        connect("local")
    with listening() as port:
        connect(f"127.0.0.1:{port}")  # a cluster has its own
    monkeypatch.delenv(TEMP_VARIABLE)
    monkeypatch.setenv("TMPDIR", LONG)
    monkeypatch.setattr(cluster, "SHORT_TEMP_DIR", "/gone")
    with pytest.raises(ValueError, match=r"^TMPDIR /xxx.*set RAY_TMPDIR to a short one$"):
        connect("local")
