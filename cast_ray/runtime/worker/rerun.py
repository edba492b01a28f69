"""A stored stage run again in this process, for a debugger: without Ray, with one worker, and without a trace.

The code is the sweep's own: `train_stage`, `LabelJob`, `measure` and the functions that make their batches. What a
sweep does around them is left out: checkpoints, progress, validation beside training, and every write to the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cast_ray.contracts.instance import RecordLabel
from cast_ray.engine.loop import TrainHooks, TrainResult
from cast_ray.engine.world import World
from cast_ray.evaluation.matches import join
from cast_ray.evaluation.measures import metrics_of
from cast_ray.plan.graph import input_size_of
from cast_ray.plan.stage_parts import EvaluatePart, TrainPart, train_config
from cast_ray.runtime.data.pictures import Pictures, read_pictures
from cast_ray.runtime.store.artifact_files import LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import load_labeller
from cast_ray.runtime.worker.label_job import LabelJob
from cast_ray.runtime.worker.labeller import PseudoLabeller
from cast_ray.runtime.worker.measuring import ValidationSet, measure
from cast_ray.runtime.worker.online import VERSIONS_HELD, OnlineLabels, VersionedTeacher, learner_of
from cast_ray.runtime.worker.stored_stage import RECIPE, StoredStage
from cast_ray.runtime.worker.train import load_parent, stage_batches, stage_run, train_stage
from cast_ray.runtime.worker.train_progress import packed_weights


def train_again(
    stored: StoredStage,
    device: torch.device,
    stop_step: int | None = None,
    on_log: Callable[[dict[str, float]], None] = lambda entry: None,
) -> TrainResult:
    """Trains a stage again from the inputs of its first step on.

    Args:
        stop_step: ends after this step; None: after the stage's last.
        on_log: called with each entry of the curve.
    """
    stage, world = stored.stage, World(device=device)
    assert stored.images is not None
    online = _online_labels(stored, device) if stage.online is not None else None
    hooks = TrainHooks(on_log=on_log)
    if online is not None and online.refresh_steps:
        hooks = TrainHooks(on_log=on_log, on_refresh=online.publish, refresh_every_steps=online.refresh_steps)
    _, result = train_stage(
        stage,
        stage_batches(stage, stored.images, RECIPE, world, online=online),
        train_config(stage, RECIPE),
        stage_run(stage, world, stop_step=stop_step, hooks=hooks),
        num_classes=len(stored.categories),
        parent=load_parent(stored.store, stage),
    )
    return result


@dataclass(frozen=True)
class _LabelsMadeHere(OnlineLabels):
    """Online labels from a teacher in this process; `versions` are the published weights, by version."""

    def label(self, pictures: Pictures, version: int, turn: int) -> list[list[RecordLabel]]:
        (teacher,) = self.teachers
        weights = (lambda: self.versions[version]) if version else None
        return teacher.label_version(self.stage, self.learner, version, weights, pictures)

    def publish(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Keeps the weights after a step, a multiple of `refresh_steps`, for the steps that they label."""
        self.versions[step // self.refresh_steps] = packed_weights(weights)
        for old in sorted(self.versions)[:-VERSIONS_HELD]:
            del self.versions[old]


def _online_labels(stored: StoredStage, device: torch.device) -> _LabelsMadeHere:
    stage = stored.stage
    assert stage.online is not None
    teacher = VersionedTeacher(stored.store, RECIPE, stored.categories, device)
    return _LabelsMadeHere(stage.online, (teacher,), {}, TrainPart.of(stage).refresh_steps, learner_of(stage))


def label_again(stored: StoredStage, device: torch.device) -> tuple[pa.Table, dict[str, Any]]:
    """Labels the images of a stage again.

    Returns:
        The labels as the artifact holds them (LABEL_SCHEMA), and what `LabelJob.join` says of them.
    """
    stage, images = stored.stage, stored.images
    assert images is not None
    with tempfile.TemporaryDirectory(prefix="cast_ray-rerun-") as folder:
        job = LabelJob(ArtifactStore(folder), stage, images, broker=None, owner="", recipe=RECIPE)
        labeller = PseudoLabeller(stored.store, stage, device)
        for pictures in read_pictures(
            images.records, images.unlabelled, job.input_size, RECIPE.runtime, job.blocks, skip_bad=True
        ):
            job.write_block(pictures, labeller.label(pictures))
        facts = job.join(stored.store)
        return job.store.read_table(stage.key, LABELS), facts


def measure_again(stored: StoredStage, device: torch.device) -> dict[str, Any]:
    """Measures a stage's model again; returns the metrics."""
    stage, val = stored.stage, stored.val
    assert val is not None
    settings, size = EvaluatePart.of(stage).settings, input_size_of(stage)
    images = ValidationSet.first_of(val, val.num_rows, size, stored.categories, settings, RECIPE.runtime)
    teacher = load_labeller(stored.store, stage, "model", device)
    rows = np.arange(images.num_images)
    matches = join([measure(teacher, images, rows, device)], [rows], images.tie_order())
    return metrics_of(matches, teacher.categories)
