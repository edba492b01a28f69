"""An evaluate stage: predictions of a trained model as COCO results, and their mask AP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cast_ray.records import Category, decode_image_id
from cast_ray.teachers.protocol import Teacher


def coco_results(
    teacher: Teacher,
    images: torch.Tensor,
    image_ids: Sequence[str],
    image_hw: Sequence[tuple[int, int]],
    resized_hw: Sequence[tuple[int, int]],
    categories: Sequence[Category],
    max_detections: int,
) -> list[dict[str, Any]]:
    """Detections of a batch in COCO results form, with the dataset's own image and category ids.

    Args:
        teacher: a teacher, or a student as one.
        images: uint8 [B, 3, H, W], fitted to `image_px`.
        image_ids: B record ids (JSON of the dataset's own).
        image_hw, resized_hw: B original sizes and sizes inside the padding, pixels.

    Returns:
        One dict a detection: image_id, category_id, segmentation (RLE at the image's own size), score.
    """
    found = teacher.predict(images, image_hw, resized_hw, max_detections)
    return [
        {
            "image_id": decode_image_id(image_id),
            "category_id": categories[i["label"]].id,
            "segmentation": {"size": list(i["size"]), "counts": i["rle"].decode()},
            "score": i["score"],
        }
        for image_id, instances in zip(image_ids, found)
        for i in instances
    ]
