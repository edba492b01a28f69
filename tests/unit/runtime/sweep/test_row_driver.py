"""Who ran a stage, as the result of a row tells it."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.contracts.row_result import RowResult
from cast_ray.plan.graph import Stage
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep import row_driver
from cast_ray.runtime.sweep.row_driver import RowDriver, run_row

FIRST = Stage("pretrain", "train", {"seed": 0}, {}, "a" * 20, steps=4)
SECOND = Stage("distill", "train", {"seed": 0}, {"init": "a" * 20}, "b" * 20, steps=4)


class Driver(RowDriver):
    """Trains nothing: commits its first stage, and fails in the second where it is told to."""

    def __init__(self, storage: Path, fails: bool, brokers: tuple[str, ...] = ("broker", "broker")):
        self.store, self.ran, self.fails = ArtifactStore(str(storage)), set(), fails
        self.brokers = list(brokers)
        self.row, self.left = SimpleNamespace(stages=(FIRST, SECOND)), {}  # type: ignore[assignment]
        self.sent: list[ArtifactStore] = []

    def _broker_id(self) -> str:
        return self.brokers.pop(0)

    def execute(self, stages: list[Stage], store: ArtifactStore) -> None:
        self.sent.append(pickle.loads(pickle.dumps(store)))
        for number, stage in enumerate(stages):
            if number and self.fails:
                raise RuntimeError("the loss is not finite")
            store.commit(stage, {})


def test_a_segment_that_fails_has_run_its_first_stages(tmp_path: Path) -> None:
    driver = Driver(tmp_path, fails=True)
    with pytest.raises(RuntimeError, match="not finite"):
        driver.run_segment([FIRST, SECOND])
    assert driver.ran == {FIRST.fingerprint}


def test_a_segment_is_sent_the_manifests_of_what_it_may_read(tmp_path: Path) -> None:
    driver = Driver(tmp_path, fails=False)
    driver.left = {FIRST.fingerprint: FIRST, SECOND.fingerprint: SECOND}
    driver.run_segment([FIRST])
    del driver.left[FIRST.fingerprint]
    driver.run_segment([SECOND])
    driver.store.delete_file(f"artifacts/{FIRST.key}/manifest.json")
    assert [store.has(FIRST.key) for store in driver.sent] == [False, True]  # without another look


def test_what_fails_because_the_broker_was_lost_is_asked_for_again(tmp_path: Path) -> None:
    driver = Driver(tmp_path, fails=True, brokers=("lost", "its successor"))
    driver.run_segment([FIRST, SECOND])
    assert driver.ran == {FIRST.fingerprint}


def test_what_another_sweep_has_committed_is_not_run_here(tmp_path: Path) -> None:
    Driver(tmp_path, fails=False).run_segment([FIRST])
    driver = Driver(tmp_path, fails=False)
    driver.run_segment([FIRST, SECOND])
    assert driver.ran == {SECOND.fingerprint}


def test_a_measured_latency_names_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    l4, written = ComputeNode(node="gpu_l4", gpu="NVIDIA L4"), []
    done = RowResult(table="t", row="r", seed=0, status="done", metrics={"student/mask_ap": 20.0})
    monkeypatch.setattr(row_driver, "assemble_result", lambda *_: done)
    monkeypatch.setattr(row_driver, "measure_metric", lambda job, name: (7.5, l4))
    monkeypatch.setattr(row_driver, "write_result", lambda context, row, result: written.append(result))
    job = SimpleNamespace(context=None, row=None, measure=("student/latency_ms",))
    driver: Any = SimpleNamespace(job=job, ran=set(), run=lambda: None, close=lambda status: None)
    result = run_row(driver)
    assert result.metrics == {"student/mask_ap": 20.0, "student/latency_ms": 7.5}
    assert result.measured_on == {"student/latency_ms": l4} and written == [result]
