"""What a teacher or a student costs on a device: parameters, operations, latency, throughput and memory.

No weights are needed: models are full-size, from their configs, with random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn

from cast_ray.evaluation.efficiency import count_gmacs, count_parameters, measure_seconds, peak_memory
from cast_ray.models.autocast import autocast, fastest_precision, require_precision
from cast_ray.models.segmenter import build_segmenter, outline
from cast_ray.recipe import ModelConfig, Precision, Recipe
from cast_ray.teachers.outline import COUNTED, outline_teacher

NUM_CLASSES = 8
"""Cityscapes' thing classes; more of them change the class head alone."""
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """One model: parameters in 10^6; for one image multiply-adds in 10^9 and memory in GiB; None: not measured."""

    row: str
    params_m: float
    gmacs: float
    latency_ms: float | None = None
    images_per_s: float | None = None
    peak_gib: float | None = None


@dataclass(frozen=True)
class Timing:
    """How models are timed: on which device, in which precision (`auto`: the device's fastest), how often."""

    device: torch.device
    amp: str
    batch: int
    repeats: int


def student_cost(row: str, recipe: Recipe, timing: Timing | None) -> Cost:
    """Returns the cost of a recipe's student; `timing` None: parameters and operations only."""
    return _segmenter_cost(row, recipe.student, recipe, timing)


def teacher_cost(row: str, recipe: Recipe, timing: Timing | None) -> Cost | None:
    """Returns the cost of a recipe's teacher on images of the student's size; None: its kind cannot be counted."""
    if recipe.teacher.kind == "expert":
        return _segmenter_cost(row, recipe.teacher.segmenter, recipe, timing)
    if recipe.teacher.kind not in COUNTED:
        return None
    counted = _counted(row, outline_teacher(recipe.teacher, NUM_CLASSES), recipe)
    if timing is None:
        return counted
    return _timed(counted, outline_teacher(recipe.teacher, NUM_CLASSES, device=str(timing.device)), recipe, timing)


def _segmenter_cost(row: str, model: ModelConfig, recipe: Recipe, timing: Timing | None) -> Cost:
    config = model.without_weights()
    bare = outline(config, NUM_CLASSES)
    bare.anneal(1.0)
    counted = _counted(row, bare, recipe)
    if timing is None:
        return counted
    segmenter = build_segmenter(config, NUM_CLASSES, seed=0)
    segmenter.anneal(1.0)
    return _timed(counted, segmenter, recipe, timing)


def _counted(row: str, model: nn.Module, recipe: Recipe) -> Cost:
    images = torch.empty((1, 3, *recipe.data.image_px), dtype=torch.uint8, device="meta")
    return Cost(row, count_parameters(model) / 1e6, count_gmacs(model, images))


def _timed(counted: Cost, model: nn.Module, recipe: Recipe, timing: Timing) -> Cost:
    measured = measure(model.eval().to(timing.device), (3, *recipe.data.image_px), timing)
    return Cost(counted.row, counted.params_m, counted.gmacs, *measured)


def measure(model: nn.Module, shape: tuple[int, ...], timing: Timing) -> tuple[float, float, float]:
    """Returns (ms of one image, images per second in batches, peak memory of one image in GiB, without weights)."""
    device = timing.device
    precision = fastest_precision(device) if timing.amp == "auto" else cast(Precision, timing.amp)
    require_precision(precision, device, "--amp")
    context = partial(autocast, precision, device)
    images = torch.randint(0, 256, (timing.batch, *shape), dtype=torch.uint8, device=device)
    latency = measure_seconds(lambda: model(images[:1]), device, timing.repeats, context)
    seconds = measure_seconds(lambda: model(images), device, timing.repeats, context) if timing.batch > 1 else latency
    with context():
        num_bytes = peak_memory(lambda: model(images[:1]), device)
    return 1e3 * latency, timing.batch / seconds, num_bytes / GIB
