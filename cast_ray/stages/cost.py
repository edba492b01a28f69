"""What a stage will cost before it runs: device-seconds, from earlier runs' manifests or, without any, from FLOPs.

A manifest says how long its stage held its devices. A stage to come is compared with those of the same kind, device,
model, input size and batch (measured); failing that, of the same model and input size, per image (scaled); failing
that its floating-point operations are counted on tensors without storage and divided by an assumed speed (estimated).
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from cast_ray.recipe import ModelConfig
from cast_ray.stages.graph import Stage, SweepPlan

Source = Literal["measured", "scaled", "estimated", "unknown"]
Manifest = Mapping[str, Any]

ASSUMED_FLOPS = {"cpu": 25e9, "cuda": 30e12}
"""Useful operations a second: one thread of a server CPU (measured on `shapes`), a data centre GPU with AMP."""
TRAINING_PASSES = 3.0
"""A forward and a backward pass, in forward passes."""
NUM_KINDS = 4
"""Classes that the counted model tells apart: their number hardly matters."""


@dataclass(frozen=True)
class Estimate:
    """Device-seconds of one stage and where the number comes from."""

    device_s: float
    source: Source


@dataclass(frozen=True)
class Size:
    """How many images the stages without steps go through."""

    num_unlabelled: int
    num_val: int


class CostModel:
    """Estimates stages from the manifests of earlier ones.

    Args:
        manifests: of committed artifacts, any of them.
        device: cpu or cuda; only earlier stages on the same kind count.
    """

    def __init__(self, manifests: Iterable[Manifest], device: str):
        self.device = device
        self.exact: dict[str, list[float]] = {}
        self.scaled: dict[str, list[float]] = {}
        past = {m["fingerprint"]: m for m in manifests}
        for manifest in past.values():
            if manifest["kind"] not in ("train", "label", "evaluate") or not manifest.get("stage_seconds"):
                continue
            if not str(manifest.get("device") or device).startswith(device):
                continue
            device_s = (manifest["stage_seconds"] + (manifest.get("startup_seconds") or 0.0)) * manifest["num_workers"]
            model = _model_of(manifest, lambda fingerprint: past.get(fingerprint, {}).get("config"))
            count = manifest["steps"] or _images_seen(manifest)
            if not count:
                continue
            config, kind = manifest["config"], manifest["kind"]
            self.exact.setdefault(_exact_key(kind, config, model), []).append(device_s / count)
            images = count * (_batch(config) if kind == "train" else 1)
            self.scaled.setdefault(_scaled_key(kind, config, model), []).append(device_s / images)

    def estimate(
        self, stage: Stage, size: Size, config_of: Callable[[str], dict[str, Any] | None], count_flops: bool = True
    ) -> Estimate:
        """What one stage costs; `unknown` and 0 where nothing like it has run and its model cannot be counted.

        Args:
            size: of the dataset it runs on.
            config_of: fingerprint -> config of the stages of the plan, for the model that a stage without one runs.
            count_flops: False: do not, which saves loading torch.
        """
        model = _model_of(vars(stage), config_of)
        count = stage.steps or (size.num_unlabelled if stage.kind == "label" else _to_evaluate(stage, size))
        images = count * (_batch(stage.config) if stage.kind == "train" else 1)
        if seen := self.exact.get(_exact_key(stage.kind, stage.config, model)):
            return Estimate(statistics.median(seen) * count, "measured")
        if seen := self.scaled.get(_scaled_key(stage.kind, stage.config, model)):
            return Estimate(statistics.median(seen) * images, "scaled")
        spec = json.dumps(model, sort_keys=True)
        flops = _forward_flops(spec, tuple(stage.config["data"]["image_px"])) if count_flops else 0.0
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

    def config_of(fingerprint: str) -> dict[str, Any] | None:
        stage = plan.unique.get(fingerprint)
        return stage.config if stage else None

    by_stage = {f: model.estimate(stage, size_of(stage), config_of, count_flops) for f, stage in plan.unique.items()}
    to_run = [by_stage[stage.fingerprint] for stage in plan.to_run]
    return PlanCost(
        to_run_h=sum(e.device_s for e in to_run) / 3600,
        from_scratch_h=sum(by_stage[f].device_s * len(rows) for f, rows in plan.users.items()) / 3600,
        by_stage=by_stage,
        sources=Counter(e.source for e in to_run),
    )


def _model_of(stage: Mapping[str, Any], config_of: Callable[[str], dict[str, Any] | None]) -> dict[str, Any] | None:
    """The model that a stage runs: its own, or that of the parent it labels or evaluates with."""
    if "model" in stage["config"]:
        return stage["config"]["model"]
    parent = stage["parents"].get("teacher") or stage["parents"].get("model") or ""
    return (config_of(parent) or {}).get("model")


def _batch(config: Mapping[str, Any]) -> int:
    train = config["train"]
    return train["batch_labelled"] + train.get("batch_unlabelled", 0)


def _exact_key(kind: str, config: Mapping[str, Any], model: Any) -> str:
    work = [kind, model, config["data"]["image_px"]]
    if kind == "train":
        train, contrastive = config["train"], config["contrastive"]
        work += [train["batch_labelled"], train.get("batch_unlabelled", 0), config["loss"].get("num_points")]
        work += [contrastive and {k: contrastive.get(k) for k in ("kind", "num_negatives", "num_anchors", "pool_size")}]
    return json.dumps(work, sort_keys=True, default=list)


def _scaled_key(kind: str, config: Mapping[str, Any], model: Any) -> str:
    return json.dumps([kind, model, config["data"]["image_px"]], sort_keys=True, default=list)


def _images_seen(manifest: Manifest) -> float:
    """Images that a label or evaluate stage went through."""
    return manifest.get("num_images") or (manifest.get("images_per_s") or 0.0) * (manifest.get("seconds") or 0.0)


def _to_evaluate(stage: Stage, size: Size) -> int:
    wanted = stage.config.get("evaluation", {}).get("num_images")
    return min(wanted or size.num_val, size.num_val)


@cache
def _forward_flops(model: str, image_px: tuple[int, int]) -> float:
    """Operations of one image's forward pass; 0 where the model is not known or cannot be built here."""
    spec = json.loads(model)
    if spec is None:
        return 0.0
    import torch  # seconds to load, and needed only where nothing was ever measured

    from cast_ray.evaluation.efficiency import count_gmacs
    from cast_ray.models.segmenter import outline

    try:
        image = torch.zeros(1, 3, *image_px, dtype=torch.uint8, device="meta")
        return 2e9 * count_gmacs(outline(ModelConfig(**spec), NUM_KINDS), image)
    except (OSError, ValueError, NotImplementedError):  # weights that are not here, an operation without a meta kernel
        return 0.0
