"""What a stage will cost before it runs: device-seconds, from earlier runs' manifests or, without any, from FLOPs.

A manifest says how long its stage held its devices. A stage to come is compared with those of the same kind, device,
model, input size and batch (measured); failing that, of the same model and input size, per image (scaled); failing
that its floating-point operations are counted on tensors without storage and divided by an assumed speed (estimated):
of a teacher from checkpoints those of the published size that their names tell, fetched or not.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

from cast_ray.contracts.compute_node import UNKNOWN_DEVICE, device_type
from cast_ray.contracts.manifest import LabelManifest, Manifest
from cast_ray.plan.graph import Stage, SweepPlan, input_size_of
from cast_ray.plan.stage_parts import EvaluatePart, LabelPart, TrainPart, is_published
from cast_ray.recipe import InputSize, ModelConfig, TeacherConfig

Source = Literal["measured", "scaled", "estimated", "unknown"]


class HasModel(Protocol):
    """A stage, or the manifest of one, as far as it says which model it runs."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def parents(self) -> Mapping[str, str]: ...

    @property
    def fingerprint(self) -> str: ...


ASSUMED_FLOPS = {"cpu": 25e9, "cuda": 30e12}
"""Useful operations a second: one thread of a server CPU (measured on `shapes`), a data centre GPU with AMP."""
TRAINING_PASSES = 3.0
"""A forward and a backward pass, in forward passes."""
WORK = ("train", "label", "evaluate")
"""Kinds of artifacts that devices compute."""
NUM_KINDS = 4
"""Classes that the counted model tells apart: their number hardly matters."""


@dataclass(frozen=True)
class Estimate:
    """Device-seconds of one stage and where the number comes from."""

    device_s: float
    source: Source


@dataclass(frozen=True)
class Size:
    """How many images the stages without steps go through, and how large these are.

    image_hw: height and width of a typical image of the dataset, pixels; None: unknown.
    """

    num_unlabelled: int
    num_val: int
    image_hw: tuple[int, int] | None = None
    num_labelled: int = 0


def device_types(manifests: Iterable[Manifest], device: str) -> list[str]:
    """The models of the devices that earlier stages ran on, that of the last stage first; `UNKNOWN_DEVICE` if none has.

    Args:
        device: cpu or cuda; stages on the other kind are left out.
    """
    ran = sorted((m for m in manifests if _has_run_on(m, device)), key=lambda m: -(m.committed or 0.0))
    return list(dict.fromkeys(device_type(m.computed_on) for m in ran)) or [UNKNOWN_DEVICE]


def _has_run_on(manifest: Manifest, device: str) -> bool:
    """Whether it is the manifest of a stage that has taken time on devices of a kind, or on unknown ones."""
    is_work = manifest.kind in WORK and bool(manifest.stage_seconds)
    return is_work and (manifest.device or device).startswith(device)


class CostModel:
    """Estimates stages from the manifests of earlier ones.

    Args:
        manifests: manifests of committed artifacts of any kind.
        device: cpu or cuda; only earlier stages on the same kind count.
        model: of the devices, one of `device_types`: only stages on those count; None: all.
    """

    def __init__(self, manifests: Iterable[Manifest], device: str, model: str | None = None):
        self.device = device
        self.exact: dict[str, list[float]] = {}
        self.scaled: dict[str, list[float]] = {}
        past = {m.fingerprint: m for m in manifests}
        for manifest in past.values():
            if not _has_run_on(manifest, device) or model not in (None, device_type(manifest.computed_on)):
                continue
            each_s = (manifest.stage_seconds or 0.0) + (manifest.startup_seconds or 0.0)
            device_s = each_s * manifest.known_devices
            network = _model_of(manifest, past.get)
            count = manifest.steps or _images_seen(manifest)
            if not count:
                continue
            config, kind = manifest.config, manifest.kind
            self.exact.setdefault(_exact_key(kind, config, network), []).append(device_s / count)
            images = count * _images_of(kind, config)
            self.scaled.setdefault(_scaled_key(kind, config, network), []).append(device_s / images)

    def estimate(
        self,
        stage: Stage,
        size: Size,
        find: Callable[[str], HasModel | None],
        teacher: TeacherConfig,
        count_flops: bool = True,
    ) -> Estimate:
        """What one stage costs; `unknown` and 0 where nothing like it has run and its model cannot be counted.

        Args:
            size: size of the dataset that it runs on.
            find: fingerprint -> stage of the plan, for the model that a stage without one runs.
            teacher: settings of its row's teacher, for the size of a teacher from checkpoints.
            count_flops: False: do not, which saves loading torch.
        """
        model = _model_of(stage, find)
        seen_hw = seen_size(stage, size.image_hw)
        if stage.kind == "train":
            count = stage.steps  # 0 where a stage is left out by its length
        else:
            count = _to_label(stage, size) if stage.kind == "label" else _to_evaluate(stage, size)
        images = count * _images_of(stage.kind, stage.config)
        if seen := self.exact.get(_exact_key(stage.kind, stage.config, model)):
            return Estimate(statistics.median(seen) * count, "measured")
        if seen := self.scaled.get(_scaled_key(stage.kind, stage.config, model)):
            return Estimate(statistics.median(seen) * images, "scaled")
        flops = 0.0
        if count_flops and model is not None and seen_hw is not None:
            spec = teacher.model_dump_json() if is_published(model) else json.dumps(model, sort_keys=True)
            flops = _forward_flops(spec, seen_hw)
        if not flops:
            return Estimate(0.0, "unknown")
        passes = TRAINING_PASSES * (2 if stage.config.get("contrastive") else 1) if stage.kind == "train" else 1.0
        return Estimate(images * passes * flops / ASSUMED_FLOPS[self.device], "estimated")


@dataclass(frozen=True)
class PlanCost:
    """Device-hours of a plan: of what is left to run, and of every row by itself from scratch."""

    to_run_h: float
    from_scratch_h: float
    by_stage: Mapping[str, Estimate]
    """Fingerprint -> estimate of every unique stage."""
    sources: Mapping[Source, int]
    """How many of the stages to run were estimated in which way."""


def cost_of(plan: SweepPlan, model: CostModel, size_of: Callable[[Stage], Size], count_flops: bool = True) -> PlanCost:
    """The cost of a plan.

    Args:
        size_of: images of the dataset that a stage runs on.
        count_flops: see `CostModel.estimate`.
    """
    stages = dict(plan.unique)
    teachers = {stage.fingerprint: row.recipe.teacher for row in plan.rows for stage in row.stages}
    for stage in plan.unique.values():
        for parent in stage.parents.values():
            if parent not in stages:  # what is imported is no stage
                part = teachers[stage.fingerprint].training_part()
                stages[parent] = Stage("foundation", "train", {"model": part}, {}, parent)
    by_stage = {
        f: model.estimate(stage, size_of(stage), stages.get, teachers[f], count_flops)
        for f, stage in plan.unique.items()
    }
    to_run = [by_stage[stage.fingerprint] for stage in plan.to_run]
    return PlanCost(
        to_run_h=sum(e.device_s for e in to_run) / 3600,
        from_scratch_h=sum(by_stage[f].device_s * len(rows) for f, rows in plan.users.items()) / 3600,
        by_stage=by_stage,
        sources=Counter(e.source for e in to_run),
    )


def seen_size(stage: Stage, image_hw: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width in pixels of what the model of a stage is given; None where it depends on unknown images.

    Args:
        image_hw: height and width of a typical image of the dataset, pixels; None: unknown.
    """
    size = input_size_of(stage)
    if stage.kind == "train":
        if (crop_px := TrainPart.of(stage).crop_px) is not None:
            return crop_px
        data = stage.config["data"]
        size = InputSize.read(data | {"resize": data.get("train_resize", "fit")})
        return None if image_hw is None else size.inside(*image_hw)
    if size.is_fixed:
        return size.crop_px
    return None if image_hw is None else size.padded(*image_hw)


def _model_of(stage: HasModel, find: Callable[[str], HasModel | None]) -> dict[str, Any] | None:
    """The model that a stage runs: its own, or that of the parent it labels or evaluates with.

    For a teacher from checkpoints the result also names the checkpoints, because its part of the recipe does not say
    how large they are.
    """
    model = stage.config.get("model")
    if model is not None:
        return model | {"init": stage.parents.get("init", stage.fingerprint)} if is_published(model) else model
    parent = find(stage.parents.get("teacher") or stage.parents.get("model") or "")
    return None if parent is None else _model_of(parent, find)


def _images_of(kind: str, config: Mapping[str, Any]) -> float:
    """Images that the model sees for each step or image of a stage; a vote asks about each several times."""
    if kind == "train":
        part = TrainPart(config)
        return part.batch_labelled + part.batch_unlabelled
    return LabelPart(config).passes if kind == "label" else 1.0


def _exact_key(kind: str, config: Mapping[str, Any], model: Any) -> str:
    work = [kind, model, _seen(config), _images_of(kind, config)]
    if kind == "train":
        part, contrastive = TrainPart(config), config["contrastive"]
        work += [part.batch_labelled, part.batch_unlabelled, config["loss"].get("num_points")]
        work += [contrastive and {k: contrastive.get(k) for k in ("kind", "num_negatives", "num_anchors", "pool_size")}]
        work += [config["loss"].get("semi_view", "weak")]
    return json.dumps(work, sort_keys=True, default=list)


def _scaled_key(kind: str, config: Mapping[str, Any], model: Any) -> str:
    return json.dumps([kind, model, _seen(config)], sort_keys=True, default=list)


def _seen(config: Mapping[str, Any]) -> Any:
    """The crop of a train stage, or the rule by which whole images are resized."""
    data = config["data"]
    return data.get("resize") or data.get("image_px") or "whole images"


def _images_seen(manifest: Manifest) -> float:
    """Images that a label or evaluate stage went through."""
    if isinstance(manifest, LabelManifest) and manifest.num_images:
        return manifest.num_images
    return (manifest.images_per_s or 0.0) * (manifest.seconds or 0.0)


def _to_label(stage: Stage, size: Size) -> int:
    num_folds = LabelPart.of(stage).num_folds_held_out
    return math.ceil(size.num_labelled / num_folds) if num_folds else size.num_unlabelled


def _to_evaluate(stage: Stage, size: Size) -> int:
    wanted = EvaluatePart.of(stage).num_images
    return min(wanted or size.num_val, size.num_val)


@cache
def _forward_flops(model: str, image_px: tuple[int, int]) -> float:
    """Operations of one image's forward pass; 0 where they cannot be counted.

    Args:
        model: a ModelConfig, or the TeacherConfig of a teacher from checkpoints, as JSON.
    """
    import torch  # seconds to load, and needed only where nothing was ever measured

    from cast_ray.evaluation.efficiency import count_gmacs
    from cast_ray.models.segmenter import outline
    from cast_ray.teachers.outline import outline_teacher

    spec = json.loads(model)
    try:
        if is_published(spec):
            counted = outline_teacher(TeacherConfig(**spec), NUM_KINDS)
        else:
            counted = outline(ModelConfig(**spec), NUM_KINDS)
        return 2e9 * count_gmacs(counted, torch.zeros(1, 3, *image_px, dtype=torch.uint8, device="meta"))
    except (OSError, ValueError, NotImplementedError):  # a kind that is not counted, an operation without a meta kernel
        return 0.0
