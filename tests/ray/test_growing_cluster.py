"""A cluster that begins with no node for training, and an autoscaler that starts them because stages wait for room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from growing_cluster import in_growing_cluster, why_not_isolated

ROOT = Path(__file__).parents[2]
WHY_NOT = why_not_isolated()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(WHY_NOT), reason=f"this system gives no PID namespace: {WHY_NOT}"),
]
DRIVERS = {"resources": {"CPU": 1}, "min_workers": 1, "max_workers": 1}
SETTINGS = {
    "runtime.cpus_per_worker": 1.5,  # more than the drivers' node has
    "runtime.stream_memory_mb": 32,
    **{f"stages.{stage}.steps": 2 for stage in ("pretrain", "adapt", "distill", "refine")},
    "data.shapes.num_source": 8,
    "data.shapes.num_train": 16,
    "data.shapes.num_val": 4,
    "student.num_layers": 1,
    "teacher.num_layers": 1,
}

# Logical GPUs: a placement group finds them, torch would not. So this is the part of a sweep up to its workers' start.
SCENE = """
import ray
from cast_ray.recipe import build_recipe
from cast_ray.runtime.cluster import connect
from cast_ray.runtime.placement import nodes_of, reserve
from cast_ray.runtime.sweep.slots import slots_of

class Complained(Exception):
    pass

said = []
def say(what, why):
    print(what, "|", why, flush=True)
    said.append((what, why))
    if why.startswith("the autoscaler says"):
        raise Complained
    assert len(said) < 30

cluster = connect(None)
recipe = build_recipe("shapes", overrides={"runtime.use_gpu": "true", "runtime.stream_memory_mb": "32"})
assert not any(node.get("GPU") for node in cluster.nodes)
assert slots_of([recipe], cluster, 0.01, 7) == 7, "refused, or bounded by what is up"
with reserve([{"CPU": 1.0, "GPU": 1.0}], say=say) as group:
    assert [n["Resources"]["GPU"] for n in ray.nodes() if n["NodeID"] in nodes_of(group)] == [1.0]
try:
    with reserve([{"GPU": 8.0}], say=say):
        raise AssertionError("placed")
except Complained:
    assert "GPU" in said[-1][1] and "8" in said[-1][1]
print("as wanted")
"""


def run(folder: Path, node_types: dict[str, dict], command: list[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "output.txt").open("w") as file:
        done = subprocess.run(
            in_growing_cluster(node_types, command), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    output = (folder / "output.txt").read_text()
    assert done.returncode == 0, output
    return output


def test_gpu_nodes_are_started_for_what_waits_and_the_impossible_is_said(tmp_path: Path) -> None:
    gpu = {"resources": {"CPU": 2, "GPU": 1}, "min_workers": 0, "max_workers": 1}
    assert "as wanted" in run(tmp_path, {"drivers": DRIVERS, "gpu": gpu}, [sys.executable, "-c", SCENE])


def test_a_sweep_starts_its_own_nodes(tmp_path: Path) -> None:
    """A job that starts before even the drivers' node is up; two rows at a time, each on a node of its own."""
    (tmp_path / "two.yaml").write_text(
        json.dumps(
            {
                "title": "two rows without a stage in common but the teacher's",
                "metric": "final/mask_ap",
                "baseline": "a",
                "rows": {"a": {"stages.distill.lr": 1e-4}, "b": {"stages.distill.lr": 2e-4}},
            }
        )
    )
    command = [sys.executable, "sweeps/ablate.py", str(tmp_path / "two.yaml"), "--preset", "shapes", "--scale", "smoke"]
    command += ["--storage", str(tmp_path / "storage"), "--out", str(tmp_path / "runs")]
    command += [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    worker = {"resources": {"CPU": 2}, "min_workers": 0, "max_workers": 2}
    output = run(tmp_path, {"drivers": DRIVERS, "worker": worker}, command)
    assert "waits for {CPU 1.9} since" in output
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/*/result.json")]
    assert [result["status"] for result in found] == ["done", "done"], output
