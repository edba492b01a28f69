"""How many stages fit a cluster: everything that runs at a time is counted, or reads would never start."""

from __future__ import annotations

from typing import Any

import pytest

from cast_ray.recipe import build_recipe
from cast_ray.runtime.sweep.slots import stage_slots

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
