"""Ray Data streams: training steps, and images to label or evaluate.

A training stream's dataset is the *sampling plan*: one row per step of one worker. Data tasks read, decode, make both
views and collate; a worker receives whole steps in plan order. One streaming execution serves a whole stage: cycling,
order, equal step counts and resuming at step k are properties of the plan, not of the stream.

Record tables live in the object store (one copy a node, shared by all its tasks); images are read by URI when needed.

Three facts of Ray Data 2.60 shape this file. Concurrent streams get equal *integer* shares of each node's idle CPUs
(`amount // len(requesters)` in its autoscaling coordinator): with fewer whole CPUs than streams the share is 0 and all
wait for ever, silently. So every stream runs in a placement group of its own, where the group is the budget. And
`from_arrow` starts a task of 1 CPU for each block to learn its schema; a `Datasource` of our own starts none.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cast_ray.recipe import DataConfig, RuntimeConfig
from cast_ray.records import Batch, Category, ClassMap
from cast_ray.runtime.store import ArtifactStore
from cast_ray.stages.sampling import view_seed, worker_slots

STEPS_PER_TASK = 8
IMAGES_PER_TASK = 16
LOOP_PAUSE_S = 0.02
TASKS_PER_STREAM = 2
"""Data tasks of one stream at a time: enough to decode while the last block is used, few enough for many trials."""


def stream_bundle(runtime: RuntimeConfig) -> dict[str, float]:
    """What one stream reserves: its decoding tasks' CPUs."""
    return {"CPU": TASKS_PER_STREAM * runtime.cpus_per_read}


class PacedLoop(ExecutionCallback):
    """A pause in every turn of a stream's scheduling loop: 0.07 of a core instead of 0.8 while the stream is ahead."""

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(LOOP_PAUSE_S)


@contextmanager
def reserve(bundles: list[dict[str, float]]) -> Iterator[PlacementGroup]:
    """A placement group for the streams of one stage or segment, given back at the end."""
    group = ray.util.placement_group(bundles, strategy="PACK")
    try:
        yield group
    finally:
        ray.util.remove_placement_group(group)


def configure_data(group: PlacementGroup, runtime: RuntimeConfig, bundle: int = -1) -> None:
    """Settings of every stream in this process.

    Args:
        group: where the streams' tasks run, see `reserve`.
        runtime: `stream_memory_mb` is how far each may read ahead.
        bundle: index of this process's bundle in it; -1: all of them.
    """
    context = ray.data.DataContext.get_current()
    budget = _with_memory_budget(group, runtime.stream_memory_mb * 2**20, bundle)
    strategy = PlacementGroupSchedulingStrategy(budget, placement_group_bundle_index=bundle)
    context.scheduling_strategy = context.scheduling_strategy_large_args = strategy
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [PacedLoop]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The default 128 MB blocks hold the first batch back until a task has made that much.
    context.target_max_block_size = 8 << 20


def _with_memory_budget(group: PlacementGroup, num_bytes: int, bundle: int) -> PlacementGroup:
    """A handle of the same group that also tells Ray Data how much object-store memory its streams may fill.

    Ray Data takes a group's bundles for its whole budget, memory included: without any it lets single blocks through.
    But a bundle that really reserves `object_store_memory` aborts the raylet when it is returned, if objects are
    stored meanwhile (ray-project/ray#45780, seen in 2.60). So the memory stands in the handle alone.
    """
    specs = [dict(spec) if bundle in (-1, i) else {} for i, spec in enumerate(group.bundle_specs)]
    specs[max(bundle, 0)]["object_store_memory"] = num_bytes
    return PlacementGroup(group.id, bundle_cache=specs)


class PlanSource(Datasource):
    """A stream's dataset: blocks of a plan, each turned into rows by one task.

    Args:
        blocks: row groups of the plan, in order.
        make: block -> rows; runs in a Data task. Its own data (index arrays, settings) is stored once, not per task.
    """

    def __init__(self, blocks: list[pa.Table], make: Callable[[pa.Table], pa.Table]):
        super().__init__()
        self.blocks = blocks
        self.make = ray.put(make)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_run_block, self.make, block),
                BlockMetadata(num_rows=block.num_rows, size_bytes=None, exec_stats=None),
            )
            for block in self.blocks
        ]

    def dataset(self, cpus_per_read: float) -> ray.data.Dataset:
        return ray.data.read_datasource(
            self, num_cpus=cpus_per_read, concurrency=TASKS_PER_STREAM, override_num_blocks=len(self.blocks)
        )


def _run_block(make: ray.ObjectRef, block: pa.Table) -> list[pa.Table]:
    return [_fetched(make)(block)]


@lru_cache(maxsize=16)
def _fetched(ref: ray.ObjectRef) -> Any:
    """An object of the store inside a Data task: record tables are zero-copy, plans' functions unpickled once."""
    return ray.get(ref)


@dataclass(frozen=True)
class Images:
    """The images of a stage, by reference: tables in the object store and the rows that count as D_l and D_u.

    labels: pseudo-labels of D_u, row i belonging to unlabelled[i]; None where no term reads them.
    """

    records: ray.ObjectRef
    labelled: np.ndarray
    unlabelled: np.ndarray
    categories: tuple[Category, ...]
    labels: ray.ObjectRef | None = None


# Not inside the placement group of the Tune trial that asks for it, which holds nothing but the driver.
@ray.remote(num_cpus=0.01, scheduling_strategy="DEFAULT")
def load_records(store: ArtifactStore, key: str, name: str) -> pa.Table:
    """Reads a record table into the object store, past the driver's memory."""
    table = store.read_table(key, name)
    if "position" in table.column_names:  # pseudo-labels arrive in the order in which they were made
        table = table.sort_by("position")
    return table.combine_chunks()


@ray.remote(num_cpus=0.01, scheduling_strategy="DEFAULT")
def join_records(*tables: pa.Table) -> pa.Table:
    """Record tables, one after the other, as one."""
    return pa.concat_tables(tables).combine_chunks()


def record_at(ref: ray.ObjectRef, index: int) -> dict[str, Any]:
    """One record as Python values, inside a Data task or actor."""
    return _fetched(ref).slice(int(index), 1).to_pylist()[0]


def training_stream(
    images: Images,
    data: DataConfig,
    *,
    batch_labelled: int,
    batch_unlabelled: int,
    steps: int,
    start_step: int,
    seed: int,
    rank: int,
    world_size: int,
    strong: bool,
    oracle: bool,
    cpus_per_read: float,
) -> Iterator[Batch]:
    """This worker's batches of steps start_step..steps-1, in order.

    Args:
        images: D_l, D_u and pseudo-labels.
        data: crop size and view settings.
        batch_labelled, batch_unlabelled: global batch sizes.
        strong: whether any term reads the strong view (else it is not computed).
        oracle: give the hidden ground truth of D_u to the samplers (upper bound; never to the set loss).
    """
    if start_step >= steps:
        return
    slots = partial(worker_slots, start_step=start_step, stop_step=steps, seed=seed, rank=rank, world_size=world_size)
    labelled = slots(len(images.labelled), batch_labelled)
    unlabelled = slots(len(images.unlabelled), batch_unlabelled)
    plan = pa.table(
        {
            "step": pa.array(np.arange(start_step, steps)),
            "labelled": pa.array(list(labelled), type=pa.list_(pa.int64())),
            "unlabelled": pa.array(list(unlabelled), type=pa.list_(pa.int64())),
        }
    )
    # The first blocks are short, so that training starts before a full task is done.
    cuts = [0, 1, 3, *range(STEPS_PER_TASK, plan.num_rows, STEPS_PER_TASK)]
    cuts = [c for c in cuts if c < plan.num_rows]
    blocks = [plan.slice(a, b - a) for a, b in zip(cuts, [*cuts[1:], plan.num_rows])]
    make = partial(
        _make_steps,
        images=images,
        data=data,
        seed=seed,
        strong=strong,
        oracle=oracle,
        first_slots=(rank * labelled.shape[1], batch_labelled + rank * unlabelled.shape[1]),
    )
    yield from _batches(PlanSource(blocks, make).dataset(cpus_per_read))


def _batches(dataset: ray.data.Dataset) -> Iterator[Batch]:
    from cast_ray.views import to_batch

    for block in _blocks(dataset):
        for payload in block.column("batch"):
            yield to_batch(pickle.loads(payload.as_buffer()))


def _make_steps(
    plan: pa.Table,
    *,
    images: Images,
    data: DataConfig,
    seed: int,
    strong: bool,
    oracle: bool,
    first_slots: tuple[int, int],
) -> pa.Table:
    """Plan rows -> collated steps, one pickled dict of arrays a row. Runs in a Data task."""
    import torch

    from cast_ray.datasets.images import read_image
    from cast_ray.views import collate, make_sample

    torch.set_num_threads(1)
    classes = ClassMap(images.categories)
    payloads = []
    for row in plan.to_pylist():
        samples = []
        for kind, first_slot in zip(("labelled", "unlabelled"), first_slots):
            is_labelled = kind == "labelled"
            for i, position in enumerate(row[kind]):
                index = (images.labelled if is_labelled else images.unlabelled)[position]
                record = record_at(images.records, index)
                if not is_labelled and images.labels is not None:
                    record["truth_instances"] = record["instances"]
                    record["instances"] = record_at(images.labels, position)["instances"]
                samples.append(
                    make_sample(
                        read_image(record["uri"], (record["height"], record["width"])),
                        record,
                        classes,
                        data,
                        view_seed(seed, row["step"], first_slot + i),
                        use_instances=is_labelled or images.labels is not None,
                        truth=is_labelled or oracle,
                        strong=strong,
                    )
                )
        payloads.append(pickle.dumps(collate(samples, len(row["labelled"])), protocol=5))
    return pa.table({"step": plan.column("step"), "batch": pa.array(payloads, type=pa.large_binary())})


@dataclass(frozen=True)
class Pictures:
    """A few images ready for inference: positions [n], pixels uint8 [n, 3, H, W] and their sizes, pixels."""

    positions: list[int]
    pixels: np.ndarray
    image_hw: list[tuple[int, int]]
    resized_hw: list[tuple[int, int]]

    @classmethod
    def of(cls, block: pa.Table, image_px: tuple[int, int]) -> Pictures:
        pixels = np.stack([np.frombuffer(b.as_buffer(), np.uint8) for b in block.column("pixels")])
        sizes = np.stack([block.column(n).to_numpy() for n in ("height", "width", "fit_height", "fit_width")], 1)
        return cls(
            block.column("position").to_pylist(),
            pixels.reshape(-1, 3, *image_px),
            [(int(h), int(w)) for h, w, _, _ in sizes],
            [(int(h), int(w)) for _, _, h, w in sizes],
        )


def picture_dataset(
    records: ray.ObjectRef, indices: np.ndarray, image_px: tuple[int, int], cpus_per_read: float
) -> ray.data.Dataset:
    """Images decoded and fitted to `image_px`: rows of position (in `indices`), pixels and sizes."""
    blocks = [
        pa.table({"position": np.arange(a, min(a + IMAGES_PER_TASK, len(indices)))})
        for a in range(0, len(indices), IMAGES_PER_TASK)
    ]
    fit = partial(_fit_images, records=records, indices=indices, image_px=image_px)
    return PlanSource(blocks, fit).dataset(cpus_per_read)


def _fit_images(block: pa.Table, *, records: ray.ObjectRef, indices: np.ndarray, image_px: tuple[int, int]) -> pa.Table:
    from cast_ray.datasets.images import read_image
    from cast_ray.views import fit_image

    rows = []
    for position in block.column("position").to_pylist():
        record = record_at(records, indices[position])
        image = read_image(record["uri"], (record["height"], record["width"]))
        pixels, (fit_height, fit_width) = fit_image(image, image_px)
        rows.append((position, pixels.tobytes(), image.shape[0], image.shape[1], fit_height, fit_width))
    names = ("position", "pixels", "height", "width", "fit_height", "fit_width")
    return pa.table({name: pa.array(column) for name, column in zip(names, zip(*rows))})


def pictures(dataset: ray.data.Dataset, image_px: tuple[int, int]) -> Iterator[Pictures]:
    """Iterates a `picture_dataset` block by block."""
    for block in _blocks(dataset):
        yield Pictures.of(block, image_px)


def _blocks(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    # Whole Arrow blocks: slicing rows off one by one in Ray Data costs three times as much.
    return cast(Iterator[pa.Table], dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
