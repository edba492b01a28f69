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

import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray
import ray.data
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from cast_ray.recipe import DataConfig, InputSize, RuntimeConfig
from cast_ray.contracts.records import Batch, Category, ClassMap
from cast_ray.runtime.data.resources import block_bytes, tasks_per_stream
from cast_ray.runtime.data.record_tables import fetched, record_at
from cast_ray.data.sampling import view_seed, worker_slots

if TYPE_CHECKING:
    from cast_ray.runtime.worker.online import OnlineLabels

MAX_STEPS_PER_TASK = 32
GIVE_UP_S = 20.0
"""How long a stream that nobody reads any more waits for the batch that is being made."""
MAX_TASKS_PER_EXECUTION = 2000
"""Ray Data stores every task's input before it starts the first, 0.8 ms each: 90,000 steps would begin after 70 s."""
IMAGES_PER_TASK = 16
"""Images of one block that are fitted into a model's crop."""
NATIVE_IMAGES_PER_TASK = 4
"""The same of images of their own size, which may be large: 6 MB each at 1024 x 2048."""
BYTES_PER_PIXEL = 10
"""Of one image of a step: two views, truth maps, some masks as bits."""

T = TypeVar("T")
Drawn = tuple[np.ndarray, dict[str, Any]]
"""An image, uint8 [h, w, 3], and its record."""
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
    from cast_ray.runtime.process_settings import prepare_process

    prepare_process()
    return [fetched(make)(start, stop)]


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


@dataclass(frozen=True)
class StepPlan:
    """What the tasks of one worker's training stream share: its sampling plan and how samples are made.

    labelled, unlabelled: int64 [steps, share], positions in D_l and D_u; first_step: step of their first row;
    first_slots: place of the worker's share in the global batch; strong: whether L_pxl reads the strong view, and with
    it the truth maps; oracle: give the hidden ground truth of D_u to the samplers (never to the set loss); online: who
    labels D_u as it is drawn; strong_unlabelled: whether L_semi reads the strong view of D_u; copy_paste: probability
    that an image gets instances of a random one of D_l pasted over it.
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
    online: OnlineLabels | None
    strong_unlabelled: bool = False
    copy_paste: float = 0.0

    @property
    def has_labels(self) -> bool:
        """Whether D_u has pseudo-labels."""
        return self.images.labels is not None or self.online is not None

    def groups(self, start: int, stop: int) -> Iterator[range]:
        """Rows start..stop-1 in groups that are read together: so many that a teacher's forward pass is full."""
        row = start
        while row < stop:
            end = row + 1
            if self.online is not None and self.unlabelled.shape[1]:
                version = self.online.version_of(self.first_step + row)
                while (
                    end < stop
                    and (end - row) * self.unlabelled.shape[1] < self.online.batch
                    and self.online.version_of(self.first_step + end) == version
                ):
                    end += 1
            yield range(row, end)
            row = end


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
    online: OnlineLabels | None = None,
    strong_unlabelled: bool = False,
    copy_paste: float = 0.0,
    device: Any = None,
) -> Iterator[Batch]:
    """This worker's batches of steps start_step..steps-1, in order.

    Args:
        images: D_l, D_u and pseudo-labels.
        data: crop size and view settings.
        batch_labelled, batch_unlabelled: global batch sizes.
        strong, oracle, strong_unlabelled, copy_paste: see `StepPlan`.
        online: who labels D_u as it is drawn; None: `images.labels`, or nobody.
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
        online,
        strong_unlabelled,
        copy_paste,
    )
    step_bytes = (labelled.shape[1] + unlabelled.shape[1]) * _sample_pixels(images, data) * BYTES_PER_PIXEL
    max_size = max(1, min(block_bytes(runtime) // step_bytes, MAX_STEPS_PER_TASK))
    blocks = step_blocks(start_step, steps, max_size, online.refresh_steps if online is not None else 0)
    make = ray.put(partial(_make_steps, plan=plan))
    parts = [blocks[i : i + MAX_TASKS_PER_EXECUTION] for i in range(0, len(blocks), MAX_TASKS_PER_EXECUTION)]
    payloads = (payload for part in parts for payload in _payloads(plan_dataset(part, make, runtime)))
    yield from _ahead(partial(_to_batch, device=device), payloads)


def _sample_pixels(images: Images, data: DataConfig) -> int:
    """Pixels of one sample: of a crop, or of the largest labelled image where whole ones are trained on."""
    if not data.whole_images:
        return data.image_px[0] * data.image_px[1]
    table = fetched(images.records)
    sides = (table.column(name).to_numpy()[images.labelled].tolist() for name in ("height", "width"))
    size = InputSize(data.train_resize, data.image_px)
    return max((math.prod(size.inside(height, width)) for height, width in zip(*sides)), default=1)


def step_blocks(start_step: int, steps: int, max_size: int, window: int = 0) -> list[Rows]:
    """Rows of steps start_step..steps-1 in blocks of doubling size, so that training starts before a full task is done.

    Args:
        window: steps that one version of a refreshed teacher labels; no block reaches into the next window, whose
            weights may come from steps of the block itself. 0: there is none.
    """
    blocks, first, size = [], start_step, 1
    while first < steps:
        stop = min(first + size, steps, (first // window + 1) * window if window else steps)
        blocks.append((first - start_step, stop - start_step))
        first, size = stop, min(2 * size, max_size)
    return blocks


def _payloads(dataset: ray.data.Dataset) -> Iterator[pa.Buffer]:
    for block in _blocks(dataset):
        for payload in block.column("batch"):
            yield payload.as_buffer()


def _to_batch(payload: pa.Buffer, device: Any) -> Batch:
    from cast_ray.data.batches import CPU, from_buffer, to_batch

    return to_batch(from_buffer(payload), device or CPU)


def _ahead(make: Callable[[Any], T], items: Generator[Any]) -> Iterator[T]:
    """`make` of each item, the next one on a thread while the consumer works on the last."""
    end = object()

    def advance() -> Any:
        item = next(items, end)
        return end if item is end else make(item)

    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    following = pool.submit(advance)
    try:
        while (current := following.result()) is not end:
            following = pool.submit(advance)
            yield current
    finally:
        # Ray must not end while a thread is in it, nor may a consumer that failed wait for ever for a batch that waits
        # for its next step (see `online`).
        is_idle = bool(wait([following], timeout=GIVE_UP_S).done)
        pool.shutdown(wait=is_idle, cancel_futures=True)
        if is_idle:
            items.close()


def _make_steps(start: int, stop: int, *, plan: StepPlan) -> pa.Table:
    """Rows of the plan -> collated steps, one buffer a row. Runs in a Data task."""
    from cast_ray.data.batches import collate, to_buffer

    classes = ClassMap(plan.images.categories)
    payloads = []
    for rows in plan.groups(start, stop):
        unlabelled = {row: [_read(plan, position, False) for position in plan.unlabelled[row]] for row in rows}
        if plan.online is not None:
            _label_online(plan, plan.online, rows, [drawn for row in rows for drawn in unlabelled[row]])
        for row in rows:
            labelled = [_read(plan, position, True) for position in plan.labelled[row]]
            samples = [_sample(plan, classes, row, i, drawn, True) for i, drawn in enumerate(labelled)]
            samples += [_sample(plan, classes, row, i, drawn, False) for i, drawn in enumerate(unlabelled[row])]
            payloads.append(to_buffer(collate(samples, len(labelled))))
    return pa.table({"step": np.arange(start, stop) + plan.first_step, "batch": _binary(payloads)})


def _read(plan: StepPlan, position: int, is_labelled: bool) -> Drawn:
    from cast_ray.data.reading.images import read_image

    images = plan.images
    record = record_at(images.records, (images.labelled if is_labelled else images.unlabelled)[position])
    if not is_labelled:
        record["truth_instances"] = record["instances"]
        record["instances"] = [] if images.labels is None else record_at(images.labels, position)["instances"]
    return read_image(record["uri"], (record["height"], record["width"])), record


def _label_online(plan: StepPlan, online: OnlineLabels, rows: range, drawn: list[Drawn]) -> None:
    """Puts a teacher's labels into the records of a group's unlabelled images."""
    from cast_ray.data.views import fit_image

    version = online.version_of(plan.first_step + rows.start)
    fitted = [fit_image(image, online.input_size_of(version)) for image, _ in drawn]
    pictures = Pictures(
        list(range(len(drawn))),
        [pixels for pixels, _ in fitted],
        [(image.shape[0], image.shape[1]) for image, _ in drawn],
        [size for _, size in fitted],
    )
    for (_, record), instances in zip(drawn, online.label(pictures, version, rows.start)):
        record["instances"] = instances


def _sample(
    plan: StepPlan, classes: ClassMap, row: int, i: int, drawn: Drawn, is_labelled: bool
) -> dict[str, np.ndarray]:
    from cast_ray.data.copy_paste import copy_paste
    from cast_ray.data.views import MIN_VISIBLE_PX, make_sample

    slot = plan.first_slots[0 if is_labelled else 1] + i
    seed = view_seed(plan.seed, plan.first_step + row, slot)
    use_instances = is_labelled or plan.has_labels
    truth = plan.strong and (is_labelled or plan.oracle)
    strong = plan.strong or (plan.strong_unlabelled and not is_labelled)
    sample = make_sample(*drawn, classes, plan.data, seed, use_instances=use_instances, truth=truth, strong=strong)
    if not (use_instances and plan.copy_paste):
        return sample
    rng = np.random.default_rng([seed, 1])  # of its own: the views are those of a plan without
    if rng.random() >= plan.copy_paste:
        return sample
    # From all of D_l, and not from the step's: what one worker holds of it depends on how many there are.
    position, its_seed = int(rng.integers(len(plan.images.labelled))), int(rng.integers(2**63))
    other = _read(plan, position, True)
    source = make_sample(*other, classes, plan.data, its_seed, use_instances=True, truth=truth, strong=strong)
    return copy_paste(sample, source, rng, MIN_VISIBLE_PX)


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
    """A few images ready for inference, in the order of their positions.

    positions [n]; pixels: n of uint8 [3, H, W], which need not have one size; image_hw, resized_hw: their own sizes and
    those inside the padding, pixels; bad: position and reason (naming the file) of images that could not be read, where
    that was asked for.
    """

    positions: list[int]
    pixels: list[np.ndarray]
    image_hw: list[tuple[int, int]]
    resized_hw: list[tuple[int, int]]
    bad: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, block: pa.Table) -> Pictures:
        """The rows of a block of a `picture_dataset`."""
        errors = zip(block.column("position").to_pylist(), block.column("error").to_pylist())
        bad = [(position, error) for position, error in errors if error is not None]
        good = block.filter(pa.compute.is_null(block.column("error"))) if bad else block
        padded, image_hw, resized_hw = (_sizes(good, name) for name in ("padded_", "", "fit_"))
        values = (np.frombuffer(b.as_buffer(), np.uint8) for b in good.column("pixels"))
        pixels = [value.reshape(3, *size) for value, size in zip(values, padded)]
        return cls(good.column("position").to_pylist(), pixels, image_hw, resized_hw, bad)


def _sizes(table: pa.Table, prefix: str) -> list[tuple[int, int]]:
    return list(zip(*(table.column(f"{prefix}{side}").to_pylist() for side in ("height", "width"))))


PICTURE_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("pixels", pa.large_binary()),
        *((f"{of}{side}", pa.int32()) for of in ("", "fit_", "padded_") for side in ("height", "width")),
        ("error", pa.string()),
    ]
)


def picture_dataset(
    records: ray.ObjectRef,
    indices: np.ndarray,
    input_size: InputSize,
    runtime: RuntimeConfig,
    blocks: list[Rows] | None = None,
    skip_bad: bool = False,
) -> ray.data.Dataset:
    """Images decoded and resized as a model sees them: rows of position (in `indices`), pixels and sizes
    (PICTURE_SCHEMA).

    Args:
        blocks: ranges of positions, each a block; None: all of them.
        skip_bad: an image that cannot be read has its reason in the column `error`; else it ends the stream.
    """
    if blocks is None:
        step = images_per_task(input_size)
        blocks = [(start, min(start + step, len(indices))) for start in range(0, len(indices), step)]
    fit = partial(_fit_images, records=records, indices=indices, input_size=input_size, skip_bad=skip_bad)
    return plan_dataset(blocks, ray.put(fit), runtime)


def images_per_task(input_size: InputSize) -> int:
    """Images of one block of a `picture_dataset`."""
    return IMAGES_PER_TASK if input_size.is_fixed else NATIVE_IMAGES_PER_TASK


def _fit_images(
    start: int, stop: int, *, records: ray.ObjectRef, indices: np.ndarray, input_size: InputSize, skip_bad: bool
) -> pa.Table:
    rows = []
    for position in range(start, stop):
        try:
            rows.append(_fit_image(position, record_at(records, indices[position]), input_size))
        except ValueError as error:
            if not skip_bad:
                raise
            rows.append({"position": position, "error": str(error)})
    return pa.Table.from_pylist(rows, schema=PICTURE_SCHEMA)


def _fit_image(position: int, record: dict[str, Any], input_size: InputSize) -> dict[str, Any]:
    from cast_ray.data.reading.images import read_image
    from cast_ray.data.views import fit_image

    image = read_image(record["uri"], (record["height"], record["width"]))
    pixels, (fit_height, fit_width) = fit_image(image, input_size)
    height, width = image.shape[:2]
    return {
        "position": position,
        "pixels": pixels.tobytes(),
        "height": height,
        "width": width,
        "fit_height": fit_height,
        "fit_width": fit_width,
        "padded_height": pixels.shape[1],
        "padded_width": pixels.shape[2],
        "error": None,
    }


def pictures(dataset: ray.data.Dataset) -> Iterator[Pictures]:
    """Iterates a `picture_dataset` block by block."""
    for block in _blocks(dataset):
        yield Pictures.of(block)


def _blocks(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    # Whole Arrow blocks: slicing rows off one by one in Ray Data costs three times as much.
    return cast(Iterator[pa.Table], dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
