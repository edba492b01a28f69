"""How many stages run at a time: on a local Ray all that does is counted, or reads would never start; on a cluster the
rows say how many, and only what no node could ever hold is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cast_ray.recipe import build_recipe
from cast_ray.runtime import ray_internals
from cast_ray.runtime.cluster import Cluster
from cast_ray.runtime.sweep.slots import MAX_STAGES, slots_of, stage_slots

BASE = {
    "runtime.num_workers": "2",
    "runtime.cpus_per_worker": "1",
    "runtime.cpus_per_read": "0.5",
    "runtime.reads_per_stream": "4",
    "runtime.cpus_per_labeller": "1",
    "runtime.stream_memory_mb": "100",
}
STORE = 10_000 * 2**20


def slots(cpus: float, gpus: float = 0, memory: float = STORE, **overrides: Any) -> int:
    recipe = build_recipe("shapes", overrides=BASE | {k.replace("__", "."): v for k, v in overrides.items()})
    return stage_slots(recipe, {"CPU": cpus, "GPU": gpus, "object_store_memory": memory}, 0.0)


def test_workers_and_their_reads_are_counted() -> None:
    assert slots(6) == 1 and slots(12) == 2  # 2 workers of 1 and twice 4 reads of .5
    assert slots(6, runtime__reads_per_stream="1") == 2
    with pytest.raises(ValueError, match=r"needs 6 CPUs.*Ray has 5 CPUs.*runtime\.reads_per_stream"):
        slots(5)


def test_an_elastic_run_needs_room_for_its_least_workers_and_a_sweep_of_its_own() -> None:
    assert slots(3, runtime__num_workers="2", runtime__min_workers="1") == 1  # of 6 for both
    cluster = Cluster("here", {"CPU": 6.0, "object_store_memory": float(STORE)})
    recipe = build_recipe("shapes", overrides=BASE | {"runtime.min_workers": "1"})
    assert slots_of([recipe], cluster, 0.0, 1) == 2
    with pytest.raises(
        ValueError, match=r"--workers-per-trial 1:2 .*: 3 rows are to run.*expected one row and one seed"
    ):
        slots_of([recipe], cluster, 0.0, 3)


def test_labellers_of_a_job_of_their_own_are_counted() -> None:
    assert slots(18) == 3
    assert slots(18, runtime__num_labellers="7") == 2  # 7 and the reads of one stream


def test_online_teachers_run_beside_the_workers() -> None:
    assert slots(7, labels__mode="online") == 1
    with pytest.raises(ValueError, match="needs 9 CPUs"):
        slots(7, labels__mode="online", runtime__num_labellers="3")


def test_every_worker_and_teacher_has_a_gpu() -> None:
    assert slots(100, 4, runtime__use_gpu="true") == 2
    assert slots(100, 4, runtime__use_gpu="true", labels__mode="online") == 1
    with pytest.raises(ValueError, match=r"needs 3 GPUs, Ray has 2: .*runtime\.use_gpu=false.*runtime\.num_workers"):
        slots(100, 2, runtime__use_gpu="true", labels__mode="online")


def test_a_machine_without_gpu_is_told_how_to_go_on_without() -> None:
    with pytest.raises(ValueError, match=r"needs 2 GPUs, Ray has 0: set runtime\.use_gpu=false to run on CPUs$"):
        slots(100, 0, runtime__use_gpu="true")


def test_streams_fit_the_object_store() -> None:
    assert slots(100, memory=600 * 2**20) == 3
    with pytest.raises(ValueError, match="200 MB of object store"):
        slots(100, memory=199 * 2**20)


def test_the_user_can_ask_for_fewer() -> None:
    assert slots(100, runtime__max_concurrent_stages="2") == 2


def cluster_of(*nodes: dict[str, float]) -> Cluster:
    total: Counter[str] = Counter()
    nodes = tuple({"object_store_memory": float(STORE)} | node for node in nodes)
    for node in nodes:
        total.update(node)
    return Cluster("", dict(total), nodes, is_local=False)


def demand(cluster: Cluster, num_rows: int = 12, **overrides: Any) -> int:
    recipe = build_recipe("shapes", overrides=BASE | {k.replace("__", "."): v for k, v in overrides.items()})
    return slots_of([recipe], cluster, 0.01, num_rows)


@pytest.fixture
def autoscaler(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the cluster has one; it can be changed."""
    has = [False]
    monkeypatch.setattr(ray_internals, "has_autoscaler", lambda: has[0])
    return has


def test_on_a_cluster_the_rows_say_how_many_and_not_what_is_up(autoscaler: list[bool]) -> None:
    """A cluster that began with one small node once ran one row at a time for ever, whatever came later."""
    small = cluster_of({"CPU": 3.0})
    assert demand(small) == 12 and demand(small, num_rows=500) == MAX_STAGES
    assert demand(small, runtime__max_concurrent_stages="40", num_rows=500) == 40
    assert demand(small, runtime__max_concurrent_stages="5") == 5


def test_a_cluster_that_starts_without_gpu_is_not_refused(autoscaler: list[bool]) -> None:
    nothing, drivers = cluster_of(), cluster_of({"CPU": 0.0}, {"CPU": 8.0})
    with pytest.raises(ValueError, match=r"node with \{CPU 3, GPU 1.*no autoscaler.*runtime\.use_gpu=false"):
        demand(drivers, runtime__use_gpu="true")
    autoscaler[0] = True
    assert demand(drivers, runtime__use_gpu="true") == 12
    assert demand(nothing) == 12  # a job that starts before any node with a CPU is up


def test_bundles_are_compared_with_nodes_and_not_sums(autoscaler: list[bool]) -> None:
    two = cluster_of({"CPU": 8.0}, {"CPU": 8.0})
    assert demand(two) == 12
    with pytest.raises(ValueError) as error:
        demand(two, runtime__reads_per_stream="16", runtime__cpus_per_read="1")
    assert str(error.value) == (
        "runtime: a worker with its stream needs a node with {CPU 17, object store MB 100}; the nodes of this cluster "
        "have 2 x {CPU 8, object store MB 10000}, and it has no autoscaler that could start another: lower "
        "runtime.reads_per_stream, runtime.cpus_per_read or runtime.stream_memory_mb, or runtime.cpus_per_worker"
    )
    with pytest.raises(ValueError, match=r"a labeller needs a node with \{CPU 9\}"):
        demand(two, runtime__num_labellers="1", runtime__cpus_per_labeller="9")
    with pytest.raises(ValueError, match=r"object store MB 50"):
        demand(cluster_of({"CPU": 8.0, "object_store_memory": 50 * 2.0**20}))


def labelled(*labels: dict[str, str], is_local: bool = False) -> Cluster:
    nodes = tuple({"object_store_memory": float(STORE), "CPU": 100.0} for _ in labels)
    return Cluster("", {"CPU": 100.0, "object_store_memory": STORE}, nodes, labels, is_local)


L4, A10G = {"ray.io/accelerator-type": "L4"}, {"ray.io/accelerator-type": "A10G", "ray.io/node-id": "0123"}


@pytest.mark.parametrize("is_local", [False, True])
def test_a_label_that_no_node_has_is_refused_where_no_node_can_come(autoscaler: list[bool], is_local: bool) -> None:
    cluster = labelled(L4, A10G, is_local=is_local)
    wanted: dict[str, Any] = {
        "runtime__num_labellers": "2",
        "runtime__labeller_selector": "ray.io/accelerator-type=A100",
    }
    with pytest.raises(ValueError) as error:
        demand(cluster, **wanted)
    assert str(error.value) == (
        "runtime.labeller_selector=ray.io/accelerator-type=A100: no node of this cluster has such labels, and nothing "
        "starts another; its nodes have ray.io/accelerator-type=L4, ray.io/accelerator-type=A10G"
    )
    autoscaler[0] = True
    if not is_local:  # which nothing ever joins, whatever Ray says
        assert demand(cluster, **wanted) == 12
    autoscaler[0] = False
    assert demand(cluster, **wanted | {"runtime__labeller_selector": "ray.io/accelerator-type=!A10G"})
    assert demand(cluster, runtime__worker_selector="ray.io/accelerator-type=in(L4,A100)")


def test_only_nodes_with_the_wanted_labels_are_compared(autoscaler: list[bool]) -> None:
    """A worker that only the large nodes hold, and that was told to lie on a small one, would wait for ever."""
    sizes = ({"CPU": 2.0, "object_store_memory": float(STORE)}, {"CPU": 64.0, "object_store_memory": float(STORE)})
    cluster = Cluster("", {"CPU": 66.0}, sizes, (L4, A10G), is_local=False)
    assert demand(cluster) == demand(cluster, runtime__worker_selector="ray.io/accelerator-type=A10G") == 12
    with pytest.raises(ValueError) as error:
        demand(cluster, runtime__worker_selector="ray.io/accelerator-type=L4")
    assert "the nodes of this cluster on nodes with" not in str(error.value)
    assert "the nodes of this cluster with ray.io/accelerator-type=L4 have {CPU 2, " in str(error.value)
