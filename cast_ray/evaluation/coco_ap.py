"""COCO mask AP by pycocotools, straight from records."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_ray.records import Category, decode_image_id

AREAS = ("all", "small", "medium", "large")


def mask_ap(
    ground_truth: pa.Table,
    results: Sequence[dict[str, Any]],
    categories: Sequence[Category],
    max_detections: int = 100,
) -> dict[str, Any]:
    """COCO mask AP: precision averaged over recall, IoU thresholds .50-.95 and classes, in percent.

    Every image of `ground_truth` counts, also those without an object; detections on crowd regions are ignored.
    Detections are ranked by their `score` within each class.

    Args:
        ground_truth: RECORD_SCHEMA.
        results: COCO results: image_id and category_id as in the dataset, segmentation {"size", "counts"}, score.
        categories: the dataset's classes.
        max_detections: counted per image and class, highest scores first.

    Returns:
        mask_ap, ap50, ap75, ap_small, ap_medium, ap_large (percent, None where no object to find exists), per_class
        (name -> AP, percent or None), num_images, num_detections.

    Raises:
        ValueError: a score that is not finite, an image or category id that the ground truth does not have, or a mask
            whose size is not its image's.

    Source: pycocotools' COCOeval. Deviations: none in the measure; ids are renumbered inside, so that string and mixed
    image ids work.
    """
    columns = ground_truth.select(["image_id", "height", "width", "instances"]).to_pylist()
    number = {decode_image_id(row["image_id"]): i for i, row in enumerate(columns, 1)}
    sizes = [(row["height"], row["width"]) for row in columns]
    truth = _coco(columns, categories)
    detections = _checked(results, number, sizes, {c.id for c in categories})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if detections:
            found = truth.loadRes(detections)
        else:  # loadRes refuses an empty list
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "segm")
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision_TRKA = evaluation.eval["precision"][..., 0]
    thresholds = evaluation.params.iouThrs
    order = list(evaluation.params.catIds)
    per_class = {c.name: _mean_percent(precision_TRKA[:, :, order.index(c.id), 0]) for c in categories}
    by_area = {area: _mean_percent(precision_TRKA[..., i]) for i, area in enumerate(AREAS)}
    return {
        "mask_ap": by_area["all"],
        "ap50": _mean_percent(precision_TRKA[np.isclose(thresholds, 0.5)][..., 0]),
        "ap75": _mean_percent(precision_TRKA[np.isclose(thresholds, 0.75)][..., 0]),
        "ap_small": by_area["small"],
        "ap_medium": by_area["medium"],
        "ap_large": by_area["large"],
        "per_class": per_class,
        "num_images": len(columns),
        "num_detections": len(detections),
    }


def _coco(rows: list[dict[str, Any]], categories: Sequence[Category]) -> COCO:
    """A COCO object of the records; image ids are row numbers from 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_number, row in enumerate(rows, 1):
        images.append({"id": image_number, "height": row["height"], "width": row["width"]})
        for instance in row["instances"]:
            rle = {"size": [row["height"], row["width"]], "counts": instance["rle"]}
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes a match with annotation 0 for no match
                    "image_id": image_number,
                    "category_id": instance["category_id"],
                    "segmentation": rle,
                    "area": float(coco_mask.area(rle)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": int(instance["is_crowd"]),
                }
            )
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name} for c in categories],
    }
    return coco


def _checked(
    results: Sequence[dict[str, Any]],
    number: dict[int | str, int],
    sizes: list[tuple[int, int]],
    category_ids: set[int],
) -> list[dict[str, Any]]:
    detections = []
    for i, result in enumerate(results):
        image_id, score = result["image_id"], result["score"]
        if not math.isfinite(score):
            raise ValueError(f"results[{i}].score is {score} (image {image_id!r}): expected a finite number")
        if image_id not in number:
            raise ValueError(f"results[{i}].image_id is {image_id!r}: not an image of the ground truth")
        if result["category_id"] not in category_ids:
            raise ValueError(
                f"results[{i}].category_id is {result['category_id']!r}: expected one of {sorted(category_ids)[:12]}"
            )
        segmentation, expected = result["segmentation"], sizes[number[image_id] - 1]
        if tuple(segmentation["size"]) != expected:
            raise ValueError(
                f"results[{i}].segmentation.size is {list(segmentation['size'])} (image {image_id!r}): "
                f"expected {list(expected)}"
            )
        detections.append(
            {
                "image_id": number[image_id],
                "category_id": result["category_id"],
                "segmentation": {"size": list(expected), "counts": segmentation["counts"]},
                "score": float(score),
            }
        )
    return detections


def _mean_percent(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]  # -1: a class without objects in this area range
    return float(known.mean() * 100) if known.size else None
