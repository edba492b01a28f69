"""Sweeps as a user starts them: a process of its own with a Ray of its own, of which nothing may be left."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WITH_RAY = ("tests/ray/", "tests/faults/", "tests/packaging/")
MARK = "CAST_RAY_TEST_SWEEP"
PATIENCE_S = 600
RAY_TEST_S = 1800
"""Time that a test with a Ray may take on a slow and busy machine."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a Ray come first and may take longer: the short ones then fill what is left of the processes."""
    items.sort(key=lambda item: not item.nodeid.startswith(WITH_RAY))
    for item in items:
        if item.nodeid.startswith(WITH_RAY) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(RAY_TEST_S))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all tests of a file, files in the order of `pytest_collection_modifyitems`.

    A Ray mostly waits for one of its processes to import its packages, so two beside each other are worth it even on
    two cores. `--dist loadfile` would start with the files of most tests, which are not those that take long.
    """
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def wait_until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Polls until `condition` holds. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + patience_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        pause.wait(0.05)


@dataclass
class SweepProcess:
    """A running `sweeps/ablate.py`; every process that it starts inherits a mark by which it is found."""

    mark: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def processes(self) -> set[int]:
        """Ids of all living processes of this sweep, Ray's included."""
        wanted = f"{MARK}={self.mark}".encode()
        found = set()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0") and _is_alive(folder):
                    found.add(int(folder.name))
            except OSError:  # gone, or not ours
                continue
        return found

    def finish(self) -> int:
        """Waits for the command and for all of its Ray; returns the exit code."""
        code = self.process.wait(PATIENCE_S)
        wait_until(lambda: not self.processes(), f"processes left behind: {self.processes()}", 120)
        return code

    def kill(self) -> None:
        """Kills the command alone, as the kernel or a user would, with SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def kill_process(self, pid: int) -> None:
        """Kills one process of this sweep, its Ray's or its own."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def clean_up(self) -> None:
        for pid in self.processes():
            self.kill_process(pid)
        self.process.wait(PATIENCE_S)


def _is_alive(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture(scope="session", name="wait_until")
def _wait_until() -> Callable[..., None]:
    """`wait_until(condition, what, patience_s)`."""
    return wait_until


@pytest.fixture(scope="session")
def read_events() -> Callable[[Path], dict[str, list[tuple[int, float]]]]:
    """`read_events(folder)`: tag -> (step, value) of TensorBoard's files in a folder."""
    from tensorboardX.proto import event_pb2

    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for path in sorted(folder.glob("events*")):
            data, at = path.read_bytes(), 0
            while at < len(data):  # records of length, checksum, event, checksum
                (length,) = struct.unpack_from("<Q", data, at)
                event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
                for value in event.summary.value:
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
                at += length + 16
        return found

    return read


@pytest.fixture(scope="session")
def coco128() -> Path:
    """Folder of COCO128's photographs with their instances.json, which are not part of this project."""
    if (named := os.environ.get("CAST_RAY_COCO128")) is None:
        pytest.skip("name the folder of COCO128's photographs and instances.json by CAST_RAY_COCO128")
    return Path(named)


StartSweep = Callable[..., SweepProcess]


@pytest.fixture(scope="module")
def start_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartSweep]:
    """`start(folder, *arguments)`: the losses table at smoke scale on a Ray of its own, all files below `folder`.

    `tables` in place of losses; `out`: folder of results below `folder`, where two sweeps share a storage; `script`:
    another command; `address`: of a cluster in place of a Ray of its own; `variables`: of the environment, Ray's
    included, which are otherwise kept from it.
    """
    started: list[SweepProcess] = []

    def start(
        folder: Path,
        *arguments: str,
        tables: tuple[str, ...] = ("losses",),
        out: str = "runs",
        script: str = "sweeps/ablate.py",
        address: str = "local",
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> SweepProcess:
        mark = uuid.uuid4().hex
        log = tmp_path_factory.mktemp("log") / "output.txt"
        command = [sys.executable, script, *tables, "--preset", "shapes", "--scale", "smoke"]
        command += ["--address", address, "--storage", str(folder / "storage"), "--out", str(folder / out)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=environment | {MARK: mark, "OMP_NUM_THREADS": "1"} | dict(variables),
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(SweepProcess(mark, process, log))
        return started[-1]

    yield start
    for sweep in started:
        sweep.clean_up()
