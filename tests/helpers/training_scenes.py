"""A tiny network, drawn batches and a recorded run of the training loop, for tests of the engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cast_ray.contracts.records import Batch, Targets
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.loop import RunSettings, TrainHooks, TrainResult, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import ContrastiveConfig, EncoderConfig, LossConfig, ModelConfig, Precision, TrainConfig

NUM_CLASSES = 3
SIZE = 32
MODEL = ModelConfig(
    encoder=EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2),
    hidden_dim=16,
    num_queries=9,
    num_layers=2,
    num_heads=2,
    feedforward_dim=16,
)
LOSS = LossConfig(num_points=32, lambda_semi=0)
CONTRAST = ContrastiveConfig(
    num_negatives=4,
    num_anchors=8,
    pool_size=16,
    projection_dims=(8, 8),
    temperature=0.3,
    temperature_end=0.07,
    temperature_steps=20,
    diagnostics_every_steps=3,
)


def draw_image(num_instances: int, seed: int) -> tuple[torch.Tensor, Targets]:
    """uint8 [3, SIZE, SIZE] with rectangles coloured by class, and their masks (a later one lies on top)."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 60, (3, SIZE, SIZE), generator=g, dtype=torch.uint8)
    owner = torch.full((SIZE, SIZE), -1)
    labels = torch.randint(0, NUM_CLASSES, (num_instances,), generator=g)
    for i in range(num_instances):
        # Each on its own 8x8 cell of the grid, so that none is hidden.
        top, left = 8 * (i // 4), 8 * (i % 4)
        height, width = (int(torch.randint(4, 9, (), generator=g)) for _ in range(2))
        owner[top : top + height, left : left + width] = i
        image[labels[i], top : top + height, left : left + width] = 230
    masks = torch.stack([owner == i for i in range(num_instances)]) if num_instances else owner[None][:0].bool()
    return image, Targets(masks, labels, torch.ones(num_instances))


def truth_maps(target: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Instance (0: none) and class (NUM_CLASSES: background) of each pixel, int16 [SIZE, SIZE]."""
    instance, category = torch.zeros(SIZE, SIZE), torch.full((SIZE, SIZE), float(NUM_CLASSES))
    for i, (mask, label) in enumerate(zip(target.masks, target.labels)):
        instance[mask], category[mask] = i + 1, float(label)
    return instance.to(torch.int16), category.to(torch.int16)


def make_batch(counts: tuple[int, ...], num_labelled: int, seed: int = 0) -> Batch:
    """One step's images with so many instances each; the first `num_labelled` from D_l, the others' truth unknown."""
    drawn = [draw_image(count, 100 * seed + i) for i, count in enumerate(counts)]
    weak = torch.stack([image for image, _ in drawn])
    g = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 30, weak.shape, generator=g, dtype=torch.uint8)
    instance, category = (torch.full((len(counts), SIZE, SIZE), -1, dtype=torch.int16) for _ in range(2))
    for i, (_, target) in enumerate(drawn[:num_labelled]):
        instance[i], category[i] = truth_maps(target)
    valid = torch.ones(len(counts), SIZE, SIZE, dtype=torch.bool)
    return Batch(weak, weak // 2 + noise, valid, [t for _, t in drawn], num_labelled, instance, category)


def slice_batch(batch: Batch, labelled: slice, unlabelled: slice) -> Batch:
    """One worker's share of a step: rows of D_l, then rows of D_u."""
    rows = [*range(len(batch.weak))[labelled], *range(len(batch.weak))[unlabelled]]
    pick = lambda t: t[torch.tensor(rows)]  # noqa: E731
    return Batch(
        pick(batch.weak),
        pick(batch.strong),
        pick(batch.valid),
        [batch.targets[r] for r in rows],
        len(range(len(batch.weak))[labelled]),
        pick(batch.truth_instance),
        pick(batch.truth_class),
    )


def batches(start: int, stop: int, counts: tuple[int, ...] = (2, 3), num_labelled: int = 2) -> Iterator[Batch]:
    """A batch for each step, a function of the step alone."""
    for step in range(start, stop):
        yield make_batch(counts, num_labelled, seed=step)


def make_network(contrastive: ContrastiveConfig | None, seed: int = 0) -> CastNetwork:
    torch.manual_seed(seed)
    return CastNetwork(build_segmenter(MODEL, NUM_CLASSES, seed), contrastive)


@dataclass
class Run:
    """What one call of the loop left behind."""

    network: CastNetwork
    result: TrainResult
    states: list[TrainState] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.network.segmenter.state_dict()

    @property
    def curve(self) -> list[dict[str, float]]:
        """Without what depends on the clock."""
        return [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in self.result.curve]


def run(
    config: TrainConfig,
    stream: Iterator[Batch],
    *,
    loss: LossConfig = LOSS,
    contrastive: ContrastiveConfig | None = None,
    resume: TrainState | None = None,
    world: World | None = None,
    objective: Any = None,
    seed: int = 0,
    amp: Precision = "off",
    stop_step: int | None = None,
    **hooks: Any,
) -> Run:
    """Trains the tiny network and keeps a copy of every checkpoint's state, whose tensors are the live ones."""
    network = make_network(contrastive, seed)
    states: list[TrainState] = []
    result = train(
        network,
        objective or Objective(loss, contrastive),
        stream,
        config,
        RunSettings(
            "f",
            seed,
            world or World(),
            amp,
            resume,
            stop_step,
            TrainHooks(**{"on_checkpoint": lambda state: states.append(copy.deepcopy(state))} | hooks),
        ),
    )
    return Run(network, result, states)
