"""Inside a Train worker: segment after segment, and the stages of each, one after the other.

Kept apart from `group.py` because it imports torch and transformers (about 8 s of CPU time): the hosts of groups and
Train's controllers load that file, never this one.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device
from ray.util.placement_group import PlacementGroup

from cast_ray.common.logs import configure_logging
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.loop import Interrupted, TrainHooks, TrainResult
from cast_ray.engine.world import World
from cast_ray.models.autocast import require_precision
from cast_ray.models.segmenter import Segmenter
from cast_ray.plan.graph import Stage, artifact_key
from cast_ray.plan.stage_parts import TrainPart, train_config
from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import read_pictures
from cast_ray.runtime.data.resources import configure_data
from cast_ray.runtime.process_settings import prepare_process
from cast_ray.runtime.store.artifact_files import CURVES, LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import save_model
from cast_ray.runtime.this_node import this_node
from cast_ray.runtime.worker.audit import audit_labels
from cast_ray.runtime.worker.evaluation import evaluate_stage
from cast_ray.runtime.worker.label_job import LabelJob
from cast_ray.runtime.worker.labeller import PseudoLabeller
from cast_ray.runtime.worker.meeting import Meeting
from cast_ray.runtime.worker.online import OnlineLabels, Publisher, Teachers, versions_folder
from cast_ray.runtime.worker.segment import Segment
from cast_ray.runtime.worker.shape import devices_of
from cast_ray.runtime.worker.train import load_parent, stage_batches, stage_run, train_stage
from cast_ray.runtime.worker.train_progress import TimedBatches, TrainProgress
from cast_ray.runtime.worker.validation import SideValidation, is_validated, validation_bundles
from cast_ray.teachers.protocol import Teacher

logger = logging.getLogger(__name__)

# Restarting the workers would raise these again, unlike a lost process, a broken connection or a full disk.
FATAL = (ValueError, TypeError, KeyError, AttributeError, AssertionError, FloatingPointError, torch.OutOfMemoryError)


def serve_segments(
    runtime: RuntimeConfig, host: Any, group: PlacementGroup, worker_nodes: list[str], teachers: Teachers | None
) -> None:
    """The loop of one worker: runs segment after segment, until its group's host has none left.

    Args:
        host: the actor `GroupHost` that hands the segments out.
        group: reservation of the workers' streams, one bundle each, and of what else runs beside them.
        worker_nodes: id of the node of each worker, in the order of the streams' bundles; ranks have one of their own.
        teachers: who labels the images of stages that have them labelled online.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), None
    number = 0
    me = ray.get_runtime_context().current_actor
    while (taken := ray.get(host.take.remote(number, rank, me))) is not None:
        number, segment = taken
        if ray.get(segment.broker.failure.remote(segment.owner)):
            return  # a restart after a fatal error: nothing to try again
        startup_s = 0.0
        if world is None:
            world = _start_worker(runtime, group, worker_nodes)
            if world.rank == 0:
                segment.broker.handed_over.remote(segment.owner)
            startup_s = time.time() - segment.requested
        ray.get(segment.broker.computes_on.remote(segment.owner, f"worker {rank}", this_node(world.device)))
        names = ", ".join(stage.name for stage in segment.stages)
        # A second line of the same segment is a restart: when one is lost, Ray Train starts all workers again.
        logger.info("worker %d of %s started for %s", world.rank, segment.owner, names)
        try:
            if not run_stages(segment, world, host, group, teachers, startup_s):
                return
        except Interrupted as interruption:
            logger.info("worker %d of %s leaves its node: %s", world.rank, segment.owner, interruption)
            if world.rank == 0:
                ray.get(host.leave.remote())
            return
        if world.rank == 0:
            ray.get(host.finish.remote(number))
        del taken, segment  # the next one may be long in coming


def _start_worker(runtime: RuntimeConfig, group: PlacementGroup, worker_nodes: list[str]) -> World:
    """Settings of this process, made once."""
    prepare_process(max(1, int(runtime.cpus_per_worker)))
    configure_logging()
    context = ray.train.get_context()
    here = [i for i, node in enumerate(worker_nodes) if node == ray.get_runtime_context().get_node_id()]
    configure_data(group, runtime, here[context.get_local_rank()])
    return World(context.get_world_rank(), context.get_world_size(), get_device())


def run_stages(
    segment: Segment, world: World, host: Any, group: PlacementGroup, teachers: Teachers | None, startup_s: float
) -> bool:
    """Runs every stage of a segment, skipping what an earlier attempt committed; False: no further one may start.

    Args:
        startup_s: seconds that the start of the group took; 0: it was up.
    """
    has_validation = world.rank == 0 and bool(validation_bundles(segment.recipe, segment.stages))
    validation = SideValidation(segment, group, world.size) if has_validation else None
    meeting = Meeting(host, world)
    for stage in segment.stages:
        if segment.store.has(stage.key):
            continue
        if not ray.get(segment.broker.admit.remote(segment.owner, stage.fingerprint)):
            return False
        began = time.monotonic()
        try:
            require_precision(stage.precision, world.device, "runtime.amp")
            if stage.kind == "train":
                facts = _train(segment, stage, world, host, teachers, validation)
            elif stage.kind == "label":
                facts = _label(segment, stage, world, meeting)
            else:
                facts = evaluate_stage(segment, stage, world, meeting)
        except FATAL:
            reason = f"{stage.name}: {traceback.format_exc()}"
            ray.get(segment.broker.fail.remote(segment.owner, stage.fingerprint, reason))
            raise
        if world.rank == 0:
            facts |= {"stage_seconds": time.monotonic() - began, "startup_seconds": startup_s}
            num_devices = devices_of(segment, world.size)
            facts |= {"num_workers": world.size, "num_devices": num_devices, "device": str(world.device)}
            facts["owner"] = segment.owner
            facts |= {"computed_on": ray.get(segment.broker.computed_on.remote(segment.owner))}
            startup_s = 0.0  # the group's start counts once, for its first stage
            segment.store.commit(stage, facts)
            if stage.kind == "label":  # blocks that a resumed labelling would have found
                segment.store.delete_folder(f"labels/{stage.fingerprint}")
            if stage.config.get("refresh_steps"):  # its teacher's versions
                segment.store.delete_folder(versions_folder(stage.fingerprint))
            ray.get(segment.broker.finish.remote(stage.fingerprint, facts["stage_seconds"] * num_devices))
            if validation is not None:
                validation.forget(stage)
        meeting.wait()
    if validation is not None:
        validation.close()
    return True


def _train(
    segment: Segment,
    stage: Stage,
    world: World,
    host: Any,
    teachers: Teachers | None,
    validation: SideValidation | None,
) -> dict[str, Any]:
    """A train stage on this worker; the first one writes the artifact's model and curves."""
    recipe, part = segment.recipe, TrainPart.of(stage)
    config = train_config(stage, recipe)
    images = _with_labels(segment, stage)
    online = teachers.labels(stage) if teachers is not None and stage.online is not None else None
    resume, publisher = _resumed(segment.store, stage, online, world)
    start_step = resume.step if resume else 0
    batches = TimedBatches(stage_batches(stage, images, recipe, world, start_step=start_step, online=online))
    is_elastic = recipe.runtime.is_elastic
    has_room = partial(_has_more_room, host, world) if is_elastic else lambda: False
    progress = TrainProgress(segment, stage, world.rank, publisher, batches, start_step, has_room)
    hooks = TrainHooks(
        on_log=progress.on_log,
        on_checkpoint=progress.on_checkpoint,
        on_refresh=progress.on_refresh,
        is_leaving=progress.is_leaving,
        refresh_every_steps=part.refresh_steps,
    )
    if validation is not None and is_validated(recipe, stage):
        every = recipe.evaluation.every_steps
        hooks = replace(hooks, on_snapshot=partial(validation.snapshot, stage), snapshot_every_steps=every)
    progress.start()
    model, result = train_stage(
        stage,
        batches,
        config,
        stage_run(stage, world, resume=resume, hooks=hooks),
        num_classes=len(segment.categories),
        parent=load_parent(segment.store, stage),
        gradient_checkpointing=recipe.runtime.gradient_checkpointing,
    )
    if validation is not None and is_validated(recipe, stage):
        validation.wait()
    facts = _write_trained(segment, stage, model, result, validation) if world.rank == 0 else {}
    return facts | {
        "seconds": result.seconds,
        "images_per_s": result.images_per_s,
        "num_labelled": len(images.labelled),
        "num_unlabelled": len(images.unlabelled),
        "resumed_at_step": resume.step if resume else None,
        "skipped_steps": result.num_skipped,
        **_online_facts(stage),
    }


def _has_more_room(host: Any, world: World) -> bool:
    """Whether the group is to start again with more workers; asked by all workers at once, with the same answer."""
    answer = float(world.rank == 0 and ray.get(host.has_more_room.remote()))
    return bool(world.all_reduce_sum(torch.tensor(answer, device=world.device)))


def _online_facts(stage: Stage) -> dict[str, Any]:
    """What the manifest says of the labels that a stage made as it went: nothing else in the store does."""
    if (labels := stage.online) is None:
        return {}
    return {"online": {"stage": labels.name, "fingerprint": labels.fingerprint, "config": labels.config}}


def _resumed(
    store: ArtifactStore, stage: Stage, online: OnlineLabels | None, world: World
) -> tuple[TrainState | None, Publisher | None]:
    """The state that the stage continues from and, if it refreshes its teacher, the publisher of the weights.

    A state is only of use while the weights of the teachers that label its next steps are kept.
    """
    resume = _find_checkpoint(store, stage.fingerprint)
    if resume is not None:
        logger.info("%s (%s) continues from its checkpoint at step %d", stage.name, stage.fingerprint, resume.step)
    if online is None or not online.refresh_steps:
        return resume, None
    publisher = Publisher(store, stage.fingerprint, online)
    if resume is not None and not publisher.can_resume(resume.step):
        resume = None
    if world.rank == 0:
        publisher.start(resume.step if resume else 0)
    world.barrier()
    return resume, publisher


def _write_trained(
    segment: Segment, stage: Stage, model: Segmenter | Teacher, result: TrainResult, validation: SideValidation | None
) -> dict[str, Any]:
    """Adds the model and the curves to the artifact; returns what the manifest says of the validation."""
    save_model(segment.store, stage, model, segment.categories)
    curve = result.curve
    facts: dict[str, Any] = {}
    if validation is not None:
        curve, facts = validation.finish(stage, curve)
    curves = {"curve": curve, "diagnostics": result.diagnostics}
    segment.store.add(stage, CURVES, json.dumps(curves).encode())
    return facts


def _with_labels(segment: Segment, stage: Stage) -> Images:
    """The stage's images, with the pseudo-labels that it reads."""
    images = segment.images[stage.name]
    if "labels" not in stage.parents:
        return images
    key = artifact_key("label", stage.parents["labels"])
    (labels,) = ray.get(segment.broker.table.remote(segment.store, key, (LABELS,)))
    return images.with_labels(labels)


def _label(segment: Segment, stage: Stage, world: World, meeting: Meeting) -> dict[str, Any]:
    """A label stage on this worker; the first one joins what all have labelled."""
    recipe, images = segment.recipe, segment.images[stage.name]
    job = LabelJob(segment.store, stage, images, segment.broker, segment.owner, recipe)
    began = time.monotonic()
    missing = job.missing(job.blocks)
    meeting.wait()  # every worker looks before any writes, so that all see the same blocks missing
    if world.rank == 0:
        job.start()
    if missing:
        labeller = PseudoLabeller(segment.store, stage, world.device)
        for batch in read_pictures(
            images.records,
            images.unlabelled,
            job.input_size,
            recipe.runtime,
            missing,
            skip_bad=True,
            handout=meeting.shared_blocks(),
        ):
            job.write(batch, labeller.label(batch))
    meeting.wait()
    if world.rank > 0:
        return {}
    facts = job.facts(missing, began) | job.join()
    audit_labels(segment.store, stage, images, recipe.runtime)
    return facts


def _find_checkpoint(store: ArtifactStore, fingerprint: str) -> TrainState | None:
    """The last state of an unfinished stage, from this run's own checkpoint or the note of an earlier run."""
    note = store.find_checkpoint(fingerprint)
    for checkpoint in (ray.train.get_checkpoint(), Checkpoint(note["uri"]) if note else None):
        if checkpoint is None:
            continue
        try:
            with checkpoint.as_directory() as folder:
                state = TrainState.load(folder, fingerprint)
        except FileNotFoundError:  # pruned after the note was written
            continue
        if state is not None:
            return state
    return None
