"""Drawn images, a recorded run on one fixed batch and a comparison of weights, for tests of teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from training_scenes import make_batch

from cast_ray.contracts.records import Batch, Category
from cast_ray.engine.loop import RunSettings, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.recipe import ContrastiveConfig, LossConfig, TrainConfig
from cast_ray.teachers.protocol import Teacher

CATEGORIES = [Category(3, "person"), Category(7, "traffic light"), Category(8, "dog")]
CROP = (48, 64)
CONTRAST = ContrastiveConfig(num_negatives=8, projection_dims=(16, 8), feature_stride=8, num_anchors=32, pool_size=64)


def random_images(num: int = 2, size: tuple[int, int] = CROP, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def run_steps(teacher: Teacher, contrastive: ContrastiveConfig | None, steps: int = 12, **config: Any) -> list[float]:
    """Trains on one fixed batch of an image of D_l and one of D_u; the losses that were logged."""
    network, terms = teacher.for_training(contrastive)
    loss = LossConfig(lambda_semi=1.0, lambda_pxl=0.1, num_points=128)
    batch = make_batch((2, 3), 1, seed=0)

    def forever() -> Iterator[Batch]:
        while True:
            yield batch

    settings = TrainConfig(**{"steps": steps, "lr": 2e-3, "ema": 0, "clip_norm": 0.5, "schedule": "constant", **config})
    result = train(
        network,
        Objective(loss, contrastive, criterion=terms, proposals=False),
        forever(),
        settings,
        RunSettings("f", 0, World()),
    )
    return [entry["loss"] for entry in result.curve]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}
