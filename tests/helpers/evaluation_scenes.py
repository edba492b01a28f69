"""Random images with objects and detections, and what pycocotools itself makes of them."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_ray.contracts.records import RECORD_SCHEMA, Category, decode_image_id, encode_image_id

CATEGORIES = (Category(2, "disc"), Category(5, "cross"), Category(9, "star"))
HEIGHT, WIDTH = 60, 120


def encode(mask: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """A rectangle from a few pixels to most of the image, so that every size range is met."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    height, width = rng.integers(2, HEIGHT), rng.integers(2, WIDTH)
    top, left = rng.integers(0, HEIGHT - height + 1), rng.integers(0, WIDTH - width + 1)
    mask[top : top + height, left : left + width] = True
    return mask


def random_scenes(
    seed: int,
    image_ids: Sequence[int | str],
    num_objects: int = 8,
    num_detections: int = 20,
    crowds: float = 0.15,
    tied_scores: bool = False,
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Records and COCO results; some images have no object, some no detection, some detections are copies."""
    rng = np.random.default_rng(seed)
    rows, results = [], []
    for image_id in image_ids:
        objects = [
            (random_mask(rng), CATEGORIES[rng.integers(3)].id, bool(rng.random() < crowds))
            for _ in range(0 if rng.random() < 0.15 else rng.integers(1, num_objects + 1))
        ]
        instances = [{"category_id": c, "rle": encode(m), "score": 1.0, "is_crowd": crowd} for m, c, crowd in objects]
        record = {"image_id": encode_image_id(image_id), "uri": f"{image_id}.png", "height": HEIGHT, "width": WIDTH}
        rows.append(record | {"instances": instances})
        for _ in range(0 if rng.random() < 0.1 else num_detections):
            if objects and rng.random() < 0.8:
                mask, category, _ = objects[rng.integers(len(objects))]
                mask = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
                if rng.random() < 0.1:
                    category = CATEGORIES[rng.integers(3)].id
            else:
                mask, category = random_mask(rng), CATEGORIES[rng.integers(3)].id
            score = float(rng.integers(0, 6) / 5) if tied_scores else float(rng.random())
            segmentation = {"size": [HEIGHT, WIDTH], "counts": encode(mask).decode()}
            results.append(
                {"image_id": image_id, "category_id": category, "segmentation": segmentation, "score": score}
            )
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), results


def with_areas(ground_truth: pa.Table, areas: Sequence[float | None], seed: int = 0) -> pa.Table:
    """The records with an annotated area, drawn from `areas`, on each object and crowd."""
    rng = np.random.default_rng(seed)
    rows = ground_truth.to_pylist()
    for row in rows:
        for instance in row["instances"]:
            instance["area"] = areas[int(rng.integers(len(areas)))]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def coco_document(ground_truth: pa.Table, categories: Sequence[Category] = CATEGORIES) -> dict[str, Any]:
    """The records as an instances JSON. Objects without an annotated area get their mask's."""
    images, annotations = [], []
    for row in ground_truth.to_pylist():
        image_id = decode_image_id(row["image_id"])
        images.append({"id": image_id, "height": row["height"], "width": row["width"]})
        for instance in row["instances"]:
            rle = {"size": [row["height"], row["width"]], "counts": instance["rle"].decode()}
            area = instance["area"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": instance["category_id"],
                    "iscrowd": int(instance["is_crowd"]),
                    "segmentation": rle,
                    "area": float(coco_mask.area(rle)) if area is None else area,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                }
            )
    listed = [{"id": c.id, "name": c.name} for c in categories]
    return {"info": {}, "images": images, "annotations": annotations, "categories": listed}


def referee(
    document: dict[str, Any], results: list[dict[str, Any]], max_detections: Sequence[int] = (1, 10, 100)
) -> COCOeval:
    """pycocotools' own evaluation, accumulated. `results` must not be empty."""
    coco = COCO()
    coco.dataset = copy.deepcopy(document)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "segm")
        evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def referee_numbers(evaluation: COCOeval) -> dict[str, float | None]:
    """Its summary under our names, in percent, not rounded."""
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]

    def percent(values: np.ndarray) -> float | None:
        known = values[values > -1]
        return float(np.mean(known) * 100) if known.size else None

    numbers = {"mask_ap": precision[..., 0, -1], "ap50": precision[0, ..., 0, -1], "ap75": precision[5, ..., 0, -1]}
    numbers |= {f"ap_{n}": precision[..., a, -1] for a, n in enumerate(("small", "medium", "large"), 1)}
    numbers |= {"ar_1": recall[..., 0, 0], "ar_10": recall[..., 0, 1], "ar": recall[..., 0, 2]}
    numbers |= {f"ar_{n}": recall[..., a, -1] for a, n in enumerate(("small", "medium", "large"), 1)}
    return {name: percent(values) for name, values in numbers.items()}
