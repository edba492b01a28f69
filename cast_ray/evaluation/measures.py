"""Which AP a recipe asks for: `evaluation.metric` to its matching and its measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cast_ray.contracts.records import Category
from cast_ray.evaluation.cityscapes_ap import cityscapes_metrics, match_cityscapes
from cast_ray.evaluation.coco_ap import coco_metrics, match_coco
from cast_ray.evaluation.detections import Detections, Truth
from cast_ray.evaluation.matches import DetectionMatches
from cast_ray.recipe import EvaluationConfig


def match_images(
    truth: Sequence[Truth], found: Sequence[Detections], num_classes: int, settings: EvaluationConfig
) -> DetectionMatches:
    """Matches the detections of a batch of images to its ground truth, by the rules of `settings.metric`."""
    if settings.metric == "cityscapes":
        return match_cityscapes(truth, found, num_classes)
    return match_coco(truth, found, num_classes, settings.max_detections)


def metrics_of(matches: DetectionMatches, categories: Sequence[Category]) -> dict[str, Any]:
    """The measures of matched detections, see `coco_metrics`, `cityscapes_metrics`; `metric` says which they are."""
    return (cityscapes_metrics if matches.metric == "cityscapes" else coco_metrics)(matches, categories)
