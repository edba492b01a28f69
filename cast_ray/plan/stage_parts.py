"""What a stage's configuration means: the typed parts that running it needs."""

from __future__ import annotations

from cast_ray.plan.graph import HOW_IT_RUNS, Stage
from cast_ray.recipe import Recipe, TrainConfig


def train_config(stage: Stage, recipe: Recipe) -> TrainConfig:
    """The optimisation part of a train stage, and of the recipe what changes no result.

    A stage without D_u takes no unlabelled images.
    """
    how: TrainConfig = getattr(recipe.stages, stage.name)
    part = {"batch_unlabelled": 0} | stage.config["train"]
    return TrainConfig(**part, **how.model_dump(include=set(HOW_IT_RUNS)))


def is_semi_strong(stage: Stage) -> bool:
    """Whether L_semi of a train stage reads the strong view of D_u."""
    return stage.config["loss"].get("semi_view") == "strong"


def order_seed(stage: Stage) -> int:
    """Seed of the order of a train stage's images, of their views and of the points its losses sample."""
    return stage.config.get("order_seed", stage.config["seed"])
