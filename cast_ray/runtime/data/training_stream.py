"""Ray Data streams of training steps.

A stream's dataset is a *plan*: which images every row takes, known before anything runs. In a training stream a row is
one step of one worker; Data tasks read, decode, make both views and collate, and the worker receives whole steps in
plan order. Cycling of the short side, shuffling per epoch, order, equal step counts and resuming at step k are
properties of the plan (`data/sampling.py`), not of the stream: it has no epochs, and no barriers between them.

Record tables live in the object store (one copy a node, shared by all tasks there); images are read by URI when needed;
nothing of the size of the dataset is held in a worker but its indices (8 bytes an image).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray
import ray.data

from cast_ray.contracts.instance import RecordLabel
from cast_ray.contracts.records import Batch, ClassMap
from cast_ray.data.sampling import view_seed, worker_slots
from cast_ray.plan.stage_parts import TrainPart
from cast_ray.recipe import DataConfig, InputSize, RuntimeConfig
from cast_ray.runtime.data.block_source import Rows, block_dataset, iter_blocks
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import Pictures
from cast_ray.runtime.data.record_tables import is_held_here, record_at, table_of
from cast_ray.runtime.data.resources import block_bytes

logger = logging.getLogger(__name__)

MAX_STEPS_PER_TASK = 32
GIVE_UP_S = 20.0
"""How long a stream that nobody reads any more waits for the batch that is being made."""
MAX_TASKS_PER_EXECUTION = 2000
"""Ray Data stores every task's input before it starts the first, 0.8 ms each: 90,000 steps would begin after 70 s."""
BYTES_PER_PIXEL = 10
"""Bytes that one image of a step takes per pixel of its crop: two views, truth maps, some masks as bits."""

T = TypeVar("T")
Drawn = tuple[np.ndarray, dict[str, Any]]
"""An image, uint8 [h, w, 3], and its record."""


class OnlineLabeller(Protocol):
    """Labels unlabelled images as a stream's tasks draw them; `worker/online.py` has it."""

    @property
    def batch(self) -> int:
        """Images of a teacher's forward pass."""
        ...

    @property
    def refresh_steps(self) -> int:
        """Steps that one version of the teacher labels; 0: the teacher stays as it is."""
        ...

    def version_of(self, step: int) -> int:
        """Which version of the teacher labels a step."""
        ...

    def input_size_of(self, version: int) -> InputSize:
        """The size at which a version of the teacher sees whole images."""
        ...

    def label(self, pictures: Pictures, version: int, turn: int) -> list[list[RecordLabel]]:
        """Instances of each image."""
        ...


@dataclass(frozen=True)
class StepShare:
    """Which steps a worker reads, and which part of each.

    batch_labelled, batch_unlabelled: images of D_l and D_u in a step of all workers; steps, start_step: the worker
    reads steps start_step..steps-1; seed: of the order of the images and of their views; rank: of this worker of
    world_size.
    """

    batch_labelled: int
    batch_unlabelled: int
    steps: int
    seed: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class SampleRules:
    """What the losses of a stage need of each image.

    strong: whether L_pxl reads the strong view, and with it the truth maps; oracle: give the hidden ground truth of D_u
    to the samplers (never to the set loss); strong_unlabelled: whether L_semi reads the strong view of D_u; copy_paste:
    probability that an image gets instances of a random one of D_l pasted over it.
    """

    strong: bool
    oracle: bool = False
    strong_unlabelled: bool = False
    copy_paste: float = 0.0

    @classmethod
    def of(cls, part: TrainPart) -> SampleRules:
        """Returns the rules of a train stage."""
        contrastive = part.contrastive
        return cls(
            strong=contrastive is not None,
            oracle=contrastive is not None and contrastive.sampler == "oracle",
            strong_unlabelled=part.is_semi_strong,
            copy_paste=part.copy_paste,
        )


@dataclass(frozen=True)
class StepSchedule:
    """What the tasks of one worker's training stream share: its sampling plan and how samples are made.

    labelled, unlabelled: int64 [steps, share], positions in D_l and D_u; first_step: step of their first row;
    first_slots: place of the worker's share in the global batch; rules: see `SampleRules`; online: who labels D_u as it
    is drawn.
    """

    images: Images
    data: DataConfig
    seed: int
    labelled: np.ndarray
    unlabelled: np.ndarray
    first_step: int
    first_slots: tuple[int, int]
    rules: SampleRules
    online: OnlineLabeller | None

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
    share: StepShare,
    rules: SampleRules,
    *,
    online: OnlineLabeller | None = None,
    device: Any = None,
) -> Iterator[Batch]:
    """Yields this worker's batches of steps start_step..steps-1, in order.

    Where this process holds the records itself, it makes the batches itself, each when it is asked for: in one thread,
    so that a breakpoint in a view or a label stops there. They are the same batches.

    Args:
        images: D_l, D_u and pseudo-labels.
        data: crop size and view settings.
        share: the steps, and the worker's part of each.
        rules: what the losses need of each image.
        online: who labels D_u as it is drawn; None: `images.labels`, or nobody.
        device: torch device of the batches; None: the CPU.
    """
    if share.start_step >= share.steps:
        return
    plan = _schedule(images, data, share, rules, online)
    labelled, unlabelled = plan.labelled, plan.unlabelled
    step_bytes = (labelled.shape[1] + unlabelled.shape[1]) * _sample_pixels(images, data) * BYTES_PER_PIXEL
    max_size = max(1, min(block_bytes(runtime) // step_bytes, MAX_STEPS_PER_TASK))
    blocks = step_blocks(share.start_step, share.steps, max_size, online.refresh_steps if online is not None else 0)
    make, finish = partial(_make_steps, plan=plan), partial(_to_batch, device=device)
    if is_held_here(images.records):
        yield from map(finish, _payloads(make(*rows) for rows in blocks))
        return
    stored = ray.put(make)
    parts = [blocks[i : i + MAX_TASKS_PER_EXECUTION] for i in range(0, len(blocks), MAX_TASKS_PER_EXECUTION)]
    tables = (table for part in parts for table in iter_blocks(block_dataset(part, stored, runtime)))
    yield from _ahead(finish, _payloads(tables))


def _schedule(
    images: Images, data: DataConfig, share: StepShare, rules: SampleRules, online: OnlineLabeller | None
) -> StepSchedule:
    """The worker's sampling plan."""
    slots = partial(
        worker_slots,
        start_step=share.start_step,
        stop_step=share.steps,
        seed=share.seed,
        rank=share.rank,
        world_size=share.world_size,
    )
    labelled = slots(len(images.labelled), share.batch_labelled)
    unlabelled = slots(len(images.unlabelled), share.batch_unlabelled)
    first_slots = (share.rank * labelled.shape[1], share.batch_labelled + share.rank * unlabelled.shape[1])
    return StepSchedule(images, data, share.seed, labelled, unlabelled, share.start_step, first_slots, rules, online)


def _sample_pixels(images: Images, data: DataConfig) -> int:
    """Pixels of one sample: of a crop, or of the largest labelled image where whole ones are trained on."""
    if not data.whole_images:
        return data.image_px[0] * data.image_px[1]
    table = table_of(images.records)
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


def _payloads(tables: Iterable[pa.Table]) -> Generator[pa.Buffer]:
    for block in tables:
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
        # for its next step (see `worker/online.py`).
        is_idle = bool(wait([following], timeout=GIVE_UP_S).done)
        pool.shutdown(wait=is_idle, cancel_futures=True)
        if is_idle:
            items.close()
        else:
            logger.info("a stream was given up: its next batch did not come within %g s", GIVE_UP_S)


def _make_steps(start: int, stop: int, *, plan: StepSchedule) -> pa.Table:
    """Rows of the plan -> collated steps, one buffer a row. Runs in a Data task."""
    from cast_ray.data.batches import collate, to_buffer

    classes = ClassMap(plan.images.categories)
    payloads = []
    for rows in plan.groups(start, stop):
        # A teacher that labels as images are drawn sees the whole of them, everything else only its crop.
        whole = plan.online is not None
        unlabelled = {
            row: [
                _read(plan, position, False, None if whole else _seed_of(plan, row, i, False))
                for i, position in enumerate(plan.unlabelled[row])
            ]
            for row in rows
        }
        if plan.online is not None:
            _label_online(plan, plan.online, rows, [drawn for row in rows for drawn in unlabelled[row]])
        for row in rows:
            labelled = [
                _read(plan, position, True, _seed_of(plan, row, i, True))
                for i, position in enumerate(plan.labelled[row])
            ]
            samples = [_sample(plan, classes, row, i, drawn, True) for i, drawn in enumerate(labelled)]
            samples += [_sample(plan, classes, row, i, drawn, False) for i, drawn in enumerate(unlabelled[row])]
            payloads.append(to_buffer(collate(samples, len(labelled))))
    return pa.table({"step": np.arange(start, stop) + plan.first_step, "batch": _binary(payloads)})


def _seed_of(plan: StepSchedule, row: int, i: int, is_labelled: bool) -> int:
    """Seed of the views of the i-th image of D_l or D_u in a row of the plan."""
    return view_seed(plan.seed, plan.first_step + row, plan.first_slots[0 if is_labelled else 1] + i)


def _read(plan: StepSchedule, position: int, is_labelled: bool, seed: int | None) -> Drawn:
    """A record and its pixels: those that `make_sample` looks at with a seed, or all of them where there is none."""
    from cast_ray.data.reading.images import read_image
    from cast_ray.data.views import window_of

    images = plan.images
    record = record_at(images.records, (images.labelled if is_labelled else images.unlabelled)[position])
    if not is_labelled:
        record["truth_instances"] = record["instances"]
        record["instances"] = [] if images.labels is None else record_at(images.labels, position)["instances"]
    window = None if seed is None else window_of(record, plan.data, seed)
    return read_image(record["uri"], (record["height"], record["width"]), window=window), record


def _label_online(plan: StepSchedule, online: OnlineLabeller, rows: range, drawn: list[Drawn]) -> None:
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
    plan: StepSchedule, classes: ClassMap, row: int, i: int, drawn: Drawn, is_labelled: bool
) -> dict[str, np.ndarray]:
    from cast_ray.data.copy_paste import copy_paste
    from cast_ray.data.views import MIN_VISIBLE_PX, make_sample

    seed = _seed_of(plan, row, i, is_labelled)
    use_instances = is_labelled or plan.has_labels
    rules = plan.rules
    truth = rules.strong and (is_labelled or rules.oracle)
    strong = rules.strong or (rules.strong_unlabelled and not is_labelled)
    sample = make_sample(*drawn, classes, plan.data, seed, use_instances=use_instances, truth=truth, strong=strong)
    if not (use_instances and rules.copy_paste):
        return sample
    rng = np.random.default_rng([seed, 1])  # of its own: the views are those of a plan without
    if rng.random() >= rules.copy_paste:
        return sample
    # From all of D_l, and not from the step's: what one worker holds of it depends on how many there are.
    position, its_seed = int(rng.integers(len(plan.images.labelled))), int(rng.integers(2**63))
    other = _read(plan, position, True, its_seed)
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
