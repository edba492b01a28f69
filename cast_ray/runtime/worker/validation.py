"""Validation beside training: snapshots of a stage's weights, measured by a separate actor.

Training only copies its weights and continues; the actor works from a placement group that the segment reserved with
its own, so that it neither waits for the trainer's resources nor takes them. Each measured point is a file below the
storage path, which a restarted stage finds again. Train's own `ValidationConfig` is not used: what it measures reaches
the checkpoint records and never Tune or the stage (Ray 2.60).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cast_ray.plan.graph import Stage, input_size_of
from cast_ray.plan.stage_parts import TrainPart
from cast_ray.recipe import ModelConfig, Recipe, RuntimeConfig
from cast_ray.runtime.data.resources import configure_data, stream_bundle, validator_bundle
from cast_ray.runtime.process_settings import prepare_process
from cast_ray.runtime.store.artifacts import ArtifactStore

if TYPE_CHECKING:
    import torch

    from cast_ray.runtime.worker.measuring import ValidationSet
    from cast_ray.runtime.worker.segment import Segment

MAX_WAITING = 2
"""Snapshots that wait for the actor. Of a stage that outruns it the next ones are left out, not piled up."""


def validation_bundles(recipe: Recipe, stages: Sequence[Stage] | None = None) -> list[dict[str, float]]:
    """What validation beside training reserves: the tasks of its stream, then its actor; [] where there is none.

    Args:
        recipe: recipe of the row.
        stages: those that will run; None: any may.
    """
    if not recipe.evaluation.every_steps or (stages is not None and not any(is_validated(recipe, s) for s in stages)):
        return []
    return [stream_bundle(recipe.runtime), validator_bundle(recipe.runtime)]


def is_validated(recipe: Recipe, stage: Stage) -> bool:
    """Whether snapshots of a stage are measured: of segmenters only, not of teachers made of published checkpoints."""
    every = recipe.evaluation.every_steps
    return stage.kind == "train" and 0 < every < stage.steps and TrainPart.of(stage).segmenter is not None


class SideValidation:
    """The trainer's end, held by the first worker: hands snapshots over and puts the points into the curve."""

    def __init__(self, segment: Segment, group: PlacementGroup, num_workers: int):
        self.segment, self.group, self.num_workers = segment, group, num_workers
        self.actor: Any = None
        self.pending: dict[int, ray.ObjectRef] = {}
        self.skipped: list[int] = []

    def snapshot(self, stage: Stage, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Has the weights after `step` steps measured, unless the actor is behind or an earlier attempt did so."""
        from safetensors.torch import save

        from cast_ray.runtime.worker.measuring import ValidationSet

        images = ValidationSet.of(self.segment, input_size_of(stage))
        if _find_point(self.segment.store, stage.fingerprint, step, _rules(images)) is not None:
            return
        refs = list(self.pending.values())
        waiting = ray.wait(refs, num_returns=len(refs), timeout=0)[1] if refs else []
        if len(waiting) > MAX_WAITING:
            self.skipped.append(step)
            return
        if self.actor is None:
            self.actor = self._start()
        segmenter = TrainPart.of(stage).segmenter
        assert segmenter is not None, stage.name  # see `is_validated`
        self.pending[step] = self.actor.validate.remote(stage, segmenter, images, step, save(dict(weights)))

    def _start(self) -> Any:
        runtime = self.segment.recipe.runtime
        resources = validator_bundle(runtime)
        bundle = self.num_workers  # after the workers' streams: the actor's stream, then the actor
        return Validator.options(  # type: ignore[attr-defined]
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0.0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle + 1),
        ).remote(self.segment.store, self.group, bundle, runtime, self.segment.broker, self.segment.owner)

    def wait(self) -> None:
        """Returns when the snapshots that were handed over are measured, however long that takes."""
        refs = list(self.pending.values())
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=None)

    def finish(self, stage: Stage, curve: list[dict[str, float]]) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """Collects the stage's points; its last snapshots must have been waited for.

        Returns:
            the curve with `val/mask_ap` and `val/ap50` at the steps that were measured, and facts for the manifest:
            steps skipped, and those that failed with the reason.
        """
        from cast_ray.runtime.worker.measuring import ValidationSet

        failed: dict[str, str] = {}
        for step, ref in self.pending.items():
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:  # the weights are right without it
                failed[str(step)] = str(error).strip().splitlines()[-1]
        images = ValidationSet.of(self.segment, input_size_of(stage))
        every = images.settings.every_steps
        points = [
            point
            for step in range(every, stage.steps, every)
            if (point := _find_point(self.segment.store, stage.fingerprint, step, _rules(images))) is not None
        ]
        facts = {"validated": len(points), "skipped": self.skipped, "failed": failed}
        self.pending, self.skipped = {}, []
        return with_points(curve, points), {"validation": facts}

    def forget(self, stage: Stage) -> None:
        """Removes the points of a committed stage: its curve holds them."""
        self.segment.store.delete(f"validations/{stage.fingerprint}")

    def close(self) -> None:
        if self.actor is not None:
            ray.kill(self.actor)


# It holds no state, so that Ray may start another one in its place, with the snapshots that it had not measured. Its
# room is pinned to one node: where that is lost, the whole worker group moves (`WorkerGroup._is_broken`).
@ray.remote(max_restarts=-1, max_task_retries=-1)
class Validator:
    """The measuring end: one snapshot after the other."""

    def __init__(
        self,
        store: ArtifactStore,
        group: PlacementGroup,
        bundle: int,
        runtime: RuntimeConfig,
        broker: Any,
        owner: str,
    ):
        import torch

        prepare_process(max(1, int(runtime.cpus_per_worker)))
        configure_data(group, runtime, bundle)
        self.store, self.broker, self.owner = store, broker, owner
        if ray.get_runtime_context().was_current_actor_reconstructed:
            broker.note.remote(owner, "the process of its validation was lost; another one measures what is left")
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")

    def validate(
        self,
        stage: Stage,
        model: ModelConfig,
        images: ValidationSet,
        step: int,
        weights: bytes,
    ) -> None:
        """Measures one snapshot and writes its point."""
        import numpy as np
        from safetensors.torch import load

        from cast_ray.evaluation.measures import metrics_of
        from cast_ray.models.segmenter import build_segmenter
        from cast_ray.runtime.worker.measuring import measure
        from cast_ray.teachers.expert import ExpertTeacher

        segmenter = build_segmenter(model, len(images.categories), seed=0)
        segmenter.load_state_dict(load(weights))
        teacher = ExpertTeacher(segmenter, images.categories, images.input_size).to(self.device)
        teacher.precision = stage.precision
        matches = measure(teacher, images, np.arange(images.num_images), self.device)
        numbers = metrics_of(matches, images.categories)
        point = {"step": step, "rules": _rules(images), "val/mask_ap": numbers["mask_ap"], "val/ap50": numbers["ap50"]}
        self.store.write_json(_path(stage.fingerprint, step), point)
        if numbers["mask_ap"] is not None:
            self.broker.validated.remote(self.owner, stage.name, numbers["mask_ap"])


def with_points(curve: Sequence[dict[str, float]], points: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """A curve with validation points, in its own entry where one of that step exists."""
    entries = {entry["step"]: dict(entry) for entry in curve}
    for point in points:
        values = {k: v for k, v in point.items() if k.startswith("val/") and v is not None}
        entries.setdefault(point["step"], {"step": point["step"]}).update(values)
    return [entries[step] for step in sorted(entries)]


def _rules(images: ValidationSet) -> dict[str, Any]:
    """What a point depends on beside the weights."""
    settings = images.settings.model_dump(include={"metric", "max_detections"})
    return settings | {"num_images": images.num_images}


def _path(fingerprint: str, step: int) -> str:
    return f"validations/{fingerprint}/{step:08d}.json"


def _find_point(store: ArtifactStore, fingerprint: str, step: int, rules: dict[str, Any]) -> dict[str, Any] | None:
    found = store.find_bytes(_path(fingerprint, step))
    point = json.loads(found) if found else None
    return point if point and point["rules"] == rules else None
