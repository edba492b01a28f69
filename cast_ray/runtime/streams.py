"""Ray Data streams: training steps, and images to label or evaluate.

A stream's dataset is a *plan*: which images every row takes, known before anything runs. Of a training stream a row is
one step of one worker; Data tasks read, decode, make both views and collate, and the worker receives whole steps in
plan order. Cycling of the short side, shuffling per epoch, order, equal step counts and resuming at step k are
properties of the plan (`stages/sampling.py`), not of the stream: it knows no epochs, and no barriers between them.

Record tables live in the object store (one copy a node, shared by all tasks there); images are read by URI when needed;
nothing of the size of the dataset is held in a worker but its indices (8 bytes an image).

`from_arrow` starts a task of 1 CPU for each block to learn its schema; a `Datasource` of our own starts none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from cast_ray.recipe import DataConfig, RuntimeConfig
from cast_ray.records import Batch, Category, ClassMap
from cast_ray.runtime.budget import block_bytes, tasks_per_stream
from cast_ray.runtime.store import ArtifactStore
from cast_ray.stages.sampling import view_seed, worker_slots

MAX_STEPS_PER_TASK = 32
MAX_TASKS_PER_EXECUTION = 2000
"""Ray Data stores every task's input before it starts the first, 0.8 ms each: 90,000 steps would begin after 70 s."""
IMAGES_PER_TASK = 16
BYTES_PER_PIXEL = 8
"""Of one image of a step: two views, truth maps, some masks as bits."""

T = TypeVar("T")
Rows = tuple[int, int]
"""First row of a plan's block and the one behind its last."""


class PlanSource(Datasource):
    """A stream's dataset: blocks of a plan, each turned into one table by one task.

    Args:
        blocks: rows of the plan, in order.
        make: reference to a function, first row, row behind the last -> table, that runs in Data tasks. So its own data
            (the plan, index arrays, settings) is stored once, not per task.
    """

    def __init__(self, blocks: list[Rows], make: ray.ObjectRef):
        super().__init__()
        self.blocks = blocks
        self.make = make

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_run_block, self.make, *rows),
                BlockMetadata(num_rows=rows[1] - rows[0], size_bytes=None, exec_stats=None),
            )
            for rows in self.blocks
        ]


def plan_dataset(blocks: list[Rows], make: ray.ObjectRef, runtime: RuntimeConfig) -> ray.data.Dataset:
    """The dataset of a plan, see `PlanSource`."""
    return ray.data.read_datasource(
        PlanSource(blocks, make),
        num_cpus=runtime.cpus_per_read,
        concurrency=tasks_per_stream(runtime),
        override_num_blocks=len(blocks),
    )


def _run_block(make: ray.ObjectRef, start: int, stop: int) -> list[pa.Table]:
    from cast_ray.views import use_one_thread

    use_one_thread()
    return [_fetched(make)(start, stop)]


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


def record_at(ref: ray.ObjectRef, index: int) -> dict[str, Any]:
    """One record as Python values, inside a Data task or actor."""
    return _fetched(ref).slice(int(index), 1).to_pylist()[0]


@dataclass(frozen=True)
class StepPlan:
    """What the tasks of one worker's training stream share: its sampling plan and how samples are made.

    labelled, unlabelled: int64 [steps, share], positions in D_l and D_u; first_step: step of their first row;
    first_slots: place of the worker's share in the global batch; strong: whether any term reads the strong view, and
    with it the truth maps; oracle: give the hidden ground truth of D_u to the samplers (never to the set loss).
    """

    images: Images
    data: DataConfig
    seed: int
    labelled: np.ndarray
    unlabelled: np.ndarray
    first_step: int
    first_slots: tuple[int, int]
    strong: bool
    oracle: bool


def training_stream(
    images: Images,
    data: DataConfig,
    runtime: RuntimeConfig,
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
    device: Any = None,
) -> Iterator[Batch]:
    """This worker's batches of steps start_step..steps-1, in order.

    Args:
        images: D_l, D_u and pseudo-labels.
        data: crop size and view settings.
        batch_labelled, batch_unlabelled: global batch sizes.
        strong, oracle: see `StepPlan`.
        device: torch device of the batches; None: the CPU.
    """
    if start_step >= steps:
        return
    slots = partial(worker_slots, start_step=start_step, stop_step=steps, seed=seed, rank=rank, world_size=world_size)
    labelled = slots(len(images.labelled), batch_labelled)
    unlabelled = slots(len(images.unlabelled), batch_unlabelled)
    plan = StepPlan(
        images,
        data,
        seed,
        labelled,
        unlabelled,
        start_step,
        (rank * labelled.shape[1], batch_labelled + rank * unlabelled.shape[1]),
        strong,
        oracle,
    )
    step_bytes = (labelled.shape[1] + unlabelled.shape[1]) * data.image_px[0] * data.image_px[1] * BYTES_PER_PIXEL
    blocks = step_blocks(steps - start_step, max(1, min(block_bytes(runtime) // step_bytes, MAX_STEPS_PER_TASK)))
    make = ray.put(partial(_make_steps, plan=plan))
    parts = [blocks[i : i + MAX_TASKS_PER_EXECUTION] for i in range(0, len(blocks), MAX_TASKS_PER_EXECUTION)]
    payloads = chain.from_iterable(_payloads(plan_dataset(part, make, runtime)) for part in parts)
    yield from _ahead(partial(_to_batch, device=device), payloads)


def step_blocks(num_steps: int, max_size: int) -> list[Rows]:
    """Rows 0..num_steps-1 in blocks of doubling size, so that training starts before a full task is done."""
    blocks, start, size = [], 0, 1
    while start < num_steps:
        blocks.append((start, min(start + size, num_steps)))
        start, size = start + size, min(2 * size, max_size)
    return blocks


def _payloads(dataset: ray.data.Dataset) -> Iterator[pa.Buffer]:
    for block in _blocks(dataset):
        for payload in block.column("batch"):
            yield payload.as_buffer()


def _to_batch(payload: pa.Buffer, device: Any) -> Batch:
    from cast_ray.batches import CPU, from_buffer, to_batch

    return to_batch(from_buffer(payload), device or CPU)


def _ahead(make: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """`make` of each item, the next one on a thread while the consumer works on the last."""
    iterator = iter(items)
    end = object()

    def advance() -> Any:
        item = next(iterator, end)
        return end if item is end else make(item)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        following = pool.submit(advance)
        while (current := following.result()) is not end:
            following = pool.submit(advance)
            yield current


def _make_steps(start: int, stop: int, *, plan: StepPlan) -> pa.Table:
    """Rows of the plan -> collated steps, one buffer a row. Runs in a Data task."""
    from cast_ray.batches import collate, to_buffer

    classes = ClassMap(plan.images.categories)
    payloads = []
    for row in range(start, stop):
        labelled, unlabelled = plan.labelled[row], plan.unlabelled[row]
        samples = [_sample(plan, classes, row, i, position, True) for i, position in enumerate(labelled)]
        samples += [_sample(plan, classes, row, i, position, False) for i, position in enumerate(unlabelled)]
        payloads.append(to_buffer(collate(samples, len(labelled))))
    return pa.table({"step": np.arange(start, stop) + plan.first_step, "batch": _binary(payloads)})


def _sample(
    plan: StepPlan, classes: ClassMap, row: int, i: int, position: int, is_labelled: bool
) -> dict[str, np.ndarray]:
    from cast_ray.datasets.images import read_image
    from cast_ray.views import make_sample

    images = plan.images
    record = record_at(images.records, (images.labelled if is_labelled else images.unlabelled)[position])
    if not is_labelled and images.labels is not None:
        record["truth_instances"] = record["instances"]
        record["instances"] = record_at(images.labels, position)["instances"]
    slot = plan.first_slots[0 if is_labelled else 1] + i
    return make_sample(
        read_image(record["uri"]),
        record,
        classes,
        plan.data,
        view_seed(plan.seed, plan.first_step + row, slot),
        use_instances=is_labelled or images.labels is not None,
        truth=plan.strong and (is_labelled or plan.oracle),
        strong=plan.strong,
    )


def _binary(payloads: list[np.ndarray]) -> pa.ChunkedArray:
    """large_binary of one value a chunk: the buffers as they are, where `pa.array` would copy them."""
    return pa.chunked_array(
        [
            pa.LargeBinaryArray.from_buffers(
                pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, p.nbytes])), pa.py_buffer(p)]
            )
            for p in payloads
        ]
    )


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
    records: ray.ObjectRef, indices: np.ndarray, image_px: tuple[int, int], runtime: RuntimeConfig
) -> ray.data.Dataset:
    """Images decoded and fitted to `image_px`: rows of position (in `indices`), pixels and sizes."""
    starts = range(0, len(indices), IMAGES_PER_TASK)
    blocks = [(a, min(a + IMAGES_PER_TASK, len(indices))) for a in starts]
    fit = partial(_fit_images, records=records, indices=indices, image_px=image_px)
    return plan_dataset(blocks, ray.put(fit), runtime)


def _fit_images(
    start: int, stop: int, *, records: ray.ObjectRef, indices: np.ndarray, image_px: tuple[int, int]
) -> pa.Table:
    from cast_ray.datasets.images import read_image
    from cast_ray.views import fit_image

    rows = []
    for position in range(start, stop):
        image = read_image(record_at(records, indices[position])["uri"])
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
