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
NAMESPACE = "cast_ray"
VARIABLES = {"RAY_AUTH_MODE": "disabled"}
NODE_LOST = "a node that it runs on was lost|runs its worker group was lost"
"""The process that runs a worker group may live on the same node, and is then what is missed first."""
NUM_IMAGES, STEPS, EVERY = 324, 1600, 50
TRAINED, LABELLED = "sup", "sup+semi"
SETTINGS = [
    "stages.pretrain.steps=2",
    "stages.adapt.steps=2",
    "stages.selftrain.steps=2",
    f"stages.distill.checkpoint_every_steps={EVERY}",
    "stages.refine.steps=0",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("pretrain", "adapt", "selftrain")),
    *(f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")),
    "evaluation.every_steps=100",
    "runtime.num_labellers=1",
    "runtime.cpus_per_worker=1",  # with its stream more than an on-demand node has here, and half of what others have
    "runtime.cpus_per_labeller=1",
    "runtime.stream_memory_mb=64",
    "data.shapes.num_source=8",
    f"data.shapes.num_train={NUM_IMAGES}",
    "data.shapes.num_val=4",
    f"data.label_fraction={4 / NUM_IMAGES}",
    "teacher.num_layers=1",
    "student.num_layers=1",
    "pseudo.score_threshold=0.0",
]
DRAIN_S = 120


def arguments(row: str, steps: int) -> list[str]:
    settings = [*SETTINGS, f"stages.distill.steps={steps}"]
    return ["--rows", row, *(part for setting in settings for part in ("--set", setting))]


@dataclass
class Nodes:
    """The cluster, and which of its nodes runs what."""

    cluster: Cluster

    def add(self) -> None:
        """Adds a node that holds one bundle of a train stage, or a labelling job."""
        self.cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)

    def add_on_demand(self) -> None:
        """Adds a node for rows' drivers and the broker, too small for anything else."""
        self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, resources={ON_DEMAND: 1})

    def drain(self, node: Any) -> None:
        """Gives the notice that a spot node gives before it is taken back."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.cluster.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*command, "--deadline-remaining-seconds", str(DRAIN_S)], check=True, timeout=120)

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
        found.add_on_demand()
    for _ in range(3):
        found.add()
    ray.init(cluster.address, log_to_driver=False, namespace=NAMESPACE)
    yield found
    ray.shutdown()
    cluster.shutdown()


def table(folder: Path, row: str) -> dict[str, Any]:
    """What a report shows of a row."""
    result = json.loads((folder / f"runs/losses-shapes-smoke/losses__{row}__s0/result.json").read_text())
    assert result["status"] == "done", result["error"]
    return result["metrics"]


@dataclass
class Sweep:
    """A sweep on the cluster, and what is seen of it after each fault."""

    process: Any
    folder: Path
    nodes: Nodes
    wait_until: Callable[..., None]

    def __post_init__(self) -> None:
        self.seen: list[str] = []

    @property
    def output(self) -> str:
        return self.process.output

    def said(self, words: str) -> int:
        return len(re.findall(words, self.output))

    def step(self) -> int:
        """Step of the newest checkpoint."""
        notes = [json.loads(path.read_text()) for path in (self.folder / "storage/checkpoints").glob("*.json")]
        return max((note["step"] for note in notes), default=0)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        def is_met() -> bool:
            assert self.process.process.poll() is None, self.output
            return bool(condition())

        try:
            self.wait_until(is_met, what, 600)
        except TimeoutError:
            raise AssertionError(f"{what}\n{self.output}") from None

    def lose(self, process: str, words: str, replace: Callable[[], None], drain: bool = False) -> None:
        """Loses the node of a process in the middle of a stage, and waits until the stage resumes."""
        before = self.step()
        self.wait(lambda: self.step() > before and self.nodes.find(process), f"no {process} after step {before}")
        node, said, resumed = self.nodes.find(process), self.said(words), self.said("resumes after")
        began = time.monotonic()
        if drain:
            self.nodes.drain(node)
        else:
            self.nodes.cluster.remove_node(node, allow_graceful=False)
        replace()
        self.wait(lambda: self.said(words) > said, f"not said: {words}")
        self.wait(lambda: self.said("resumes after") > resumed, f"nothing resumed after the loss of {process}")
        line = next(line for line in reversed(self.output.splitlines()) if "resumes after" in line)
        lost = re.search(r"; (\d+|nothing) .*lost", line)
        how = "drained" if drain else "lost"
        self.seen.append(
            f"node of {process} {how} | {time.monotonic() - began:.0f} s | {lost[1] if lost else 'not known'}"
        )

    def finish(self) -> None:
        """Ends well, without dumps, and leaves nothing reserved and no actor with a name."""
        assert self.process.finish() == 0, self.output
        print(self.output)
        assert "Traceback" not in self.output and "RayActorError" not in self.output, self.output
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        assert groups == []
        # Ray Train and Ray Data leave actors of their own, in namespaces of their own.
        named = ray.util.list_named_actors(all_namespaces=True)
        assert [actor for actor in named if actor["namespace"] == NAMESPACE] == []


@pytest.fixture
def start(nodes: Nodes, tmp_path: Path, start_sweep: Any, wait_until: Callable[..., None]) -> Callable[..., Sweep]:
    def begin(row: str, steps: int) -> Sweep:
        process = start_sweep(tmp_path, *arguments(row, steps), address=nodes.cluster.address, variables=VARIABLES)
        return Sweep(process, tmp_path, nodes, wait_until)

    return begin


def test_every_kind_of_node_may_be_lost(
    nodes: Nodes, start: Callable[..., Sweep], start_sweep: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sweep = start(TRAINED, STEPS)
    sweep.wait(lambda: sweep.step() >= EVERY, "no checkpoint")
    for process in ("Broker", "ImplicitFunc"):
        assert ON_DEMAND in nodes.find(process)._ray_params.resources, process
    sweep.lose("ImplicitFunc", "its driver process was lost", nodes.add_on_demand)
    sweep.lose("Broker", "the sweep's broker was lost", nodes.add_on_demand)
    sweep.lose("RayTrainWorker", NODE_LOST, nodes.add)
    sweep.lose("RayTrainWorker", "is being drained", nodes.add, drain=True)
    sweep.lose("Validator", NODE_LOST, nodes.add)
    sweep.finish()
    whole = tmp_path_factory.mktemp("whole")
    undisturbed = start_sweep(whole, *arguments(TRAINED, STEPS), address=nodes.cluster.address, variables=VARIABLES)
    assert undisturbed.finish() == 0, undisturbed.output
    is_same = table(sweep.folder, TRAINED) == table(whole, TRAINED)
    for line in sweep.seen:
        print(f"{line} | same table: {is_same}")
    assert is_same


def test_the_node_of_a_labeller_may_be_lost(
    nodes: Nodes, start: Callable[..., Sweep], start_sweep: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Blocks that were written stay, the others are labelled on another node, and the labels are the same."""
    sweep, labeller = start(LABELLED, EVERY), "MapWorker("
    sweep.wait(lambda: nodes.find(labeller), "nothing labels")
    node, began = nodes.find(labeller), time.monotonic()
    nodes.cluster.remove_node(node, allow_graceful=False)
    nodes.add()
    words = "a node that labels was lost"
    sweep.wait(lambda: sweep.said(words), f"not said: {words}")
    sweep.finish()
    whole = tmp_path_factory.mktemp("whole")
    undisturbed = start_sweep(whole, *arguments(LABELLED, EVERY), address=nodes.cluster.address, variables=VARIABLES)
    assert undisturbed.finish() == 0, undisturbed.output
    is_same = table(sweep.folder, LABELLED) == table(whole, LABELLED)
    print(f"node of a labeller lost | the sweep ended {time.monotonic() - began:.0f} s later | same table: {is_same}")
    assert is_same
