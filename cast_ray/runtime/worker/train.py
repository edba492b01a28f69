"""A train stage (pretrain, 1a, 1c, 2b, 3): its part of the recipe turned into a network, an objective and a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from cast_ray.contracts.records import Batch
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.collectives import WorkerGather
from cast_ray.engine.loop import TrainResult, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork, TrainedNetwork
from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.plan.graph import Stage
from cast_ray.plan.stage_parts import order_seed
from cast_ray.recipe import ContrastiveConfig, LossConfig, ModelConfig, TrainConfig
from cast_ray.teachers.protocol import Teacher


def train_stage(
    stage: Stage,
    *,
    num_classes: int,
    initial_weights: Mapping[str, torch.Tensor] | None,
    teacher: Teacher | None = None,
    batches: Iterator[Batch],
    world: World,
    train_config: TrainConfig,
    gradient_checkpointing: bool = False,
    resume: TrainState | None,
    on_log: Callable[[dict[str, float]], None],
    on_checkpoint: Callable[[TrainState], None],
    on_refresh: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, weights: None,
    snapshot_every_steps: int = 0,
    on_snapshot: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, weights: None,
) -> tuple[Segmenter | Teacher, TrainResult]:
    """Runs one train stage on this worker; see `engine.loop.train` for the callbacks.

    Args:
        stage: from `stages.graph`.
        num_classes: C.
        train_config: of `train_config(stage, recipe)`.
        gradient_checkpointing: of the recipe's `runtime`.
        initial_weights: of the parent (theta_T0 for 1a and 1c, theta_s* for 3); None: seeded random weights.
        teacher: the parent itself, where it is not a segmenter; trained in place.
        batches: this worker's batches from the resumed step on.

    Returns:
        The trained segmenter or teacher (averaged weights) and the curves.
    """
    config = stage.config
    init_seed = config.get("init_seed", config["seed"])
    torch.manual_seed(init_seed)
    contrastive = ContrastiveConfig(**config["contrastive"]) if config["contrastive"] else None
    model: Segmenter | Teacher
    network: TrainedNetwork
    if teacher is not None:
        model = teacher
        network, criterion = teacher.for_training(contrastive)
        has_proposals = False
    else:
        model = _segmenter(stage, num_classes, initial_weights)
        network, criterion = CastNetwork(model, contrastive), None
        has_proposals = model.config.proposals
    if gradient_checkpointing:
        network.checkpoint_activations()
    gather = WorkerGather(world.rank, world.size) if world.size > 1 else None
    objective = Objective(LossConfig(**config["loss"]), contrastive, gather, criterion, has_proposals)
    result = train(
        network,
        objective,
        batches,
        train_config,
        fingerprint=stage.fingerprint,
        seed=order_seed(stage),
        world=world,
        amp=stage.precision,
        resume=resume,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
        on_refresh=on_refresh,
        refresh_every_steps=config.get("refresh_steps", 0),
        snapshot_every_steps=snapshot_every_steps,
        on_snapshot=on_snapshot,
    )
    return model, result


def _segmenter(stage: Stage, num_classes: int, initial_weights: Mapping[str, torch.Tensor] | None) -> Segmenter:
    config = stage.config
    segmenter = build_segmenter(ModelConfig(**config["model"]), num_classes, config.get("init_seed", config["seed"]))
    if initial_weights is not None:
        try:
            segmenter.load_state_dict(initial_weights)
        except RuntimeError as error:
            raise ValueError(f"{stage.name}: the parent's weights do not fit this model: {error}") from None
    return segmenter
