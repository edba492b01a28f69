"""An evaluate stage: predictions of a trained model, and the same as COCO results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cast_ray.engine.memory import estimate_inference_memory
from cast_ray.models.postprocess import predict_in_groups
from cast_ray.recipe import ModelConfig, Recipe
from cast_ray.contracts.records import Category, decode_image_id
from cast_ray.plan.cost import seen_size
from cast_ray.plan.graph import Stage
from cast_ray.teachers.protocol import Teacher


def predict(
    teacher: Teacher,
    images: Sequence[np.ndarray],
    image_hw: Sequence[tuple[int, int]],
    resized_hw: Sequence[tuple[int, int]],
    max_detections: int,
    batch: int,
) -> list[list[dict[str, Any]]]:
    """Instances of each image at its own size, as from `Teacher.predict`, with scores in single precision.

    A score is single precision wherever it goes, so that the results file and what is stored of the matches rank alike.

    Args:
        teacher: a teacher, or a student as one.
        images: B of uint8 [3, H, W], at the teacher's `input_size`.
        image_hw, resized_hw: B original sizes and sizes inside the padding, pixels.
        batch: most images of one forward pass; only images of one size pass together.
    """
    found = predict_in_groups(teacher.predict, images, image_hw, resized_hw, max_detections, batch)
    return [[i | {"score": float(np.float32(i["score"]))} for i in instances] for instances in found]


def inference_memory(
    stage: Stage, recipe: Recipe, model: dict[str, Any] | None, num_classes: int, image_hw: tuple[int, int] | None
) -> int | None:
    """What one worker of a label or evaluate stage needs, for a plan; see `estimate_inference_memory`.

    Args:
        model: part of the recipe that the stage's model is made of; None: unknown.
        num_classes: C.
        image_hw: height and width of a typical image of the dataset; None: unknown.

    Returns:
        Bytes; None of a teacher from checkpoints, or where the size of its images is unknown.
    """
    seen_hw = seen_size(stage, image_hw)
    if model is None or "kind" in model or seen_hw is None:
        return None
    images = recipe.label_batch if stage.kind == "label" else recipe.evaluation.batch
    return estimate_inference_memory(
        ModelConfig(**model),
        num_classes=num_classes,
        image_px=seen_hw,
        images=images,
        half=stage.precision != "off",
    )


def coco_results(
    image_ids: Sequence[str], found: Sequence[Sequence[dict[str, Any]]], categories: Sequence[Category]
) -> Iterator[dict[str, Any]]:
    """Detections of a batch in COCO results form, with the dataset's own image and category ids.

    Args:
        image_ids: B record ids (JSON of the dataset's own).
        found: of each image, as from `predict`.

    Yields:
        One dict a detection: image_id, category_id, segmentation (RLE at the image's own size), score.
    """
    for image_id, instances in zip(image_ids, found, strict=True):
        for i in instances:
            yield {"image_id": decode_image_id(image_id), **coco_result(i, categories)}


def coco_result(instance: dict[str, Any], categories: Sequence[Category]) -> dict[str, Any]:
    """One detection in COCO results form, without the image's id.

    There is no `bbox`: beside a mask it would make pycocotools, faster-coco-eval and hotcoco sort the detection by the
    area of its box, which changes the AP of small, medium and large objects.

    Args:
        instance: as from `Teacher.predict`.

    Returns:
        category_id, segmentation (RLE at the image's own size), score (single precision, see `predict`).
    """
    return {
        "category_id": categories[instance["label"]].id,
        "segmentation": {"size": list(instance["size"]), "counts": instance["rle"].decode()},
        "score": float(np.float32(instance["score"])),
    }


def results_lines(results: Iterable[dict[str, Any]]) -> bytes:
    """One line of JSON a detection: what workers write piece by piece; see `results_document`."""
    return b"".join(json.dumps(result).encode() + b"\n" for result in results)


def results_document(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of the results JSON, one list, of the lines of all workers."""
    yield b"["
    separator = b"\n"
    for line in lines:
        yield separator + line.rstrip(b"\n")
        separator = b",\n"
    yield b"\n]\n"


def results_of(document: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The detections of a results JSON, line by line, as `results_document` writes it: one on each line."""
    for line in document:
        text = line.strip().rstrip(b",")
        if text not in (b"", b"[", b"]"):
            yield json.loads(text)
