"""Room on a cluster of several nodes: where a segment's parts lie, who goes first, and what is said meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from cast_ray.recipe import build_recipe
from cast_ray.runtime.cluster import Cluster
from cast_ray.runtime.data.resources import (
    labeller_bundle,
    segment_bundles,
    segment_selectors,
    stream_bundle,
    worker_bundle,
)
from cast_ray.runtime.placement import nodes_of, reserve
from cast_ray.runtime.ray_internals import has_autoscaler
from cast_ray.runtime.sweep.broker import Broker
from cast_ray.runtime.sweep.slots import slots_of
from cast_ray.runtime.worker import group as group_module
from cast_ray.runtime.worker.segment import Segment

pytestmark = pytest.mark.timeout(600)

# One GPU and 8 CPUs a node, as in cluster/gpu.yaml; GPUs are a number to Ray, so none is needed.
SETTINGS = {
    "runtime.use_gpu": "true",
    "runtime.num_workers": "2",
    "runtime.cpus_per_worker": "1",
    "runtime.reads_per_stream": "4",
    "runtime.cpus_per_read": "1",
    "runtime.stream_memory_mb": "32",
}
STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayCluster]:
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    for size in ("small", "big"):
        cluster.add_node(num_cpus=8, num_gpus=1, object_store_memory=STORE_BYTES, labels={"gpu-size": size})
    ray.init(cluster.address, log_to_driver=False, namespace="cast_ray")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def segment_of(broker: Any, owner: str) -> Segment:
    parts: Any = {"stages": [], "store": None, "categories": (), "images": {}, "val": None, "num_val": 0}
    return Segment(
        owner=owner, sweep="", recipe=build_recipe("shapes", overrides=SETTINGS), broker=broker, requested=0.0, **parts
    )


def test_each_stream_lies_beside_its_worker(nodes: RayCluster) -> None:
    """Packed on their own, both streams lie on one node and strand its GPU: 8 of its 8 CPUs are taken."""
    segment = segment_of(Broker.remote(1, set()), "row")  # type: ignore[attr-defined]
    runtime = segment.recipe.runtime
    homes = segment_bundles(runtime, [], [])
    for _ in range(5):
        found = group_module._find_room(segment, homes)
        assert found is not None and len(set(found)) == 2
        with (
            reserve([stream_bundle(runtime)] * 2, nodes=found) as streams,
            reserve([worker_bundle(runtime)] * 2, nodes=found) as workers,  # as Ray Train does it
        ):
            assert streams.wait(20) and workers.wait(20)
            assert nodes_of(streams) == nodes_of(workers) == found


def test_a_segment_lies_on_the_nodes_that_its_selectors_name(nodes: RayCluster) -> None:
    """The teacher on the big GPU, the student on the small one, each in turn."""
    sizes = {node["NodeID"]: node["Labels"].get("gpu-size") for node in ray.nodes()}
    broker = Broker.remote(1, set())  # type: ignore[attr-defined]
    for student, teacher in (("small", "big"), ("big", "small")):
        segment = segment_of(broker, f"row-{student}")
        chosen = {
            "num_workers": 1,
            "worker_selector": f"gpu-size={student}",
            "labeller_selector": f"gpu-size={teacher}",
        }
        runtime = segment.recipe.runtime.model_copy(update=chosen)
        teachers = [labeller_bundle(runtime)]
        homes, selectors = segment_bundles(runtime, [], teachers), segment_selectors(runtime, [], teachers)
        assert [sizes[node] for node in group_module._find_room(segment, homes, selectors)] == [student, teacher]


def test_segments_that_wait_for_the_same_nodes_all_come_to_their_turn(nodes: RayCluster) -> None:
    """Each exchanges the reservation of the whole for those of its parts, with older ones waiting for the gap."""
    broker = Broker.options(max_concurrency=100).remote(9, set(), by_turns=True)  # type: ignore[attr-defined]
    ended, overtaken, lock = [], [], threading.Lock()

    def run(owner: str) -> None:
        segment = segment_of(broker, owner)
        runtime = segment.recipe.runtime
        while owner not in ended:
            found = group_module._find_room(segment, segment_bundles(runtime, [], []))
            with reserve([stream_bundle(runtime)] * 2, nodes=found) as streams:
                time.sleep(0.3)  # Train's controller starts
                with reserve([worker_bundle(runtime)] * 2, nodes=found) as workers:
                    is_placed = streams.wait(10) and workers.wait(10)
                    with lock:
                        (ended if is_placed else overtaken).append(owner)
                    ray.get(broker.handed_over.remote(owner))
                    time.sleep(0.3)  # the segment runs
            ray.get(broker.vacate.remote(owner))

    threads = [threading.Thread(target=run, args=(f"row {i}",), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(ended) == [f"row {i}" for i in range(6)] and overtaken == []


def test_what_waits_is_said_until_a_node_comes(nodes: RayCluster) -> None:
    said: list[tuple[str, str]] = []
    added = []

    def say(what: str, why: str) -> None:
        said.append((what, why))
        if why and not added:
            added.append(nodes.add_node(num_cpus=12, object_store_memory=STORE_BYTES))

    with reserve([{"CPU": 12.0}, {"CPU": 1.0}], say=say) as group:
        assert set(nodes_of(group)) & {added[0].node_id}
    assert said[0] == ("{CPU 12} and {CPU 1}", "") and said[1][0] == said[0][0]
    # Ray's own words, where its dashboard has them already; it says them without an autoscaler, too.
    assert "{'CPU': 12.0}" in said[1][1] or said[1][1] == "the nodes that are up cannot hold it"
    nodes.remove_node(added[0])


def test_a_stream_that_no_node_holds_is_refused(nodes: RayCluster) -> None:
    """16 CPUs fit the sum of two nodes of 8 and neither of them; such a sweep once hung."""
    assert not has_autoscaler()
    alive = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    cluster = Cluster("", ray.cluster_resources(), alive, is_local=False)
    assert slots_of([build_recipe("shapes", overrides=SETTINGS)], cluster, 0.01, 5) == 5
    with pytest.raises(ValueError, match=r"a worker with its stream needs a node with \{CPU 17, GPU 1"):
        slots_of([build_recipe("shapes", overrides=SETTINGS | {"runtime.reads_per_stream": "16"})], cluster, 0.01, 5)
