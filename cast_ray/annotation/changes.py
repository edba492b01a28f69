"""What a person changed: the objects that were exported against those that came back, image by image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from cast_ray.annotation.exported import ExportedImage, ExportedObject
from cast_ray.annotation.returned import ReturnedObject

MATCH_IOU = 0.25
"""Least IoU of an exported object and one that came back, to be the same object: a person may have added more than half
of it. Where several objects fit, the pairs are chosen together."""
UNCHANGED_IOU = 0.995
"""Least IoU of a mask that nobody has edited: tools round coordinates, which moves a few pixels of a large object."""
WITHIN_A_PIXEL = "with an outline within 1 pixel"
"""A mask whose every pixel that differs touches the outline of the other: what converting it to polygons does, as
supervision and datumaro do it, or a fine correction. The mask that came back is taken."""
KINDS = (
    *("unchanged", WITHIN_A_PIXEL, "with a changed mask", "of a changed class", "of a changed mask and class"),
    *("added", "deleted"),
)
_SAME_CLASS = 1e-3
"""What an equal class is worth beside IoU, where objects lie over each other."""


class Kept(NamedTuple):
    """An object that came back. before: what it was when it was exported; None: a person has added it.

    rle: its mask, COCO compressed counts. Of an unedited mask this is the one of the label file, without what a
    conversion to polygons has lost.
    """

    before: ExportedObject | None
    class_name: str
    rle: bytes


def compare(
    image: ExportedImage, objects: Sequence[ReturnedObject], names: Mapping[int, str]
) -> tuple[list[Kept], Counter[str]]:
    """Pairs the objects of an image so that the sum of their IoUs is largest, and counts what happened to them.

    Args:
        image: as it was exported.
        objects: that came back.
        names: category id -> name of the class in the tool.

    Returns:
        The objects that came back, those that were exported first and in their order; and how many there are of each
        of KINDS.
    """
    counts, kept, taken = Counter[str](), list[Kept](), set[int]()
    for before, place in zip(image.objects, _pairs(image, objects, names)):
        if place is None:
            counts["deleted"] += 1
            continue
        taken.add(place)
        after = objects[place]
        is_same_mask = _ious(image, [before.shown], [after.rle])[0, 0] >= UNCHANGED_IOU
        is_same_class = after.class_name == names[before.category_id]
        counts[_kind(is_same_mask or _is_close(image, before.shown, after.rle), is_same_mask, is_same_class)] += 1
        kept.append(Kept(before, after.class_name, before.rle if is_same_mask else after.rle))
    added = [Kept(None, each.class_name, each.rle) for place, each in enumerate(objects) if place not in taken]
    counts["added"] += len(added)
    return kept + added, counts


def _kind(is_close: bool, is_same_mask: bool, is_same_class: bool) -> str:
    if is_same_class:
        return "unchanged" if is_same_mask else WITHIN_A_PIXEL if is_close else "with a changed mask"
    return "of a changed class" if is_close else "of a changed mask and class"


def _is_close(image: ExportedImage, one: bytes, other: bytes) -> bool:
    """Whether two masks differ only in pixels that touch the outline of the first, its corners included."""
    size = [image.height, image.width]
    first, second = (coco_mask.decode({"size": size, "counts": counts}) for counts in (one, other))
    border = np.ones((3, 3), np.uint8)
    inner, outer = cv2.erode(first, border, borderValue=1), cv2.dilate(first, border)
    return bool((inner <= second).all() and (second <= outer).all())


def _pairs(image: ExportedImage, objects: Sequence[ReturnedObject], names: Mapping[int, str]) -> list[int | None]:
    """Place among `objects` of each exported object; None: it did not come back."""
    found: list[int | None] = [None] * len(image.objects)
    if not image.objects or not objects:
        return found
    ious = _ious(image, [each.shown for each in image.objects], [each.rle for each in objects])
    same = np.array([[names[a.category_id] == b.class_name for b in objects] for a in image.objects])
    worth = np.where(ious >= MATCH_IOU, ious + _SAME_CLASS * same, 0)
    for row, column in zip(*linear_sum_assignment(worth, maximize=True)):
        if worth[row, column]:
            found[row] = int(column)
    return found


def _ious(image: ExportedImage, ones: Sequence[bytes], others: Sequence[bytes]) -> np.ndarray:
    size = [image.height, image.width]
    rles = [[{"size": size, "counts": counts} for counts in each] for each in (ones, others)]
    return np.asarray(coco_mask.iou(rles[0], rles[1], [0] * len(others)))
