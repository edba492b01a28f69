"""Where the time of one optimiser step goes, term by term, and what the contrastive term adds to it.

    python benchmarks/step_breakdown.py [--case shapes|paper] [--column paper|released]

`shapes`: the preset's student and batch on drawn scenes. `paper`: a student of the paper's size (DINOv2-S from its
config with random weights, DPT, 9 masked-attention layers, 100 queries, 12,544 points) on 2 images of 512x1024 with 10
instances each. One thread. A step is cut at the network's outputs: each term is differentiated to them on its own, then
the network once with their sum. Before anything is timed the cut step's gradients are compared with the loop's.

The rival is the step without the contrastive term. What it adds is its own work (projection heads, loss, their
gradients) and the encoder's pass over the strong view; both are shown.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import clock, report
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Backbone, Dinov2Config

from cast_ray import registry
from cast_ray.datasets.scenes import CATEGORIES, STYLES, draw_scene
from cast_ray.engine import objective as objective_module
from cast_ray.engine.loop import step_generator
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.optim import WeightAverage, build_optimizer, set_lr
from cast_ray.engine.world import CPU, World
from cast_ray.losses import set_criterion
from cast_ray.models.encoders import Encoder
from cast_ray.models.network import CastNetwork, Output
from cast_ray.models.student import build_segmenter
from cast_ray.recipe import EncoderConfig, ModelConfig, Recipe, build_recipe
from cast_ray.records import Batch, Predictions, Targets

PAPER_PX = (512, 1024)
PAPER_STUDENT = ModelConfig(
    encoder=EncoderConfig(name="dinov2_small"),
    hidden_dim=256,
    num_queries=100,
    num_layers=9,
    num_heads=8,
    feedforward_dim=2048,
    proposals=False,
)


class Dinov2Small(Encoder):
    """DINOv2-S by its published config, random weights; DPT's reassembled maps at strides 4 to 32."""

    PATCH = 14

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.channels = {4: 96, 8: 192, 16: 384, 32: 768}
        self.backbone = Dinov2Backbone(
            Dinov2Config(
                hidden_size=384,
                num_hidden_layers=12,
                num_attention_heads=6,
                patch_size=self.PATCH,
                image_size=518,
                out_indices=[3, 6, 9, 12],
                reshape_hidden_states=True,
            )
        )
        self.reassemble = nn.ModuleList(nn.Conv2d(384, width, 1) for width in self.channels.values())

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        size = [-(-n // self.PATCH) * self.PATCH for n in pixels.shape[-2:]]
        maps = self.backbone(F.interpolate(pixels, size=size, mode="bilinear")).feature_maps
        return {
            stride: F.interpolate(project(x), size=[n // stride for n in pixels.shape[-2:]], mode="bilinear")
            for stride, project, x in zip(self.channels, self.reassemble, maps)
        }


def shapes_case() -> tuple[ModelConfig, Recipe, Batch, int]:
    recipe = build_recipe("shapes")
    num_labelled = recipe.stages.distill.batch_labelled
    labels = {identifier: i for i, (identifier, _) in enumerate(CATEGORIES)}
    images, targets, truths = [], [], []
    for seed in range(num_labelled + recipe.stages.distill.batch_unlabelled):
        pixels, instances = draw_scene(STYLES["target"], np.random.SeedSequence(seed))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        masks = torch.from_numpy(np.stack([mask for _, mask in instances]))
        targets.append(Targets(masks, torch.tensor([labels[c] for c, _ in instances]), torch.ones(len(masks))))
        truths.append(((masks.cumsum(0) * masks).amax(0)).to(torch.int16))
    return recipe.student, recipe, as_batch(torch.stack(images), targets, num_labelled), len(CATEGORIES)


def paper_case() -> tuple[ModelConfig, Recipe, Batch, int]:
    overrides = {
        "loss.num_points": 12544,
        "stages.distill.batch_labelled": 1,
        "stages.distill.batch_unlabelled": 1,
    }
    g = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(2):
        masks = torch.zeros(10, *PAPER_PX, dtype=torch.bool)
        for mask in masks:
            top, left = (int(torch.randint(0, n - 120, (), generator=g)) for n in PAPER_PX)
            mask[top : top + 120, left : left + 120] = True
        targets.append(Targets(masks, torch.randint(0, 8, (10,), generator=g), torch.ones(10)))
    images = torch.randint(0, 256, (2, 3, *PAPER_PX), generator=g, dtype=torch.uint8)
    return PAPER_STUDENT, build_recipe("shapes", overrides=overrides), as_batch(images, targets, 1), 8


def as_batch(images: Tensor, targets: list[Targets], num_labelled: int) -> Batch:
    unknown = torch.full((len(images), *images.shape[-2:]), -1, dtype=torch.int16)
    strong = (images.float() * 0.8 + 20).to(torch.uint8)
    return Batch(images, strong, torch.ones_like(unknown, dtype=torch.bool), targets, num_labelled, unknown, unknown)


CASES = {"shapes": shapes_case, "paper": paper_case}


class Step:
    """One optimiser step, whole or cut into timed parts."""

    def __init__(self, case: str, column: str, contrastive: bool, now: Callable[[], float]):
        model, recipe, self.batch, num_classes = CASES[case]()
        config = build_recipe("shapes", overrides={"contrastive": column}).contrastive if contrastive else None
        self.train = recipe.stages.distill
        torch.manual_seed(0)
        with mock.patch.dict(registry.ROWS["encoders"], dinov2_small=f"{__name__}:Dinov2Small"):
            self.network = CastNetwork(build_segmenter(model, num_classes, seed=0), config).train()
        self.objective = Objective(recipe.loss, config)
        self.optimizer = build_optimizer(self.network, self.train)
        self.average = WeightAverage(self.network, self.train.ema)
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[part] += self.now() - start
