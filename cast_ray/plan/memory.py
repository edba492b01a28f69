"""Estimates of the memory that a worker of a stage needs, for the plan. Imports torch."""

from __future__ import annotations

from typing import Any

from cast_ray.engine.memory import MemoryEstimate, estimate_inference_memory, estimate_memory
from cast_ray.plan.cost import seen_size
from cast_ray.plan.graph import Stage
from cast_ray.plan.stage_parts import is_semi_strong, train_config
from cast_ray.recipe import ContrastiveConfig, ModelConfig, Recipe


def inference_memory(
    stage: Stage, recipe: Recipe, model: dict[str, Any] | None, num_classes: int, image_hw: tuple[int, int] | None
) -> int | None:
    """What one worker of a label or evaluate stage needs, for a plan; see `estimate_inference_memory`.

    Args:
        model: part of the recipe that the stage's model is made of; None: unknown.
        num_classes: C.
        image_hw: height and width of a typical image of the dataset; None: unknown.

    Returns:
        Bytes; None of a teacher from checkpoints, or where the size of its images is unknown.
    """
    seen_hw = seen_size(stage, image_hw)
    if model is None or "kind" in model or seen_hw is None:
        return None
    images = recipe.label_batch if stage.kind == "label" else recipe.evaluation.batch
    return estimate_inference_memory(
        ModelConfig(**model),
        num_classes=num_classes,
        image_px=seen_hw,
        images=images,
        half=stage.precision != "off",
    )


def stage_memory(stage: Stage, recipe: Recipe, num_classes: int) -> MemoryEstimate | None:
    """What one worker of a train stage needs, for a plan; see `estimate_memory`. None: a teacher from checkpoints."""
    config, runtime = stage.config, recipe.runtime
    if "kind" in config["model"] or config["data"].get("whole_images"):
        return None  # its architecture is known once its checkpoints are here; images of any size have no one answer
    height, width = config["data"]["image_px"]
    return estimate_memory(
        ModelConfig(**config["model"]),
        train_config(stage, recipe),
        num_classes=num_classes,
        image_px=(height, width),
        contrastive=ContrastiveConfig(**config["contrastive"]) if config["contrastive"] else None,
        unlabelled=config["unlabelled"],
        num_workers=runtime.num_workers,
        half=stage.precision != "off",
        gradient_checkpointing=runtime.gradient_checkpointing,
        semi_strong=is_semi_strong(stage),
    )
