"""The package's log: silent unless it is asked for, and what it says then."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cast_ray.common.logs import VARIABLE
from cast_ray.runtime.cluster import Cluster
from cast_ray.runtime.data import training_stream
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import Claims, Presence
from cast_ray.runtime.sweep.broker import Broker
from cast_ray.runtime.sweep.leases import Need

ROOT = Path(__file__).parents[3]
LOG = "import logging; logging.getLogger('cast_ray.runtime').info('a claim')"


@pytest.mark.parametrize(("arguments", "is_heard"), [([], False), (["--verbose"], True)])
def test_it_is_heard_with_verbose_only(arguments: list[str], is_heard: bool) -> None:
    code = f"from cast_ray.cli.main import main; main([*{arguments}, '--version']); {LOG}"
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and ("cast_ray.runtime: a claim" in done.stderr) == is_heard


def test_processes_that_inherit_the_variable_are_heard() -> None:
    code = f"from cast_ray.common.logs import configure_logging; configure_logging(); configure_logging(); {LOG}"
    for value, times in (("1", 1), ("0", 0), ("", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {VARIABLE: value}, capture_output=True, text=True
        )
        assert done.stderr.count("a claim") == times


def test_claims_and_grants_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ArtifactStore(str(tmp_path))
    caplog.set_level(logging.INFO, logger="cast_ray")
    with Presence(store, "one") as one, Presence(store, "two") as two:
        assert Claims(store, one.holder.id).take(["train-a"]) == (["train-a"], {})
        assert Claims(store, two.holder.id).take(["train-a"])[0] == []
        assert caplog.messages == ["claims taken: train-a", f"claimed by other sweeps: train-a by {one.holder.id}"]
    caplog.clear()
    broker = Broker.__ray_metadata__.modified_class(1, set())  # type: ignore[attr-defined]
    asyncio.run(broker.claim("row", [Need("f" * 20, "train", (), 1)]))
    assert caplog.messages == [f"segment granted to row: train-{'f' * 20}"]


def test_a_stream_that_is_given_up_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(training_stream, "GIVE_UP_S", 0.01)
    caplog.set_level(logging.INFO, logger="cast_ray")

    release = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        release.wait(20)

    stream = training_stream._ahead(lambda item: item, items())  # type: ignore[arg-type]
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    release.set()
    assert caplog.messages == ["a stream was given up: its next batch did not come within 0.01 s"]


def test_where_rays_logs_are() -> None:
    assert Cluster("Ray", {}).where_logs_are() == ""
    assert (
        "/tmp/ray/session/logs (worker-*.err)"
        in Cluster("Ray", {}, log_folder="/tmp/ray/session/logs").where_logs_are()
    )
