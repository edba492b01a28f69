"""Processes of a running sweep are killed: a worker, a row's driver, the broker. The command itself continues."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 160
SETTINGS = [
    "stages.pretrain.steps=3",
    "stages.adapt.steps=2",
    f"stages.distill.steps={STEPS}",
    "stages.distill.checkpoint_every_steps=10",
    "stages.refine.steps=2",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("pretrain", "adapt", "refine")),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=6",
    "teacher.num_layers=1",
]
LOSSES = ("one of its workers was lost", "its driver process was lost", "the sweep's broker was lost")
ARGUMENTS = ["--rows", "sup", *(part for setting in SETTINGS for part in ("--set", setting))]


def found(sweep: Any, name: str) -> list[int]:
    """Processes of the sweep that Ray has given this name."""
    pids = []
    for pid in sweep.processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(f"ray::{name}".encode()):
            pids.append(pid)
    return pids


def noted(folder: Path) -> int:
    """Step of the newest checkpoint of the stage at work; 0 while there is none."""
    notes = [json.loads(path.read_text()) for path in (folder / "storage/checkpoints").glob("*.json")]
    return max((note["step"] for note in notes), default=0)


def test_lost_workers_drivers_and_brokers_are_replaced(
    tmp_path: Path, start_sweep: Any, wait_until: Callable[..., None]
) -> None:
    sweep = start_sweep(tmp_path, *ARGUMENTS)

    def kill(name: str, after_step: int, words: str) -> None:
        def is_ready() -> bool:
            assert sweep.process.poll() is None, sweep.output
            return noted(tmp_path) >= after_step and bool(found(sweep, name))

        wait_until(is_ready, f"no {name} after step {after_step}")
        for pid in found(sweep, name):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: words in sweep.output or sweep.process.poll() is not None, f"not said: {words}")

    processes = ("RayTrainWorker", "ImplicitFunc", "Broker")
    for process, words in zip(processes, LOSSES):
        kill(process, noted(tmp_path) + 10, words)
    assert sweep.finish() == 0, sweep.output
    result = json.loads((tmp_path / "runs/losses-shapes-smoke/losses__sup__s0/result.json").read_text())
    assert result["status"] == "done"
    distill = next(s for s in result["stages"] if s["name"] == "distill")
    assert distill["resumed_at_step"] >= 30  # in the third worker group, from what the second one had saved
    said = [line for line in sweep.output.splitlines() if "lost" in line]
    assert [sum(words in line for line in said) for words in LOSSES] == [1, 1, 1], sweep.output
    resumed = [int(step) for step in re.findall(r"distill resumes after (\d+) of 160 steps", sweep.output)]
    assert len(resumed) == 3 and resumed == sorted(resumed) and resumed[-1] == distill["resumed_at_step"]
    assert "Traceback" not in sweep.output
    assert list((tmp_path / "storage/train").iterdir()) == list((tmp_path / "storage/checkpoints").iterdir()) == []
