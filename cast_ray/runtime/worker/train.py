"""A train stage (pretrain, 1a, 1c, 2b, 3): its part of the recipe turned into a network, an objective and a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from cast_ray.contracts.records import Batch
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.collectives import WorkerGather
from cast_ray.engine.loop import NO_HOOKS, TrainHooks, TrainResult, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork, TrainedNetwork
from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.plan.graph import Stage
from cast_ray.plan.stage_parts import TrainPart
from cast_ray.recipe import TrainConfig
from cast_ray.teachers.protocol import Teacher


def train_stage(
    stage: Stage,
    *,
    num_classes: int,
    parent: Mapping[str, torch.Tensor] | Teacher | None,
    batches: Iterator[Batch],
    world: World,
    train_config: TrainConfig,
    gradient_checkpointing: bool = False,
    resume: TrainState | None,
    hooks: TrainHooks = NO_HOOKS,
) -> tuple[Segmenter | Teacher, TrainResult]:
    """Runs one train stage on this worker.

    Args:
        stage: a train stage of `plan.graph`.
        num_classes: C.
        parent: weights of the parent's segmenter (theta_T0 for 1a and 1c, theta_s* for 3), or the parent itself where
            it is another kind of teacher, which is then trained in place; None: seeded random weights.
        train_config: its optimisation settings, from `stage_parts.train_config`.
        gradient_checkpointing: the field of the recipe's `runtime`.
        batches: this worker's batches from the resumed step on.
        resume, hooks: see `engine.loop.train`.

    Returns:
        The trained segmenter or teacher (averaged weights) and the curves.
    """
    part = TrainPart.of(stage)
    torch.manual_seed(part.init_seed)
    contrastive = part.contrastive
    model: Segmenter | Teacher
    network: TrainedNetwork
    if isinstance(parent, Teacher):
        model = parent
        network, criterion = parent.for_training(contrastive)
        has_proposals = False
    else:
        model = _segmenter(stage, part, num_classes, parent)
        network, criterion = CastNetwork(model, contrastive), None
        has_proposals = model.config.proposals
    if gradient_checkpointing:
        network.checkpoint_activations()
    gather = WorkerGather(world.rank, world.size) if world.size > 1 else None
    objective = Objective(part.loss, contrastive, gather, criterion, has_proposals)
    result = train(
        network,
        objective,
        batches,
        train_config,
        fingerprint=stage.fingerprint,
        seed=part.order_seed,
        world=world,
        amp=stage.precision,
        resume=resume,
        hooks=hooks,
    )
    return model, result


def _segmenter(
    stage: Stage, part: TrainPart, num_classes: int, initial_weights: Mapping[str, torch.Tensor] | None
) -> Segmenter:
    assert part.segmenter is not None, stage.name
    segmenter = build_segmenter(part.segmenter, num_classes, part.init_seed)
    if initial_weights is not None:
        try:
            segmenter.load_state_dict(initial_weights)
        except RuntimeError as error:
            raise ValueError(f"{stage.name}: the parent's weights do not fit this model: {error}") from None
    return segmenter
