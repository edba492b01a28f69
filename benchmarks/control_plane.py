"""What running rows costs when their stages cost nothing: a sweep of 1,000 rows against Tune alone.

    python benchmarks/control_plane.py
    python benchmarks/control_plane.py --rows 100 --repeats 1
    python benchmarks/control_plane.py --only start    # first look at a store of 100,000 artifacts, without Ray

Every row has five stages that do nothing but commit an artifact: four shared with a quarter of the rows (4 distinct
upstream chains) and one of its own. The rival is Tune with as many trials that report once and end, as many at a time,
with actor reuse in both: what a sweep adds to it is planning, leases, claims in the store, artifacts and results. Both
run on the same Ray, in turn. Also printed: memory of the driver while the sweep runs, and the time to list stores of
1,000 to 4,000 artifacts and to plan again what is stored.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from measure import report
from ray import tune

from cast_ray.contracts.row_result import DatasetFacts, Hardware
from cast_ray.plan.graph import RowPlan, Stage, plan_sweep
from cast_ray.recipe import build_recipe
from cast_ray.runtime.cluster import connect
from cast_ray.runtime.data.splits import split_key
from cast_ray.runtime.store.artifacts import ArtifactStore, committed_fingerprints
from cast_ray.runtime.store.claims import Presence
from cast_ray.runtime.sweep.broker import MAX_CALLS, Broker
from cast_ray.runtime.sweep.row_driver import DRIVER_CPUS, Job, RowDriver, run_trials
from cast_ray.runtime.sweep.row_results import SweepContext

NUM_CHAINS, CHAIN_LENGTH = 4, 4
SLOTS = 2
MAX_DRIVERS = 2 * SLOTS + 2
SPLIT: dict[str, Any] = {}
"""Of no images: a result says how its images were chosen."""
DATA_HASH = "0"


class NoopDriver(RowDriver):
    """Walks its row as usual; its stages are done as soon as they are granted."""

    def execute(self, stages: list[Stage], store: ArtifactStore) -> None:
        for stage in stages:
            store.add(stage, "curves.json", b'{"curve": [], "diagnostics": []}')
            store.commit(stage, {"stage_seconds": 0.0, "num_workers": 1, "owner": self.name})
            ray.get(self.broker.finish.remote(stage.fingerprint))


def make_rows(num_rows: int, salt: str) -> list[RowPlan]:
    recipe = build_recipe("shapes", "smoke")
    rows = []
    for i in range(num_rows):
        stages: list[Stage] = []
        for j in range(CHAIN_LENGTH):
            parents = {"init": stages[-1].fingerprint} if stages else {}
            stages.append(Stage(f"chain-{j}", "train", {}, parents, f"{salt}c{i % NUM_CHAINS}s{j}", steps=1))
        last = Stage("distill", "train", {"split": SPLIT}, {"init": stages[-1].fingerprint}, f"{salt}r{i}", steps=1)
        rows.append(RowPlan(f"row {i}", 0, recipe, (*stages, last), {"distill": last}))
    return list(plan_sweep(rows, []).rows)


def context_of(store: ArtifactStore, name: str) -> SweepContext:
    chosen: dict[str, Any] = {"facts": {}, "labelled": [], "unlabelled": []}
    store.write_json(f"splits/{split_key(DATA_HASH, SPLIT)}.json", chosen)
    return SweepContext(
        name, "noop", "", "", Hardware(), store, "", DatasetFacts(content_hash=DATA_HASH), (), f"runs/{name}"
    )


def run_ours(folder: Path, num_rows: int, salt: str, memory: Memory) -> float:
    store = ArtifactStore(str(folder / salt))
    store.check_writable()
    began = time.perf_counter()
    rows = make_rows(num_rows, salt)
    with Presence(store, "control_plane.py") as presence, memory:
        presence.need(stage.fingerprint for row in rows for stage in row.stages)
        whole = plan_sweep(rows, committed_fingerprints(store.list_artifacts()))
        broker = Broker.options(max_concurrency=MAX_CALLS).remote(  # type: ignore[attr-defined]
            SLOTS, set(whole.stored), store.storage, presence.holder.id
        )
        context = context_of(store, salt)
        jobs = [Job(context, row) for row in whole.rows]
        outcomes = run_trials(salt, store, jobs, broker, MAX_DRIVERS, driver=NoopDriver)
    seconds = time.perf_counter() - began
    assert set(outcomes.values()) == {"done"} and len(outcomes) == num_rows
    assert len(committed_fingerprints(store.list_artifacts())) == NUM_CHAINS * CHAIN_LENGTH + num_rows
    ray.kill(broker)
    return seconds


def run_theirs(folder: Path, num_rows: int, salt: str) -> float:
    def report(config: dict[str, Any]) -> None:
        tune.report({"done_row": config["row"]})

    began = time.perf_counter()
    grid = tune.Tuner(
        tune.with_resources(report, {"CPU": DRIVER_CPUS}),
        param_space={"row": tune.grid_search([f"row {i}" for i in range(num_rows)])},
        tune_config=tune.TuneConfig(max_concurrent_trials=MAX_DRIVERS, reuse_actors=True),
        run_config=tune.RunConfig(name=salt, storage_path=str(folder / "tune"), verbose=0),
    ).fit()
    seconds = time.perf_counter() - began
    assert len(grid) == num_rows and not grid.num_errors
    return seconds


class Memory:
    """Resident memory of this process while a sweep runs (MB), every second."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.stopped = threading.Event()

    def __enter__(self) -> Memory:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()

    def _run(self) -> None:
        while not self.stopped.wait(1.0):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append(pages * 4096 / 1e6)


def time_listings(folder: Path) -> list[tuple[int, float]]:
    """(artifacts, median seconds of three listings) of growing stores."""
    store = ArtifactStore(str(folder / "listing"))
    found, made = [], 0
    for number in (1000, 2000, 4000):
        for i in range(made, number):
            store.commit(Stage("noop", "train", {}, {}, f"{i:020d}"), {})
        made = number
        times = []
        for _ in range(3):
            began = time.perf_counter()
            assert len(committed_fingerprints(store.list_artifacts())) == number
            times.append(time.perf_counter() - began)
        found.append((number, statistics.median(times)))
    return found


def time_starts(folder: Path) -> dict[int, float]:
    """Seconds in which a sweep of 60 stages looks at a store when it starts, by the number of artifacts there.

    Half of the stages are there. It is the median of five; the artifacts are copies of the files of one.
    """
    store = ArtifactStore(str(folder / "start"))
    planned = [Stage("noop", "train", {}, {}, f"{i:020d}") for i in range(60)]
    store.commit(planned[0], {})
    artifacts = folder / "start" / "artifacts"
    original, made, found = artifacts / planned[0].key, 1, {}
    for number in (1000, 100_000):
        for i in range(made, number):
            # Every second stage of the plan, and then fingerprints that no plan has.
            digits = 2 * i if i < len(planned) // 2 else 1_000_000 + i
            key = planned[0].key.replace(planned[0].fingerprint, f"{digits:020d}")
            shutil.copytree(original, artifacts / key)
        made = number
        times = []
        for _ in range(5):
            fresh = ArtifactStore(store.storage)
            began = time.perf_counter()
            fresh.exists()
            fresh.check_writable()
            assert len(fresh.find_manifests(stage.key for stage in planned)) == len(planned) // 2
            times.append(time.perf_counter() - began)
        found[number] = statistics.median(times)
        print(f"start at a store of {number} artifacts: {1000 * found[number]:.0f} ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("start",))
    arguments = parser.parse_args()
    if arguments.only == "start":
        with tempfile.TemporaryDirectory() as name:
            small, large = time_starts(Path(name)).values()
        report("start of a sweep, 100,000 artifacts against 1,000", large, small, "s")
        return
    connect("local")
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_theirs(folder, 2 * MAX_DRIVERS, "warm-up")  # worker processes are started once for both
        for i in range(arguments.repeats):
            memory = Memory()
            theirs.append(run_theirs(folder, arguments.rows, f"theirs{i}"))
            ours.append(run_ours(folder, arguments.rows, f"ours{i}", memory))
            print(f"{arguments.rows} rows: Tune alone {theirs[-1]:.1f} s, sweep {ours[-1]:.1f} s", flush=True)
            if len(memory.samples) >= 4:
                quarter = len(memory.samples) // 4
                first, last = memory.samples[quarter], memory.samples[-1]
                print(f"  driver: {first:.0f} MB after a quarter of the time, {last:.0f} MB at the end", flush=True)
        for number, seconds in time_listings(folder):
            print(f"listing {number} artifacts: {1000 * seconds:.0f} ms, {1e6 * seconds / number:.0f} us each")
    ray.shutdown()
    mine, rival = statistics.median(ours), statistics.median(theirs)
    print(
        json.dumps(
            {
                "name": "control_plane",
                "ours": round(mine, 1),
                "theirs": round(rival, 1),
                "ratio": round(rival / mine, 3),
                "unit": "s",
            }
        )
    )


if __name__ == "__main__":
    main()
