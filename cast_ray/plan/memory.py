"""Estimates of the memory that a worker of a stage needs, for the plan. Imports torch."""

from __future__ import annotations

from cast_ray.engine.memory import MemoryEstimate, estimate_inference_memory, estimate_memory
from cast_ray.plan.cost import seen_size
from cast_ray.plan.graph import Stage
from cast_ray.plan.stage_parts import Model, TrainPart, train_config
from cast_ray.recipe import ModelConfig, Recipe


def inference_memory(
    stage: Stage, recipe: Recipe, model: Model | None, num_classes: int, image_hw: tuple[int, int] | None
) -> int | None:
    """What one worker of a label or evaluate stage needs, for a plan; see `estimate_inference_memory`.

    Args:
        model: that the stage runs; None: unknown.
        num_classes: C.
        image_hw: height and width of a typical image of the dataset; None: unknown.

    Returns:
        Bytes; None of a teacher from checkpoints, or where the size of its images is unknown.
    """
    seen_hw = seen_size(stage, image_hw)
    if not isinstance(model, ModelConfig) or seen_hw is None:
        return None
    images = recipe.label_batch if stage.kind == "label" else recipe.evaluation.batch
    return estimate_inference_memory(
        model,
        num_classes=num_classes,
        image_px=seen_hw,
        images=images,
        half=stage.precision != "off",
    )


def stage_memory(stage: Stage, recipe: Recipe, num_classes: int) -> MemoryEstimate | None:
    """What one worker of a train stage needs, for a plan; see `estimate_memory`. None: a teacher from checkpoints."""
    part, runtime = TrainPart.of(stage), recipe.runtime
    segmenter, crop_px = part.segmenter, part.crop_px
    if segmenter is None or crop_px is None:
        return None  # its architecture is known once its checkpoints are here; images of any size have no one answer
    return estimate_memory(
        segmenter,
        train_config(stage, recipe),
        num_classes=num_classes,
        image_px=crop_px,
        contrastive=part.contrastive,
        num_workers=runtime.least_workers,
        half=stage.precision != "off",
        gradient_checkpointing=runtime.gradient_checkpointing,
        semi_strong=part.is_semi_strong,
    )
