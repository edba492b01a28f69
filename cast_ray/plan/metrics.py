"""Which numbers the result of a row holds: a metric that no result can have is refused before anything runs."""

from __future__ import annotations

from collections.abc import Collection

from cast_ray.common.text import nearest
from cast_ray.plan.reads import TrainStage, contrast_weight, reads_labels
from cast_ray.recipe import Recipe

ROLES = ("zero_shot", "teacher", "student", "refined", "final")
"""Models that a row evaluates; `final` is its last student, refined or not."""
OF_BOTH_KINDS = ("mask_ap", "ap50", "num_images", "num_detections")
OF_COCO = ("ap75", "ap_small", "ap_medium", "ap_large", "ar", "ar_1", "ar_10", "ar_small", "ar_medium", "ar_large")
"""Measures of COCO's evaluation that Cityscapes' own has not."""
PER_CLASS = "per_class"
"""`<role>/per_class/<class>` is the AP of one class."""
LATENCY = "latency_ms"
"""Measured for the objectives of a search alone."""
DIAGNOSTICS = ("margin", "fnr", "raw_loss", "same_image", "same_class", "temperature")
"""`<stage>/<diagnostic>` is the last one of a stage's pixel contrast."""
CONTRASTED: tuple[TrainStage, ...] = ("adapt", "selftrain", "distill")
"""Train stages that have a pixel contrast."""

_EVALUATED = [f"{role}/{measure}" for role in ROLES for measure in (*OF_BOTH_KINDS, *OF_COCO)]
_DIAGNOSED = [f"{stage}/{name}" for stage in CONTRASTED for name in DIAGNOSTICS]
_TIMED = [f"{role}/{LATENCY}" for role in ROLES]


def check_metric(name: str) -> None:
    """Checks that a row's result can have a metric.

    Raises:
        ValueError: it cannot; the message names the nearest.
    """
    role, _, measure = name.partition("/")
    if role in ROLES and measure.removeprefix(f"{PER_CLASS}/") not in ("", measure):
        return
    if is_latency(name):
        raise ValueError(f"{name!r} is measured by searches alone, as an objective")
    _check_known(name, [*_EVALUATED, *_DIAGNOSED])


def check_objective(name: str) -> None:
    """Checks that a trial of a search can have a metric: its evaluations and the latency of its models.

    Raises:
        ValueError: it cannot; the message names the nearest.
    """
    _check_known(name, [*_EVALUATED, *_TIMED])


def is_latency(name: str) -> bool:
    """Whether a metric is the latency of a model."""
    return name.endswith(f"/{LATENCY}")


def _check_known(name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown metric {name!r}{nearest(name, known)}")


def why_missing(metric: str, recipe: Recipe) -> str:
    """Returns why a row of this recipe will not have a known metric; an empty string where it can have it.

    Whether there is a teacher before adaptation may depend on the dataset; what does is left open.
    """
    first, _, measure = metric.partition("/")
    if first in CONTRASTED:
        return "" if first in _contrasted(recipe) else f"{first} has no pixel contrast"
    if measure in OF_COCO and recipe.evaluation.metric == "cityscapes":
        return f"evaluation.metric is cityscapes, which has no {measure}"
    stages = recipe.stages
    has_origin = recipe.needs_foundation or stages.pretrain.steps > 0
    if first == "refined" and not (stages.use_refine and stages.refine.steps):
        return "stages.use_refine is false" if not stages.use_refine else "stages.refine.steps is 0"
    if (first == "zero_shot" and not has_origin) or (first == "teacher" and not has_origin and not stages.use_adapt):
        return "nothing gives a row such a teacher (stages.pretrain.steps is 0)"
    if measure == LATENCY and first in ("teacher", "zero_shot") and recipe.teacher.kind != "expert":
        return f"teacher.kind is {recipe.teacher.kind}, and only an expert's latency is measured"
    return ""


def _contrasted(recipe: Recipe) -> Collection[str]:
    """The train stages of a recipe that have a pixel contrast."""
    runs = {"adapt": recipe.stages.use_adapt, "selftrain": reads_labels(recipe, "selftrain"), "distill": True}
    return [stage for stage in CONTRASTED if runs[stage] and contrast_weight(recipe, stage) > 0]
