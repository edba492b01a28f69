"""Measuring a model on validation images in one process; `evaluation` spreads the images over workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category, ClassMap
from cast_ray.evaluation.coco_results import coco_results
from cast_ray.evaluation.detections import Detections, Truth, single_precision, tie_order
from cast_ray.evaluation.matches import DetectionMatches, join
from cast_ray.evaluation.measures import match_images
from cast_ray.models.postprocess import predict_in_groups
from cast_ray.recipe import EvaluationConfig, InputSize, RuntimeConfig
from cast_ray.runtime.data.pictures import read_pictures
from cast_ray.runtime.data.record_tables import Records, record_at, table_of
from cast_ray.runtime.worker.segment import Segment
from cast_ray.teachers.protocol import Teacher


@dataclass(frozen=True)
class ValidationSet:
    """The images that models are measured on, by reference, and how; small, sent to workers and actors."""

    records: Records
    num_images: int
    input_size: InputSize
    categories: tuple[Category, ...]
    settings: EvaluationConfig
    runtime: RuntimeConfig

    @classmethod
    def of(cls, segment: Segment, input_size: InputSize) -> ValidationSet:
        """The set of a segment: its first `evaluation.num_images` validation images, at the size that a model sees."""
        assert segment.val is not None
        recipe = segment.recipe
        return cls.first_of(
            segment.val, segment.num_val, input_size, segment.categories, recipe.evaluation, recipe.runtime
        )

    @classmethod
    def first_of(
        cls,
        records: Records,
        num_records: int,
        input_size: InputSize,
        categories: tuple[Category, ...],
        settings: EvaluationConfig,
        runtime: RuntimeConfig,
    ) -> ValidationSet:
        """The first `settings.num_images` of some records, or all of them."""
        num_images = min(num_records, settings.num_images or num_records)
        return cls(records, num_images, input_size, categories, settings, runtime)

    def tie_order(self) -> np.ndarray:
        return tie_order(table_of(self.records).column("image_id").slice(0, self.num_images).to_pylist())


def measure(
    teacher: Teacher,
    images: ValidationSet,
    rows: np.ndarray,
    device: torch.device,
    on_batch: Callable[[int, Iterator[dict[str, Any]]], None] = lambda count, results: None,
) -> DetectionMatches:
    """Matches a model's detections on some validation images.

    Args:
        teacher: a teacher, or a student as one, on `device`.
        rows: int [n], row numbers of the images.
        on_batch: called with the number of images done and the COCO results of each batch.

    Raises:
        RuntimeError: images went missing on the way.
    """
    settings, classes = images.settings, ClassMap(images.categories)
    parts, positions, done = [], [], 0
    for batch in read_pictures(images.records, rows, images.input_size, images.runtime):
        found = predict(
            teacher, batch.pixels, batch.image_hw, batch.resized_hw, settings.max_detections, settings.batch
        )
        records = [record_at(images.records, rows[p]) for p in batch.positions]
        truth = [Truth.of(record, classes) for record in records]
        parts.append(match_images(truth, [Detections.of(f) for f in found], len(classes), settings))
        positions.append(np.array(batch.positions))
        done += len(batch.positions)
        on_batch(done, coco_results([r["image_id"] for r in records], found, images.categories))
    if done != len(rows):
        raise RuntimeError(f"evaluate: {len(rows)} images went in, {done} came out")
    if not parts:  # more workers than images
        parts, positions = [match_images([], [], len(classes), settings)], [np.arange(0)]
    return join(parts, positions)


def predict(
    teacher: Teacher,
    images: Sequence[np.ndarray],
    image_hw: Sequence[tuple[int, int]],
    resized_hw: Sequence[tuple[int, int]],
    max_detections: int,
    batch: int,
) -> list[Instances]:
    """Instances of each image at its own size, as from `Teacher.predict`, with scores in single precision.

    Args:
        teacher: a teacher, or a student as one.
        images: B of uint8 [3, H, W], at the teacher's `input_size`.
        image_hw, resized_hw: B original sizes and sizes inside the padding, pixels.
        batch: most images of one forward pass; only images of one size pass together.
    """
    found = predict_in_groups(teacher.predict, images, image_hw, resized_hw, max_detections, batch)
    return [single_precision(instances) for instances in found]
