"""Inside a Train worker: the stages of a segment, one after the other.

Kept apart from `workers.py` because it imports torch and transformers (some 8 s of CPU time): row drivers and Train's
controllers load that file, never this one.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device
from ray.util.placement_group import PlacementGroup
from safetensors.torch import load as load_tensors

from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.world import World
from cast_ray.evaluation.coco_ap import mask_ap
from cast_ray.recipe import DataConfig
from cast_ray.runtime.models import WEIGHTS, load_labeller, load_teacher, save_model
from cast_ray.runtime.store import ArtifactStore
from cast_ray.runtime.streams import configure_data, picture_dataset, pictures, training_stream
from cast_ray.runtime.workers import Segment
from cast_ray.stages.evaluate import coco_results
from cast_ray.stages.graph import Stage, artifact_key
from cast_ray.stages.train import train_config, train_stage

POST_EVERY_S = 1.0

# Met again by every restart of the workers, unlike a lost process, a broken connection or a full disk.
FATAL = (ValueError, TypeError, KeyError, AttributeError, AssertionError, FloatingPointError, torch.OutOfMemoryError)


def run_stages(segment: Segment, group: PlacementGroup) -> None:
    """The loop of one worker: every stage of the segment, skipping what an earlier attempt committed."""
    if ray.get(segment.broker.failure.remote(segment.owner)):
        return  # a restart after a fatal error: nothing to try again
    torch.set_num_threads(max(1, int(segment.recipe.runtime.cpus_per_worker)))
    context = ray.train.get_context()
    configure_data(group, segment.recipe.runtime, context.get_world_rank())
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    startup_s = time.time() - segment.requested
    for stage in segment.stages:
        if segment.store.has(stage.key):
            continue
        began = time.monotonic()
        try:
            facts = _train(segment, stage, world) if stage.kind == "train" else _evaluate(segment, stage, world)
        except FATAL:
            reason = f"{stage.name}: {traceback.format_exc()}"
            ray.get(segment.broker.fail.remote(segment.owner, reason))
            raise
        if world.rank == 0:
            facts |= {"stage_seconds": time.monotonic() - began, "startup_seconds": startup_s}
            facts |= {"num_workers": world.size, "device": str(world.device)}
            startup_s = 0.0  # the group's start counts once, for its first stage
            segment.store.commit(stage, facts)
            ray.get(segment.broker.finish.remote(stage.fingerprint))
        world.barrier()


def _train(segment: Segment, stage: Stage, world: World) -> dict[str, Any]:
    store, recipe = segment.store, segment.recipe
    config = train_config(stage, recipe)
    images = segment.images[stage.name]
    resume = _find_checkpoint(store, stage.fingerprint)
    weights, teacher = None, None
    if "kind" in stage.config["model"]:  # a teacher that starts from checkpoints, not from a segmenter's fields
        key = artifact_key("train", stage.parents["init"])
        teacher = load_teacher(store, key, stage.config["model"], tuple(stage.config["data"]["image_px"]))
    elif "init" in stage.parents:
        weights = load_tensors(store.read_bytes(artifact_key("train", stage.parents["init"]), WEIGHTS))
    data = DataConfig(**recipe.data.model_dump() | stage.config["data"])
    contrastive = stage.config["contrastive"]
    batches = training_stream(
        images,
        data,
        batch_labelled=config.batch_labelled,
        batch_unlabelled=config.batch_unlabelled if stage.config["unlabelled"] else 0,
        steps=config.steps,
        start_step=resume.step if resume else 0,
        seed=stage.config["seed"],
        rank=world.rank,
        world_size=world.size,
        strong=bool(contrastive),
        oracle=bool(contrastive) and contrastive["sampler"] == "oracle",
        cpus_per_read=recipe.runtime.cpus_per_read,
    )
    post = {"stage": stage.name, "fingerprint": stage.fingerprint, "steps": config.steps, "unit": "step"}
    posted = 0.0

    def on_log(entry: dict[str, float]) -> None:
        nonlocal posted
        now = time.monotonic()
        if world.rank == 0 and (now - posted > POST_EVERY_S or entry["step"] == config.steps):
            posted = now
            segment.broker.post.remote(segment.owner, post | {k: entry[k] for k in ("step", "loss", "images_per_s")})

    def on_checkpoint(state: TrainState) -> None:
        name = f"{stage.fingerprint}-{state.step:08d}"
        metrics = {"step": state.step, "stage": stage.name, "loss": state.curve[-1]["loss"] if state.curve else None}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if world.rank == 0:
                state.save(folder)
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        if world.rank == 0:
            run = ray.train.get_context().get_experiment_name()
            store.note_checkpoint(stage.fingerprint, store.uri("train", run, name), state.step)

    if world.rank == 0:
        segment.broker.post.remote(segment.owner, post | {"step": resume.step if resume else 0})
    model, result = train_stage(
        stage,
        num_classes=len(segment.categories),
        initial_weights=weights,
        teacher=teacher,
        batches=batches,
        world=world,
        train_config=config,
        amp=recipe.runtime.amp,
        gradient_checkpointing=recipe.runtime.gradient_checkpointing,
        resume=resume,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
    )
    if world.rank == 0:
        save_model(store, stage, model, segment.categories)
        curves = {"curve": result.curve, "diagnostics": result.diagnostics}
        store.add(stage, "curves.json", json.dumps(curves).encode())
    return {
        "seconds": result.seconds,
        "images_per_s": result.images_per_s,
        "num_labelled": len(images.labelled),
        "num_unlabelled": len(images.unlabelled),
        "resumed_at_step": resume.step if resume else None,
    }


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


def _evaluate(segment: Segment, stage: Stage, world: World) -> dict[str, Any]:
    store, recipe = segment.store, segment.recipe
    image_px = tuple(stage.config["data"]["image_px"])
    settings = stage.config["evaluation"]
    teacher = load_labeller(store, stage, "model", world.device, recipe.runtime.amp)
    num_images = min(segment.num_val, settings["num_images"] or segment.num_val)
    mine = np.arange(num_images)[world.rank :: world.size]
    assert segment.val is not None
    table = ray.get(segment.val).slice(0, num_images)
    ids = table.column("image_id").to_pylist()
    results: list[dict[str, Any]] = []
    began = time.monotonic()
    post = {"stage": "evaluate", "fingerprint": stage.fingerprint, "steps": len(mine), "unit": "image"}
    done, posted = 0, 0.0
    for batch in pictures(picture_dataset(segment.val, mine, image_px, recipe.runtime.cpus_per_read), image_px):
        results += coco_results(
            teacher,
            torch.from_numpy(batch.pixels).to(world.device),
            [ids[mine[p]] for p in batch.positions],
            batch.image_hw,
            batch.resized_hw,
            teacher.categories,
            settings["max_detections"],
        )
        done += len(batch.positions)
        if world.rank == 0 and time.monotonic() - posted > POST_EVERY_S:
            posted = time.monotonic()
            rate = done * world.size / max(posted - began, 1e-9)
            segment.broker.post.remote(segment.owner, post | {"step": done, "images_per_s": rate})
    seconds = time.monotonic() - began
    if done != len(mine):
        raise RuntimeError(f"evaluate: {len(mine)} images went in, {done} came out")
    store.add(stage, f"results-{world.rank:03d}.json", json.dumps(results).encode())
    world.barrier()
    if world.rank != 0:
        return {}
    for rank in range(1, world.size):
        results += store.read_json(stage.key, f"results-{rank:03d}.json")
    metrics = mask_ap(table, results, teacher.categories)
    store.add(stage, "metrics.json", json.dumps(metrics).encode())
    return {"seconds": seconds, "images_per_s": num_images / max(seconds, 1e-9)}
