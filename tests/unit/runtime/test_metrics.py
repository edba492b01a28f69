"""The metrics of a sweep without Ray: what is shown, what counts up, how many series there can be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.runtime import metrics as module
from cast_ray.runtime.metrics import (
    BUDGET,
    CHECKPOINT_TIME,
    CLAIMS,
    DATA_WAIT,
    IMAGES_RATE,
    LABELLED,
    LOSS,
    MAX_ROWS,
    PROGRESS,
    PROGRESS_TIME,
    PSEUDO_LABELS,
    RESTARTS,
    ROWS,
    SAVED,
    SPENT,
    STAGES,
    STEPS_RATE,
    STORE_ERRORS,
    VALIDATION_AP,
    WAITING,
    Metric,
    Outlet,
    Sample,
    SweepMetrics,
    SweepState,
)
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep import broker as broker_module
from cast_ray.runtime.sweep.broker import Broker
from cast_ray.runtime.sweep.leases import Need

ROW = "losses__sup+semi__s0"
OF_ROW = ("losses__sup+semi", "0")
TRAIN, CHILD = Need("aaa", "train", (), 40), Need("bbb", "train", ("aaa",), 20)
POST = {"stage": "distill", "fingerprint": "aaa", "step": 10, "steps": 40, "unit": "step"}


class Recorded:
    """Stands for Ray's gauges and counters, and notes what they are told."""

    def __init__(self) -> None:
        self.values: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self.calls = 0

    def make(self, metric: Metric) -> Any:
        recorded = self

        class Kind:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert metric.kind == "gauge" and tuple(tags) == metric.tags
                recorded.note(metric, tags, value)

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert metric.kind == "counter" and tuple(tags) == metric.tags and value > 0
                recorded.note(metric, tags, recorded.values.get((metric, tuple(tags.values())), 0.0) + value)

        return Kind()

    def note(self, metric: Metric, tags: dict[str, str], value: float) -> None:
        assert all(isinstance(tag, str) for tag in tags.values())
        self.values[metric, tuple(tags.values())] = value
        self.calls += 1

    def of(self, metric: Metric) -> dict[tuple[str, ...], float]:
        return {tags: value for (m, tags), value in self.values.items() if m is metric}


def state(posts: dict[str, dict[str, Any]] | None = None, nodes: dict[str, str] | None = None) -> SweepState:
    return SweepState({"waiting": 1}, {"running": 1}, posts or {}, nodes or {}, 2, 0.0, 90.0, None)


def of(samples: Iterable[Sample], metric: Metric) -> dict[tuple[str, ...], float]:
    return {s.tags: s.value for s in samples if s.metric is metric}


def test_a_running_stage_is_shown_with_sweep_row_seed_stage_and_node() -> None:
    facts = {"loss": 1.5, "images_per_s": 80.0, "steps_per_s": 4.0, "data_wait": 0.25, "checkpoint_time": 7.0}
    samples = list(SweepMetrics("run").samples(state({ROW: POST | facts}, {ROW: "gpu_a10g"})))
    tags = ("run", *OF_ROW, "distill", "gpu_a10g")
    expected = {PROGRESS: 0.25, LOSS: 1.5, IMAGES_RATE: 80.0, STEPS_RATE: 4.0, DATA_WAIT: 0.25, CHECKPOINT_TIME: 7.0}
    assert {metric: of(samples, metric) for metric in expected} == {m: {tags: v} for m, v in expected.items()}
    assert of(samples, SPENT) == {("run",): 90.0} and of(samples, CLAIMS) == {("run",): 2}
    assert of(samples, BUDGET) == {}  # there is none


def test_what_a_stage_does_not_tell_is_not_shown_as_zero() -> None:
    samples = list(SweepMetrics("run").samples(state({ROW: POST})))
    assert of(samples, PROGRESS) and not any(of(samples, metric) for metric in (LOSS, IMAGES_RATE, CHECKPOINT_TIME))


def test_counters_only_count_up_and_by_what_has_come() -> None:
    recorded = Recorded()
    outlet = Outlet(recorded.make)
    for total in (0.0, 5.0, 5.0, 7.0):
        outlet.show([Sample(RESTARTS, total, ("run",)), Sample(STAGES, total, ("run", "done"))])
    assert recorded.of(RESTARTS) == {("run",): 7.0} and recorded.of(STAGES) == {("run", "done"): 7.0}
    assert recorded.calls == 2 + 4


def test_rows_beyond_the_limit_have_no_series_of_their_own() -> None:
    metrics = SweepMetrics("run")
    owners = [f"t__row{i}__s0" for i in range(MAX_ROWS + 50)]
    for owner in owners:
        metrics.labelled(owner, "label", 3, 2)
    samples = list(metrics.samples(state({owner: POST for owner in owners})))
    assert len(of(samples, PROGRESS)) == MAX_ROWS
    labelled = of(samples, LABELLED)
    assert len(labelled) == MAX_ROWS + 1 and sum(labelled.values()) == 3 * len(owners)
    assert labelled["run", "others", "", "label"] == 3 * 50
    assert sum(of(samples, PSEUDO_LABELS).values()) == 2 * len(owners)


def test_shared_stages_are_saved_once_for_each_row_that_did_not_run_them() -> None:
    metrics = SweepMetrics("run")
    metrics.device_s["stored"] = 40.0
    metrics.finished("a", "new", 100.0)
    metrics.took_over("a", ["stored", "new"])  # it ran the second itself
    for _ in range(2):  # a driver that asks again is told again
        metrics.took_over("b", ["stored", "new"])
    metrics.took_over("c", ["of another sweep"])
    assert of(metrics.samples(state()), SAVED) == {("run",): 40.0 + 140.0}


make_broker: Any = Broker.__ray_metadata__.modified_class  # type: ignore[attr-defined]


def test_the_broker_shows_what_its_sweep_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", -1.0)
    recorded = Recorded()

    async def scene() -> None:
        broker = make_broker(1, set(), budget_hours=2.0, sweep="run")
        broker.outlet = Outlet(recorded.make)
        await broker.expect(5, {})
        await broker.claim(ROW, [TRAIN, CHILD])
        await broker.wait_for_room(ROW, "{CPU 1}")
        await broker.heartbeat(ROW)
        assert recorded.of(ROWS)["run", "waiting for room"] == 1 and recorded.of(WAITING)["run",] > 0
        assert recorded.of(STAGES) == {
            ("run", "waiting"): 5,
            ("run", "running"): 0,
            ("run", "done"): 0,
            ("run", "failed"): 0,
        }
        await broker.occupy(ROW)
        await broker.computes_on(ROW, "worker 0", ComputeNode(node="gpu_l4"))
        for _ in range(3):  # the workers were lost twice
            await broker.handed_over(ROW)
        before = broker.metrics.progressed
        await broker.post(ROW, POST)
        assert broker.metrics.progressed > before
        moved = broker.metrics.progressed
        await broker.post(ROW, POST | {"loss": 2.0})  # the same step: no progress
        assert broker.metrics.progressed == moved and recorded.of(PROGRESS_TIME) == {("run",): moved}
        assert recorded.of(LOSS) == {("run", *OF_ROW, "distill", "gpu_l4"): 2.0}
        await broker.advance(ROW, 4, 9)
        await broker.validated(ROW, "distill", 12.5)
        await broker.finish("aaa", 30.0)
        await broker.fail(ROW, "bbb", "no memory")
        await broker.heartbeat(ROW)

    asyncio.run(asyncio.wait_for(scene(), 60))
    stages = {tags[1]: value for tags, value in recorded.of(STAGES).items()}
    assert stages == {"waiting": 2, "running": 1, "done": 1, "failed": 1}
    assert recorded.of(ROWS)["run", "running"] == 1 and recorded.of(RESTARTS) == {("run",): 2}
    assert recorded.of(VALIDATION_AP) == {("run", *OF_ROW, "distill"): 12.5}
    assert recorded.of(PSEUDO_LABELS) == {("run", *OF_ROW, "distill"): 9}
    assert recorded.of(BUDGET) == {("run",): 7200.0} and recorded.of(SPENT)["run",] > 0


def test_gauges_are_refreshed_at_intervals_and_not_with_every_post() -> None:
    recorded = Recorded()

    async def scene() -> None:
        broker = make_broker(1, set(), sweep="run")
        broker.outlet = Outlet(recorded.make)
        for step in range(50):
            await broker.post(ROW, POST | {"step": step})

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert len(recorded.of(PROGRESS)) == 1 and recorded.of(PROGRESS).popitem()[1] == 0.0


def test_a_failed_request_to_the_store_is_counted_and_a_missing_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded()
    monkeypatch.setattr(module, "_of_process", Outlet(recorded.make))
    monkeypatch.setattr(module, "_store_errors", module.Counter())
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    store = ArtifactStore(str(tmp_path))
    assert store.find_bytes("none") is None and store.list_names("none") == []
    with pytest.raises(FileNotFoundError):
        store.manifest("train-none")
    assert recorded.values == {}
    (tmp_path / "folder").mkdir()
    for _ in range(2):
        with pytest.raises(OSError):
            store.find_bytes("folder")  # a folder cannot be read as a file
    with pytest.raises(OSError):
        store.write_bytes("folder", b"")
    assert recorded.of(STORE_ERRORS) == {("find_bytes",): 2, ("write_bytes",): 1}


def test_gauges_are_refreshed_more_often_than_ray_reports_them() -> None:
    ray_reports_every_s = 10
    assert max(broker_module.HEARTBEAT_S, module.REFRESH_S) < ray_reports_every_s  # or a gauge has gaps
