"""An instance as models, teachers and pseudo-labels hand it on: plain dictionaries with typed keys.

They stay dictionaries because they travel to Arrow, to JSON and between processes as they are.

    Instance      what a model or a teacher finds on one image: a class label, a score and a mask
    PseudoLabel   an instance that is trusted as a label
    RecordInstance, RecordLabel   the same in a record table, by category id, see `records.INSTANCE_TYPE`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

SCORE_THRESHOLD = 0.3
"""Least score of an instance that `predict` and `label` keep, if they are not told another one."""


class Rle(TypedDict):
    """A mask as pycocotools takes it: `size` is [height, width] in pixels, `counts` the compressed run lengths."""

    size: Sequence[int]
    counts: bytes


class Instance(TypedDict):
    """What a model or a teacher finds.

    label: 0..C-1. score: 0..1. rle: COCO compressed counts of the mask, whose `size` is [height, width] in pixels.
    mask_quality: mean mask probability inside the mask, or the IoU that the teacher predicts, 0..1. box: of teachers
    that look for boxes, (x0, y0, x1, y1) in pixels of the image. Where beliefs are asked for, class_probs: C+1
    probabilities of the query, no-object last, and mask_probs: see `soft_targets.mask_probabilities`.
    """

    label: int
    score: float
    rle: bytes
    size: list[int]
    mask_quality: NotRequired[float]
    box: NotRequired[list[float]]
    class_probs: NotRequired[list[float]]
    mask_probs: NotRequired[bytes]


Instances = list[Instance]
"""The instances of one image."""


class SourcedInstance(Instance):
    """One of several answers about an image; source: number of the answer, from 0."""

    source: int


class PseudoLabel(Instance):
    """An instance that is trusted as a label.

    num_suppressed: predictions of its class that it suppressed. visible_share: part of its mask that it keeps after
    painting, 0..1; missing until it is painted.
    """

    num_suppressed: int
    visible_share: NotRequired[float]


class RecordInstance(TypedDict):
    """An instance of a record table, see `records.INSTANCE_TYPE`: `category_id` is the dataset's own id.

    score: 1 for ground truth. is_crowd: an ignore region. area: as the annotation gives it, pixels; None: it gives
    none. The size of the mask is the record's.
    """

    category_id: int
    rle: bytes
    score: float
    is_crowd: bool
    area: float | None


class RecordLabel(RecordInstance):
    """A pseudo-label of a label table; None stands for what is not known, see `PseudoLabel`."""

    visible_share: float | None
    num_suppressed: int
    class_probs: list[float] | None
    mask_probs: bytes | None


def rle_of(instance: Instance) -> Rle:
    """Returns an instance's mask as pycocotools takes it."""
    return {"size": list(instance["size"]), "counts": instance["rle"]}
