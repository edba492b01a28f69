"""A train stage (pretrain, 1a, 1c, 2b, 3): its part of the recipe turned into a network, an objective and a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import load as load_tensors

from cast_ray.contracts.records import Batch
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.collectives import WorkerGather
from cast_ray.engine.loop import NO_HOOKS, RunSettings, TrainHooks, TrainResult, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork, TrainedNetwork
from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.models.student import WEIGHTS
from cast_ray.plan.graph import Stage, artifact_key, input_size_of
from cast_ray.plan.stage_parts import PublishedTeacher, TrainPart, train_config
from cast_ray.recipe import Recipe, TrainConfig
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.training_stream import OnlineLabeller, SampleRules, StepShare, training_stream
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import load_teacher
from cast_ray.teachers.protocol import Teacher


def stage_run(
    stage: Stage,
    world: World,
    *,
    resume: TrainState | None = None,
    stop_step: int | None = None,
    hooks: TrainHooks = NO_HOOKS,
) -> RunSettings:
    """Returns the settings of a stage's training loop; see `engine.loop.RunSettings` for the arguments."""
    seed = TrainPart.of(stage).order_seed
    return RunSettings(stage.fingerprint, seed, world, stage.precision, resume, stop_step, hooks)


def load_parent(store: ArtifactStore, stage: Stage) -> dict[str, torch.Tensor] | Teacher | None:
    """Returns what a train stage starts from: its parent's weights, a teacher from checkpoints, or nothing."""
    part = TrainPart.of(stage)
    if isinstance(part.model, PublishedTeacher):
        key = artifact_key("train", stage.parents["init"])
        return load_teacher(store, key, dict(part.model.settings), input_size_of(stage))
    if "init" not in stage.parents:
        return None
    return load_tensors(store.read_bytes(artifact_key("train", stage.parents["init"]), WEIGHTS))


def stage_batches(
    stage: Stage,
    images: Images,
    recipe: Recipe,
    world: World,
    *,
    start_step: int = 0,
    online: OnlineLabeller | None = None,
) -> Iterator[Batch]:
    """Yields this worker's batches of a train stage.

    Args:
        images: D_l, D_u and pseudo-labels.
        recipe: settings that the stage does not have itself.
        start_step: step of the first batch.
        online: who labels D_u as it is drawn; None: `images.labels`, or nobody.
    """
    part, config = TrainPart.of(stage), train_config(stage, recipe)
    share = StepShare(
        config.batch_labelled,
        config.batch_unlabelled,
        config.steps,
        seed=part.order_seed,
        start_step=start_step,
        rank=world.rank,
        world_size=world.size,
    )
    return training_stream(
        images, part.data(recipe), recipe.runtime, share, SampleRules.of(part), online=online, device=world.device
    )


def train_stage(
    stage: Stage,
    batches: Iterator[Batch],
    config: TrainConfig,
    run: RunSettings,
    *,
    num_classes: int,
    parent: Mapping[str, torch.Tensor] | Teacher | None,
    gradient_checkpointing: bool = False,
) -> tuple[Segmenter | Teacher, TrainResult]:
    """Runs one train stage on this worker.

    Args:
        stage: a train stage of `plan.graph`.
        batches: this worker's batches from the resumed step on.
        config: see `stage_parts.train_config`.
        run: see `stage_run`.
        num_classes: C.
        parent: from `load_parent`: weights of the parent's segmenter (theta_T0 for 1a and 1c, theta_s* for 3), or the
            parent itself where it is another kind of teacher, which is then trained in place; None: seeded random
            weights.
        gradient_checkpointing: the recipe's `runtime.gradient_checkpointing`.

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
    gather = WorkerGather(run.world.rank, run.world.size) if run.world.size > 1 else None
    objective = Objective(part.loss, contrastive, gather, criterion, has_proposals)
    return model, train(network, objective, batches, config, run)


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
