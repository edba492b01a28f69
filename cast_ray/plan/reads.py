"""Which stages of a recipe read D_u, and why: the one rule that the graph, the split and the sweep's checks follow."""

from __future__ import annotations

from typing import Literal

from cast_ray.recipe import Recipe

TrainStage = Literal["pretrain", "adapt", "selftrain", "distill", "refine"]

STUDENT_STAGES: tuple[TrainStage, ...] = ("refine", "distill")
"""Stages that train the student, the last first: a row's student is the model of the first of these that it has."""
TEACHER_STAGES: tuple[TrainStage, ...] = ("selftrain", "adapt", "pretrain")
"""The same for a row's teacher."""

READ_LABELS: tuple[TrainStage, ...] = ("selftrain", "distill")
"""Stages that learn from pseudo-labels where a recipe has them."""


def reads_labels(recipe: Recipe, stage: TrainStage) -> bool:
    """Returns whether a train stage has L_semi, which reads pseudo-labels of D_u: 1c and 2b, where they run."""
    if stage == "distill":
        return recipe.learns_from_teacher
    return stage == "selftrain" and recipe.stages.use_adapt and recipe.loss.lambda_semi > 0


def num_folds_of(recipe: Recipe) -> int:
    """Returns into how many folds D_l is cut to choose thresholds that hold `pseudo.precision`; 0: there are none.

    It is 1 where the teacher is not trained on D_l, and so may score all of it.
    """
    if recipe.pseudo.precision is None or not any(reads_labels(recipe, stage) for stage in READ_LABELS):
        return 0
    return recipe.pseudo.precision_folds if recipe.stages.use_adapt else 1


def contrast_weight(recipe: Recipe, stage: TrainStage) -> float:
    """Returns lambda_pxl of a train stage: the recipe's in 1a, 1c and 2b, 0 where no network or loss asks for it."""
    if recipe.contrastive.kind == "none":
        return 0.0
    if stage in ("adapt", "selftrain"):
        return recipe.loss.lambda_pxl if recipe.stages.use_adapt and recipe.teacher.has_contrast else 0.0
    return recipe.loss.lambda_pxl if stage == "distill" and recipe.stages.use_distill else 0.0


def reads_unlabelled(recipe: Recipe, stage: TrainStage) -> bool:
    """Returns whether images of D_u enter the steps of a train stage: only where a term reads them.

    L_semi reads their pseudo-labels. L_pxl alone reads their pixels in 2b; 1a and 3 are on D_l by definition.
    """
    return reads_labels(recipe, stage) or (stage == "distill" and contrast_weight(recipe, stage) > 0)


def needs_unlabelled(recipe: Recipe) -> bool:
    """Returns whether any stage of a recipe reads D_u; if none does, D_u may be empty."""
    return any(reads_unlabelled(recipe, stage) for stage in (*TEACHER_STAGES, *STUDENT_STAGES))
