"""A train stage (pretrain, 1a, 1c, 2b, 3): its part of the recipe turned into a network, an objective and a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.collectives import WorkerGather
from cast_ray.engine.loop import TrainResult, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.network import CastNetwork
from cast_ray.models.student import Segmenter, build_segmenter
from cast_ray.recipe import ContrastiveConfig, LossConfig, ModelConfig, TrainConfig
from cast_ray.records import Batch
from cast_ray.stages.graph import Stage


def train_config(stage: Stage, checkpoint_every_steps: int) -> TrainConfig:
    """The optimisation part of a train stage; a stage without D_u takes no unlabelled images."""
    part = {"batch_unlabelled": 0} | stage.config["train"]
    return TrainConfig(**part, checkpoint_every_steps=checkpoint_every_steps)


def order_seed(stage: Stage) -> int:
    """Seed of the order of a train stage's images, of their views and of the points its losses sample."""
    return stage.config.get("order_seed", stage.config["seed"])


def train_stage(
    stage: Stage,
    *,
    num_classes: int,
    initial_weights: Mapping[str, torch.Tensor] | None,
    batches: Iterator[Batch],
    world: World,
    amp: str,
    checkpoint_every_steps: int,
    resume: TrainState | None,
    on_log: Callable[[dict[str, float]], None],
    on_checkpoint: Callable[[TrainState], None],
) -> tuple[Segmenter, TrainResult]:
    """Runs one train stage on this worker; see `engine.loop.train` for the callbacks.

    Args:
        stage: from `stages.graph`.
        num_classes: C.
        initial_weights: of the parent (theta_T0 for 1a and 1c, theta_s* for 3); None: seeded random weights.
        batches: this worker's batches from the resumed step on.

    Returns:
        The trained segmenter (averaged weights) and the curves.
    """
    config = stage.config
    init_seed = config.get("init_seed", config["seed"])
    torch.manual_seed(init_seed)
    segmenter = build_segmenter(ModelConfig(**config["model"]), num_classes, init_seed)
    if initial_weights is not None:
        try:
            segmenter.load_state_dict(initial_weights)
        except RuntimeError as error:
            raise ValueError(f"{stage.name}: the parent's weights do not fit this model: {error}") from None
    contrastive = ContrastiveConfig(**config["contrastive"]) if config["contrastive"] else None
    network = CastNetwork(segmenter, contrastive)
    gather = WorkerGather(world.rank, world.size) if world.size > 1 else None
    objective = Objective(LossConfig(**config["loss"]), contrastive, gather)
    result = train(
        network,
        objective,
        batches,
        train_config(stage, checkpoint_every_steps),
        fingerprint=stage.fingerprint,
        seed=order_seed(stage),
        world=world,
        amp=amp,
        resume=resume,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
    )
    return segmenter, result
