"""What a Ray Data stream may use: a placement group of its own for its tasks, and a share of the object store.

Facts of Ray Data 2.60 that shape this file:

- Concurrent executions get equal *integer* shares of each node's idle CPUs (`amount // len(requesters)` in its
  autoscaling coordinator): with fewer whole CPUs than streams the share is 0 and all wait for ever, silently. So every
  stream runs in a placement group of its own, where the group is the budget: concurrent trials cannot starve each
  other, and one that finds no room waits for its group, not for its first block (tests/ray/test_streams.py).
- Its scheduling loop looks up to 0.1 s late for finished tasks (`ray.wait` for all that run). A stream that may submit
  only as many tasks as run at a time therefore leaves cores idle between two looks; ours may submit twice as many, of
  which Ray Core starts the second half by itself as slots fall free.
- When a stream is ahead of its consumer, the same call returns at once, and the loop turns as fast as it can: 0.8 of a
  core, and the interpreter lock that training needs. `PacedLoop` pauses it where a turn has brought nothing.
- A group's bundles are its whole budget, memory included: without any `object_store_memory` single blocks trickle
  through. But a bundle that really reserves it aborts the raylet when it is returned while objects are stored
  (ray-project/ray#45780). So memory, like the second half of the tasks, stands in the handle that Ray Data sees and not
  in the group. Of what it sees, Ray Data uses about half; it is therefore shown twice what the stream may take.
- Blocks that a consumer still holds count too, two or three of them: blocks must be small enough for as many again to
  be in the making, or only one task runs at a time (`block_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray.data
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cast_ray.recipe import RuntimeConfig
from cast_ray.recipe.runtime import parse_selector
from cast_ray.runtime.placement import joined
from cast_ray.runtime.ray_internals import execution_callbacks


def stream_bundle(runtime: RuntimeConfig) -> dict[str, float]:
    """What one stream reserves: the CPUs of its decoding tasks."""
    return {"CPU": runtime.reads_per_stream * runtime.cpus_per_read}


def worker_bundle(runtime: RuntimeConfig) -> dict[str, float]:
    """What one training worker reserves."""
    return {"CPU": runtime.cpus_per_worker} | ({"GPU": 1.0} if runtime.use_gpu else {})


def labeller_bundle(runtime: RuntimeConfig) -> dict[str, float]:
    """What one labeller or online teacher reserves."""
    return {"CPU": runtime.cpus_per_labeller} | ({"GPU": 1.0} if runtime.use_gpu else {})


def validator_bundle(runtime: RuntimeConfig) -> dict[str, float]:
    """What the actor reserves that measures snapshots beside training."""
    on_gpu = runtime.use_gpu and runtime.validate_on_gpu
    return {"CPU": runtime.cpus_per_worker} | ({"GPU": 1.0} if on_gpu else {})


def num_devices(runtime: RuntimeConfig, processes: Sequence[Mapping[str, float]]) -> int:
    """Devices that processes with models hold: their GPUs or, without GPUs, the processes themselves.

    Args:
        processes: what each worker, labeller, teacher and validator reserves.
    """
    return round(sum(each.get("GPU", 0.0) for each in processes)) if runtime.use_gpu else len(processes)


def segment_bundles(
    runtime: RuntimeConfig, beside: Sequence[dict[str, float]], teachers: Sequence[dict[str, float]]
) -> list[dict[str, float]]:
    """What must have room at once before a segment's workers start, one bundle for what lies on one node.

    Args:
        beside: of validation beside training, the stream and its actor; [] where there is none.
        teachers: of those that label online; [] where there are none.
    """
    workers = [joined(worker_bundle(runtime), stream_bundle(runtime))] * runtime.num_workers
    return [*workers, *([joined(*beside)] if beside else []), *teachers]


def segment_selectors(
    runtime: RuntimeConfig, beside: Sequence[dict[str, float]], teachers: Sequence[dict[str, float]]
) -> list[dict[str, str]]:
    """The labels that the node of each bundle of `segment_bundles` must have."""
    on_workers = [parse_selector(runtime.worker_selector)] * (runtime.num_workers + bool(beside))
    return [*on_workers, *[parse_selector(runtime.labeller_selector)] * len(teachers)]


def labelling_bundles(runtime: RuntimeConfig) -> list[dict[str, float]]:
    """What a labelling job of its own reserves: its stream, then its labellers."""
    return [stream_bundle(runtime), *[labeller_bundle(runtime)] * runtime.num_labellers]


def labelling_selectors(runtime: RuntimeConfig) -> list[dict[str, str]]:
    """The labels that the node of each bundle of `labelling_bundles` must have."""
    return [parse_selector(runtime.labeller_selector)] * (1 + runtime.num_labellers)


def tasks_per_stream(runtime: RuntimeConfig) -> int:
    """Data tasks that a stream may have submitted: those that run, and as many that wait for a slot."""
    return 2 * runtime.reads_per_stream


def block_bytes(runtime: RuntimeConfig) -> int:
    """Size at which the blocks of all tasks fill a quarter of the stream's memory."""
    return runtime.stream_memory_mb * 2**20 // (4 * tasks_per_stream(runtime))


def configure_data(group: PlacementGroup, runtime: RuntimeConfig, bundle: int) -> None:
    """Settings of every stream in this process.

    Args:
        group: where the streams' tasks run, see `placement.reserve`.
        runtime: how many tasks, and how far each stream may read ahead.
        bundle: index of this process's bundle in the group; -1: all of it, the stream's own bundle being the first.
    """
    context = ray.data.DataContext.get_current()
    strategy = PlacementGroupSchedulingStrategy(_as_seen(group, runtime, bundle), placement_group_bundle_index=bundle)
    context.scheduling_strategy = context.scheduling_strategy_large_args = strategy
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = execution_callbacks()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a task's block is neither cut nor joined with others


def _as_seen(group: PlacementGroup, runtime: RuntimeConfig, bundle: int) -> PlacementGroup:
    """A handle of the same group with the budget that Ray Data is to see."""
    specs = [dict(spec) if bundle in (-1, i) else {} for i, spec in enumerate(group.bundle_specs)]
    stream = specs[max(bundle, 0)]
    stream["CPU"] += (tasks_per_stream(runtime) - runtime.reads_per_stream) * runtime.cpus_per_read
    stream["object_store_memory"] = 2 * runtime.stream_memory_mb * 2**20
    return PlacementGroup(group.id, bundle_cache=specs)


def num_teachers(runtime: RuntimeConfig) -> int:
    """Teachers that label online for one segment."""
    return max(1, runtime.num_labellers)
