"""Detections and ground truth of one image, as the matchers read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, Rle, rle_of
from cast_ray.contracts.records import Category, ClassMap, decode_image_id, mask_areas, object_areas

VOID_LABEL = -1
"""Label of an ignore region that belongs to no class."""


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found on one image: labels int64 [D], scores float64 [D], D RLEs ({"size", "counts"})."""

    labels: np.ndarray
    scores: np.ndarray
    rles: list[Rle]

    @classmethod
    def of(cls, instances: Sequence[Instance]) -> Detections:
        """Reads instances as a teacher or `to_instances` gives them."""
        return cls(
            np.array([i["label"] for i in instances], dtype=np.int64),
            np.array([i["score"] for i in instances], dtype=np.float64),
            [rle_of(i) for i in instances],
        )


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth of one image: labels int64 [G], crowd bool [G], G RLEs.

    mask_areas: float64 [G], pixels of the masks; areas: float64 [G], those by which objects are small, medium or large
    (see `object_areas`).
    """

    labels: np.ndarray
    crowd: np.ndarray
    mask_areas: np.ndarray
    areas: np.ndarray
    rles: list[Rle]

    @classmethod
    def of(cls, row: dict[str, Any], classes: ClassMap) -> Truth:
        """Reads the instances and ignore regions of a record; instances of other classes are left out."""
        labels, crowd, annotated = [], [], []
        rles: list[Rle] = []
        for instance in row["instances"]:
            try:
                label = classes.label(instance["category_id"])
            except KeyError:
                if not instance["is_crowd"]:
                    continue
                label = VOID_LABEL
            labels.append(label)
            crowd.append(instance["is_crowd"])
            annotated.append(instance.get("area"))  # records of older versions have none
            rles.append({"size": [row["height"], row["width"]], "counts": instance["rle"]})
        masks = mask_areas(rles)
        return cls(
            np.array(labels, dtype=np.int64), np.array(crowd, dtype=bool), masks, object_areas(annotated, masks), rles
        )


def overlaps(detections: Detections, truth: Truth) -> np.ndarray:
    """IoU of all pairs, with a crowd the share of the detection inside it: float64 [D, G]."""
    if not detections.rles or not truth.rles:
        return np.zeros((len(detections.rles), len(truth.rles)))
    return coco_mask.iou(detections.rles, truth.rles, truth.crowd.astype(np.uint8))


def intersections(detections: Detections, detection_areas: np.ndarray, rles: list[Rle]) -> np.ndarray:
    """Common pixels of all pairs: float64 [D, G], whole numbers."""
    if not detections.rles or not rles:
        return np.zeros((len(detections.rles), len(rles)))
    shares = coco_mask.iou(detections.rles, rles, np.ones(len(rles), dtype=np.uint8))
    return np.rint(shares * detection_areas[:, None])


def by_image(
    ground_truth: pa.Table, results: Sequence[dict[str, Any]], categories: Sequence[Category]
) -> list[Detections]:
    """COCO results, grouped by the rows of `ground_truth`.

    Raises:
        ValueError: a score that is not finite, an image or category id that the ground truth does not have, or a mask
            whose size is not its image's.
    """
    ids = [decode_image_id(i) for i in ground_truth.column("image_id").to_pylist()]
    number = {image_id: row for row, image_id in enumerate(ids)}
    sizes = list(zip(ground_truth.column("height").to_pylist(), ground_truth.column("width").to_pylist()))
    label_of = {c.id: label for label, c in enumerate(categories)}
    grouped: list[tuple[list[int], list[float], list[Rle]]] = [([], [], []) for _ in ids]
    for i, result in enumerate(results):
        image_id, score, segmentation = result["image_id"], result["score"], result["segmentation"]
        row, label = number.get(image_id), label_of.get(result["category_id"])
        if not math.isfinite(score):
            raise ValueError(f"results[{i}].score is {score} (image {image_id!r}): expected a finite number")
        if row is None:
            raise ValueError(f"results[{i}].image_id is {image_id!r}: not an image of the ground truth")
        if label is None:
            raise ValueError(
                f"results[{i}].category_id is {result['category_id']!r}: expected one of {sorted(label_of)[:12]}"
            )
        if tuple(segmentation["size"]) != sizes[row]:
            raise ValueError(
                f"results[{i}].segmentation.size is {list(segmentation['size'])} (image {image_id!r}): "
                f"expected {list(sizes[row])}"
            )
        labels, scores, rles = grouped[row]
        labels.append(label)
        scores.append(score)
        rles.append(segmentation)
    return [
        Detections(np.array(labels, dtype=np.int64), np.array(scores, dtype=np.float64), rles)
        for labels, scores, rles in grouped
    ]


def tie_order(image_ids: Sequence[str]) -> np.ndarray:
    """Place of each image where scores are equal: int64 [I]. pycocotools takes images in the order of their ids."""
    ids = [decode_image_id(i) for i in image_ids]
    order = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))
    place = np.empty(len(ids), dtype=np.int64)
    place[order] = np.arange(len(ids))
    return place
