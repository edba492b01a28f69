"""What moves between stages: Arrow schemas on disk and on the wire, tensor batches inside a worker.

Shape legend: B images of a step, N instances, C classes (without no-object), Q queries, H W crop
pixels, h w feature-map pixels, D channels. Masks cross processes as COCO RLE (records) or bit-packed
at crop size (one training batch); dense masks exist only inside a worker.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import RecordInstance, Rle

if TYPE_CHECKING:
    import torch

INSTANCE_TYPE = pa.struct(
    [
        ("category_id", pa.int64()),  # the dataset's own id, gaps and all
        ("rle", pa.binary()),  # COCO compressed RLE counts at the image's own height x width
        ("score", pa.float32()),  # 1 for ground truth, the teacher's score for pseudo-labels
        ("is_crowd", pa.bool_()),  # an ignore region, never an instance
        ("area", pa.float64()),  # as the annotation file gives it, pixels; null: it gives none, see `object_areas`
    ]
)

RECORD_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),  # JSON of the dataset's own id: `17` or `"a17"`; see image_id_of
        ("uri", pa.string()),  # where the image bytes are: local path or any pyarrow.fs URI
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("instances", pa.list_(INSTANCE_TYPE)),  # null: nobody knows (an image of the extra unlabelled pool)
    ]
)


MAX_CHUNK_BYTES = 1 << 30
"""Most bytes of one chunk of a record table.

Its RLEs have offsets of 32 bits, as in the files of earlier versions, so that Arrow cannot join or take rows across
2 GiB of them.
"""


def pieces_of(table: pa.Table, max_bytes: int | None = None) -> Iterator[pa.Table]:
    """Cuts a table of records into pieces of one chunk each, in order; an empty table is one piece.

    Args:
        max_bytes: of a piece that was joined from several chunks; default: MAX_CHUNK_BYTES. A larger chunk stays whole.
    """
    if not table.num_rows:
        yield table
    limit, size = max_bytes or MAX_CHUNK_BYTES, 0
    pending: list[pa.RecordBatch] = []
    for batch in table.to_batches():
        if pending and size + batch.nbytes > limit:
            yield pa.Table.from_batches(pending).combine_chunks()
            pending, size = [], 0
        pending.append(batch)
        size += batch.nbytes
    if pending and table.num_rows:
        yield pa.Table.from_batches(pending).combine_chunks()


def instance_rows(instances: pa.ChunkedArray) -> np.ndarray:
    """Row of the table that each instance of its column belongs to, int64 [N], in order."""
    counts = pa.compute.fill_null(pa.compute.list_value_length(instances), 0).to_numpy()
    return np.repeat(np.arange(len(instances)), counts)


def take_rows(table: pa.Table, rows: Sequence[int] | np.ndarray) -> pa.Table:
    """Rows of a table of records in the order asked for, as `Table.take` gives them, from a table of any size."""
    wanted, batches = np.asarray(rows, dtype=np.int64), table.to_batches()
    ends = np.cumsum([batch.num_rows for batch in batches])
    chunk = np.searchsorted(ends, wanted, side="right")
    runs = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(chunk)) + 1)
    parts = []
    for run in (run for run in runs if len(run)):
        batch = batches[chunk[run[0]]]
        first = ends[chunk[run[0]]] - batch.num_rows
        parts.append(pa.Table.from_batches([batch.take(pa.array(wanted[run] - first))]))
    return pa.concat_tables(parts) if parts else table.slice(0, 0)


_MOST_RLES = 255  # pycocotools 2.0.11 counts the masks of one `area` call in 8 bits


def rle_runs(counts: bytes) -> np.ndarray:
    """Run lengths of COCO compressed RLE counts, background first: int64 [n].

    5 bits a character, lowest first; from the third run on relative to the one two before. The counts must be whole,
    as those of records are (`data/formats/segmentations.py` checks the ones that nobody vouches for).
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = (codes[ends] & 16) > 0
    runs[negative] -= np.int64(1) << (5 * lengths[negative])
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def mask_areas(rles: Sequence[Rle]) -> np.ndarray:
    """Pixels of each mask: float64 [n].

    Args:
        rles: COCO RLEs, {"size", "counts"}, any number of them.
    """
    starts = range(0, len(rles), _MOST_RLES)
    return np.concatenate([np.zeros(0), *(coco_mask.area(list(rles[i : i + _MOST_RLES])) for i in starts)])


def object_areas(annotated: Sequence[float | None], masks: np.ndarray) -> np.ndarray:
    """Areas by which objects and crowds are small, medium or large, pixels: float64 [n].

    This is the annotation's `area`, as pycocotools has it, and the mask's where the annotation file gives none.

    Args:
        annotated: `area` of INSTANCE_TYPE.
        masks: their masks' areas, see `mask_areas`.
    """
    given = np.array(annotated, dtype=np.float64)  # None becomes nan
    return np.where(np.isnan(given), masks, given)


def encode_image_id(original: int | str) -> str:
    """The record form of a dataset's own image id (ids may be integers or strings)."""
    return json.dumps(original)


def decode_image_id(encoded: str) -> int | str:
    """The dataset's own image id, inverse of `encode_image_id`."""
    return json.loads(encoded)


@dataclass(frozen=True)
class Category:
    """One class: the dataset's own id and its name."""

    id: int
    name: str


def class_names(categories: Sequence[Category]) -> list[str]:
    """Names of classes as they are shown and as results are kept by name: each is there once.

    Annotation files may hold several categories of one name, which are different classes. Each of those also gets its
    id: `fish (id 1)` and `fish (id 9)`.
    """
    names = [c.name for c in categories]
    for _ in categories:  # once is enough, unless another category is really called `fish (id 9)`
        count = Counter(names)
        if len(count) == len(names):
            break
        names = [f"{n} (id {c.id})" if count[n] > 1 else n for n, c in zip(names, categories)]
    return names


class ClassMap:
    """Maps a dataset's category ids to contiguous labels 0..C-1 and back (the only owner of that mapping)."""

    def __init__(self, categories: Sequence[Category]):
        self.categories = tuple(categories)
        self.ids = np.array([c.id for c in self.categories], dtype=np.int64)
        self._label = {c.id: i for i, c in enumerate(self.categories)}

    def __len__(self) -> int:
        return len(self.categories)

    def __contains__(self, category_id: int) -> bool:
        """Whether a category is in the class list; ignore regions of others matter to evaluation only."""
        return category_id in self._label

    def label(self, category_id: int) -> int:
        """Label in 0..C-1 of a category id. Raises KeyError for an id outside the class list."""
        return self._label[category_id]

    def names(self) -> list[str]:
        """C names, each once: see `class_names`."""
        return class_names(self.categories)


@dataclass(frozen=True)
class DatasetSplits:
    """A dataset as read from disk, before any label is hidden.

    train, val, source, extra: RECORD_SCHEMA; `source` is the other style a teacher is pre-trained on, `extra` more
    unlabelled images, when the dataset has them. `content_hash` identifies images and annotations and enters every
    stage fingerprint, `extra_hash` those of the extra pool. skipped: what was left out, each with split, kind, id, file
    and reason. annotated: see `label_lists`.
    """

    train: pa.Table
    val: pa.Table
    source: pa.Table | None
    categories: tuple[Category, ...]
    content_hash: str
    skipped: tuple[dict[str, str], ...] = ()
    extra: pa.Table | None = None
    extra_hash: str = ""
    annotated: tuple[str, ...] | None = None


@dataclass
class Targets:
    """Targets of one image at crop size.

    masks: bool [N, H, W]; labels: int64 [N] in 0..C-1; weights: float32 [N], 1 for ground truth, the teacher's
    score for pseudo-labels; ignore: bool [H, W] pixels excluded from the mask losses, or None.
    Of soft pseudo-labels what the teacher believed, else None: class_probs: float32 [N, C+1], no-object last;
    mask_probs: uint8 [N, H/4, W/4], 255 for probability 1.
    """

    masks: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    ignore: torch.Tensor | None = None
    class_probs: torch.Tensor | None = None
    mask_probs: torch.Tensor | None = None


@dataclass
class Batch:
    """One optimiser step of one worker: first `num_labelled` images from D_l, the rest from D_u.

    weak, strong: uint8 [B, 3, H, W], equal geometry; valid: bool [B, H, W], False on padding.
    truth_instance: int16 [B, H, W]: 0 background, 1.. instance of that image, -1 unknown (D_u unless the recipe
    asks for an oracle). truth_class: int16 [B, H, W] label in 0..C-1, C for background, -1 unknown.
    """

    weak: torch.Tensor
    strong: torch.Tensor
    valid: torch.Tensor
    targets: list[Targets]
    num_labelled: int
    truth_instance: torch.Tensor
    truth_class: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        def moved(target: Targets) -> Targets:
            return Targets(*(None if t is None else move(t) for t in vars(target).values()))  # type: ignore[arg-type]

        return Batch(
            weak=move(self.weak),
            strong=move(self.strong),
            valid=move(self.valid),
            targets=[moved(target) for target in self.targets],
            num_labelled=self.num_labelled,
            truth_instance=move(self.truth_instance),
            truth_class=move(self.truth_class),
        )


@dataclass
class Predictions:
    """What a segmenter returns for a batch of images.

    class_logits: L tensors [B, Q, C+1] (last class: no-object); mask_logits: L tensors [B, Q, H/4, W/4];
    one per decoder layer, the final one last. features: stride -> [B, D, h, w] of the encoder, for the projector.
    auxiliary: extra outputs a model's own auxiliary loss needs (dense proposals).
    """

    class_logits: list[torch.Tensor]
    mask_logits: list[torch.Tensor]
    features: dict[int, torch.Tensor]
    auxiliary: dict[str, torch.Tensor]

    def part(self, start: int, stop: int) -> Predictions:
        """The images start..stop-1 of the batch, as views."""
        return Predictions(
            class_logits=[t[start:stop] for t in self.class_logits],
            mask_logits=[t[start:stop] for t in self.mask_logits],
            features={stride: t[start:stop] for stride, t in self.features.items()},
            auxiliary={name: t[start:stop] for name, t in self.auxiliary.items()},
        )

    def joined(self, other: Predictions) -> Predictions:
        """The images of this batch and then those of another, without feature maps."""
        import torch

        return Predictions(
            class_logits=[torch.cat(pair) for pair in zip(self.class_logits, other.class_logits)],
            mask_logits=[torch.cat(pair) for pair in zip(self.mask_logits, other.mask_logits)],
            features={},
            auxiliary={name: torch.cat([t, other.auxiliary[name]]) for name, t in self.auxiliary.items()},
        )


def instances_of(row: dict[str, Any]) -> list[RecordInstance]:
    """The non-crowd instances of one record row."""
    return [i for i in row["instances"] if not i["is_crowd"]]
