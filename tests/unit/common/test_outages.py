"""Requests to a store that does not answer for a while."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from s3_server import S3Server

from cast_ray.cli.options import EXIT_FAILED, exit_code
from cast_ray.common import outages
from cast_ray.common.outages import PATIENCE_S, is_outage, patiently, without_patience
from cast_ray.common.paths import write_bytes
from cast_ray.data.reading.images import read_image
from cast_ray.runtime import metrics
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import DEAD_AFTER_S, Presence, Watch

BUSY = OSError("When listing objects: AWS Error SLOW_DOWN during ListObjectsV2 operation: Please reduce")


class Clock:
    """Stands for the module `time`: pauses take no time."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outages, "time", clock)
    return clock


def failing(*errors: BaseException) -> Any:
    """A request that meets these errors, one a call, and then succeeds."""
    left = list(errors)

    def request() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    return request


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.", True),
        ("AWS Error UNKNOWN (HTTP status 429) during PutObject operation", True),
        ("google::cloud::Status(UNAVAILABLE: no connection)", True),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body.", False),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation", False),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation", False),
    ],
)
def test_what_an_outage_is(text: str, expected: bool) -> None:
    assert is_outage(OSError(text)) is expected
    assert not is_outage(OSError(errno.ETIMEDOUT, text))  # of a file on a network disk


def test_pauses_grow_until_the_store_answers(clock: Clock) -> None:
    counted: list[None] = []
    assert patiently(failing(*[BUSY] * 7), lambda: counted.append(None)) == "answer"
    assert len(clock.pauses) == len(counted) == 7 and 0.5 <= clock.pauses[0] <= 1.0
    assert clock.pauses[3] >= 4.0 and max(clock.pauses) <= outages.LONGEST_PAUSE_S


def test_it_is_given_up_after_minutes(clock: Clock) -> None:
    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently(failing(*[BUSY] * 1000))
    assert PATIENCE_S <= clock.now < PATIENCE_S + outages.LONGEST_PAUSE_S


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("x"), OSError("ACCESS_DENIED"), ValueError()]
)
def test_other_errors_are_raised_at_once(clock: Clock, error: BaseException) -> None:
    with pytest.raises(type(error)):
        patiently(failing(error))
    assert clock.pauses == []


def test_a_wrong_address_is_told_at_once(clock: Clock) -> None:
    with without_patience(), pytest.raises(OSError, match="SLOW_DOWN"):
        patiently(failing(BUSY))
    assert clock.pauses == [] and patiently(failing(BUSY)) == "answer"


def test_a_store_bridges_an_overload_and_counts_its_errors(clock: Clock, tmp_path: Path) -> None:
    """pyarrow gives up after 31 requests in 6 seconds."""
    with S3Server() as server:
        store = ArtifactStore(server.uri("store"))
        before = metrics._store_errors["write_bytes"]
        server.refuse(35)
        store.write_bytes("claims/stages/x", b"1")
        assert metrics._store_errors["write_bytes"] == before + 1 and len(clock.pauses) == 1
        assert ArtifactStore(store.storage).find_bytes("claims/stages/x") == b"1"

        Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(tmp_path / "a.png")
        write_bytes(store.uri("a.png"), (tmp_path / "a.png").read_bytes())
        server.refuse(35)
        assert read_image(store.uri("a.png"), (4, 5)).max() == 7  # it does not count as one that cannot be read
        assert len(clock.pauses) == 2

        server.refuse(35)
        with pytest.raises(ValueError, match="cannot be written"):
            store.check_writable()
        assert len(clock.pauses) == 2
    # The metric is a counter of requests, and one for a file that is not there is no error of the store.
    assert metrics._store_errors["find_bytes"] == 0


def test_a_command_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(failing(BUSY)) == EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: an object store does not answer, run the same command again later: When listing")
    with pytest.raises(OSError, match="disk"):
        exit_code(failing(OSError("disk")))


def test_a_holder_is_not_thought_dead_because_nobody_could_reach_the_store(tmp_path: Path) -> None:
    store, now = ArtifactStore(str(tmp_path)), [0.0]
    with Presence(store, "sweep") as presence:
        watch = Watch(store, lambda: now[0])
        assert watch.is_alive(presence.holder.id)
        find_bytes = store.find_bytes

        def slowly(path: str) -> bytes | None:
            now[0] += DEAD_AFTER_S + 1  # the request was sent again and again
            return find_bytes(path)

        store.find_bytes = slowly  # type: ignore[method-assign]
        assert watch.is_alive(presence.holder.id)
        store.find_bytes = find_bytes  # type: ignore[method-assign]
        now[0] += DEAD_AFTER_S + 1  # now it had the time to show itself, and has not
        assert not watch.is_alive(presence.holder.id)
