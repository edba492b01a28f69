"""How often uniform negatives are false in drawn scenes, as the loss's own diagnostics count them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cast_ray.data.formats.scenes import LAYOUTS, STYLES, draw_scene
from cast_ray.losses.contrastive.loss import contrastive_loss
from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.losses.contrastive.pixels import diagnose
from cast_ray.recipe import build_recipe

NUM_BATCHES = 6


def false_negative_rate(preset: str, **changes: str) -> float:
    """FNR of uniform negatives in steps of a preset's student: its labelled images with truth, as many without."""
    recipe = build_recipe(preset, "demo", {"contrastive.sampler": "uniform"} | changes)
    config, layout = recipe.contrastive, LAYOUTS[recipe.data.shapes.layout]
    assert config.feature_stride is not None
    size, cells = layout.scene_px, layout.scene_px // config.feature_stride
    num_labelled, num_images = recipe.stages.distill.batch_labelled, 2 * recipe.stages.distill.batch_labelled
    draws = torch.Generator().manual_seed(0)
    statistics = []
    for batch in range(NUM_BATCHES):
        instance = np.full((num_images, size, size), -1, np.int16)
        for i in range(num_labelled):
            seed = np.random.SeedSequence([batch, i])
            instance[i] = 0
            for number, (_, mask) in enumerate(draw_scene(STYLES["target"], seed, layout)[1], start=1):
                instance[i][mask] = number
        features = torch.nn.functional.normalize(torch.randn(num_images, 8, cells, cells, generator=draws), dim=1)
        masks = torch.randn(num_images, 4, size // 4, size // 4, generator=draws)
        views = PixelViews(
            z_weak=features,
            z_strong=features,
            mask_logits=masks,
            class_logits=torch.randn(num_images, 4, 2, generator=draws),
            valid=torch.ones(num_images, size, size, dtype=torch.bool),
            truth_instance=torch.from_numpy(instance),
            truth_class=torch.from_numpy(np.minimum(instance, 1)),
        )
        output = contrastive_loss(views, config, temperature=0.1, generator=draws)
        assert output.statistics is not None
        statistics.append(output.statistics)
    return diagnose(torch.stack(statistics).sum(0), 0.1)["fnr"]


def test_crowded_scenes_have_false_negatives_and_scattered_ones_hardly_any() -> None:
    scattered, crowded = false_negative_rate("shapes"), false_negative_rate("crowded")
    assert scattered < 0.004 and crowded == pytest.approx(0.12, abs=0.02)


def test_the_oracle_draws_none() -> None:
    changes = {"contrastive.sampler": "oracle"}
    assert false_negative_rate("crowded", **changes) == 0.0
