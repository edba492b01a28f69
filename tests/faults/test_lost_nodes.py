"""Nodes of a cluster are lost in the middle of a sweep, one after the other; its table equals the undisturbed one.

Nodes are raylets on this machine with logical resources: each training node holds one worker with its stream, or the
validation, or a labelling job, so that each kind can be lost alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cast_ray.runtime.placement import ON_DEMAND

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STORE_BYTES = 300 * 2**20
NUM_IMAGES, STEPS, EVERY = 324, 240, 20
SETTINGS = [
    "stages.pretrain.steps=2",
    "stages.adapt.steps=2",
    "stages.selftrain.steps=2",
    f"stages.distill.steps={STEPS}",
    f"stages.distill.checkpoint_every_steps={EVERY}",
    "stages.refine.steps=0",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("pretrain", "adapt", "selftrain")),
    *(f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")),
    "evaluation.every_steps=50",
    "runtime.num_labellers=1",
    "runtime.stream_memory_mb=64",
    "data.shapes.num_source=8",
    f"data.shapes.num_train={NUM_IMAGES}",
    "data.shapes.num_val=4",
    f"data.label_fraction={4 / NUM_IMAGES}",
    "teacher.num_layers=1",
    "student.num_layers=1",
    "pseudo.score_threshold=0.0",
]
ARGUMENTS = ["--rows", "sup+semi", *(part for setting in SETTINGS for part in ("--set", setting))]
RESULT = "runs/losses-shapes-smoke/losses__sup+semi__s0/result.json"
DRAIN_S = 120


@dataclass
class Nodes:
    """The cluster, and which of its nodes runs what."""

    cluster: Cluster

    def add(self) -> None:
        """Adds a node that holds one bundle of a train stage, or a labelling job."""
        self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def add_on_demand(self, num_cpus: int) -> None:
        self.cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES, resources={ON_DEMAND: 1})

    def find(self, name: str) -> Any:
        """The node with a process that Ray has given this name; None: there is none."""
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in self.cluster.list_all_nodes()}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent in raylets:
                        return raylets[parent]
            except OSError:  # it has just ended
                continue
        return None


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "120000")  # a raylet ends itself when its agents are slow
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    found = Nodes(cluster)
    for _ in range(2):
        found.add_on_demand(1)
    for _ in range(3):
        found.add()
    ray.init(cluster.address, log_to_driver=False, namespace="cast_ray")
    yield found
    ray.shutdown()
    cluster.shutdown()


def table(folder: Path) -> dict[str, Any]:
    """What a report shows of the row."""
    result = json.loads((folder / RESULT).read_text())
    assert result["status"] == "done", result["error"]
    return result["metrics"]


def test_every_kind_of_node_may_be_lost(
    nodes: Nodes, tmp_path: Path, start_sweep: Any, wait_until: Callable[..., None]
) -> None:
    sweep = start_sweep(
        tmp_path / "lost",
        *ARGUMENTS,
        address=nodes.cluster.address,
        variables={"RAY_AUTH_MODE": "disabled"},
    )
    seen: list[tuple[str, float, str]] = []

    def wait(condition: Callable[[], Any], what: str) -> None:
        def is_met() -> bool:
            assert sweep.process.poll() is None, sweep.output
            return bool(condition())

        wait_until(is_met, f"{what}\n{sweep.output}", 600)

    def said(words: str) -> int:
        return len(re.findall(words, sweep.output))

    def step() -> int:
        notes = [json.loads(path.read_text()) for path in (tmp_path / "lost/storage/checkpoints").glob("*.json")]
        return max((note["step"] for note in notes), default=0)

    def lose(
        fault: str, process: str, words: str, lose_node: Callable[[Any], None], replace: Callable[[], None]
    ) -> None:
        """Loses the node of a process, and waits until what it did goes on."""
        wait(lambda: nodes.find(process), f"no {process}")
        resumed, before = said("resumes after"), said(words)
        lose_node(nodes.find(process))
        began = time.monotonic()
        replace()
        wait(lambda: said(words) > before, f"{fault}: nothing was said")
        wait(lambda: said("resumes after") > resumed, f"{fault}: nothing resumed")
        lost = re.findall(r"; (\d+) that were done are lost|; (nothing) is lost", sweep.output)[-1]
        seen.append((fault, time.monotonic() - began, lost[0] or lost[1]))

    def kill(node: Any) -> None:
        nodes.cluster.remove_node(node, allow_graceful=False)

    def drain(node: Any) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.cluster.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*command, "--deadline-remaining-seconds", str(DRAIN_S)], check=True, timeout=120)

    wait(lambda: list((tmp_path / "lost/storage/labels").glob("*/*.parquet")), "no block of labels")
    kill(nodes.find("MapWorker"))
    labelled = time.monotonic()
    nodes.add()
    wait(lambda: step() >= EVERY, "no checkpoint")
    print(f"labeller's node lost: {time.monotonic() - labelled:.0f} s until the training after it had a checkpoint")
    for process in ("Broker", "ImplicitFunc"):
        assert ON_DEMAND in nodes.find(process)._ray_params.resources, process
    train = nodes.add
    lose("worker's node", "RayTrainWorker", "a node that it runs on was lost", kill, train)
    wait(lambda: step() >= 3 * EVERY, "no further checkpoint")
    lose("worker's node drained", "RayTrainWorker", "is being drained", drain, train)
    wait(lambda: step() >= 5 * EVERY, "no further checkpoint")
    lose("validator's node", "Validator", "a node that it runs on was lost", kill, train)
    wait(lambda: step() >= 7 * EVERY, "no further checkpoint")
    lose("driver's node", "ImplicitFunc", "its driver process was lost", kill, lambda: nodes.add_on_demand(1))
    wait(lambda: step() >= 9 * EVERY, "no further checkpoint")
    lose("broker's node", "Broker", "the sweep's broker was lost", kill, lambda: nodes.add_on_demand(1))
    assert sweep.finish() == 0, sweep.output

    assert "Traceback" not in sweep.output and "RayActorError" not in sweep.output, sweep.output
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert groups == [] and ray.util.list_named_actors(all_namespaces=True) == []
    undisturbed = start_sweep(tmp_path / "whole", *ARGUMENTS)
    assert undisturbed.finish() == 0, undisturbed.output
    is_same = table(tmp_path / "lost") == table(tmp_path / "whole")
    print(sweep.output)
    for fault, seconds, lost in seen:
        print(f"{fault} | {seconds:.0f} s | steps lost: {lost} | same table: {is_same}")
    assert is_same
