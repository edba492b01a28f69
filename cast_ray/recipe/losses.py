"""J = L_sup + lambda_semi L_semi + lambda_pxl L_pxl: weights of the terms and every choice of the contrastive one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cast_ray.recipe.part import Part


class LossConfig(Part):
    """J = L_sup + lambda_semi L_semi + lambda_pxl L_pxl and the weights inside the set loss."""

    lambda_semi: float = Field(1.0, ge=0)
    """Weight of the pseudo-label loss of the student. The teacher's own (1c) is 1 where this is above 0."""
    lambda_pxl: float = Field(0.1, ge=0)
    class_weight: float = Field(2.0, ge=0)
    mask_weight: float = Field(5.0, ge=0)
    dice_weight: float = Field(5.0, ge=0)
    no_object_weight: float = Field(0.1, ge=0)
    cost_class: float = Field(2.0, ge=0)
    """Class cost of the matcher (transformers' Mask2FormerLoss hard-codes 1)."""
    cost_mask: float = Field(5.0, ge=0)
    cost_dice: float = Field(5.0, ge=0)
    num_points: int = Field(12544, ge=1)
    oversample_ratio: float = Field(3.0, ge=1)
    importance_ratio: float = Field(0.75, ge=0, le=1)
    exact: bool = True
    """Mask2Former's point sampling; False: faster, coarser matching points and uniform loss points."""
    proposal_weight: float = Field(1.0, ge=0)
    """Weight of the dense proposals' auxiliary loss (models with `proposals` only)."""
    pseudo_weighting: Literal["hard", "score"] = "hard"
    """Weight of a pseudo-label: 1, or the teacher's score."""


class ContrastiveConfig(Part):
    """L_pxl. The defaults are the paper's column of the method; `contrastive=released` is the authors' code."""

    kind: Literal["cast", "supervised", "pc2seg", "infonce", "none"] = "cast"
    """cast, or a rival: class-supervised pixel contrast, debiased pixel contrast, plain cross-view InfoNCE."""
    sampler: Literal["uniform", "mask", "class", "fusion", "oracle"] = "fusion"
    scope: Literal["batch", "same-image", "cross-image"] = "batch"
    """Where negatives may lie: any pixel of the batch, the anchor's image only, the other images only."""
    estimator: Literal["sampled", "expectation"] = "sampled"
    normalise: Literal["l2", "sum"] = "l2"
    """How y is normalised before the inner product."""
    num_negatives: int = Field(64, ge=1)
    """R, drawn for each anchor."""
    num_anchors: int = Field(1024, ge=1)
    """Anchors drawn per image (all pixels when the map has fewer)."""
    pool_size: int = Field(4096, ge=1)
    """Candidate pixels of the batch from which negatives are drawn: bounds memory (anchors x pool)."""
    replacement: bool = True
    """Draw the R negatives with replacement (released: without, by Gumbel top-k)."""
    temperature: float = Field(0.1, gt=0)
    """T at the first step."""
    temperature_end: float | None = Field(None, gt=0)
    """T at `temperature_steps` (linear); None: constant."""
    temperature_steps: int = Field(90_000, ge=1)
    hinge: float | None = None
    """max(0, s- - hinge) on the negative similarities after dividing by T; None: no hinge."""
    strong_grad: bool = True
    """Whether gradients flow into the strong view's projection."""
    head: Literal["shared", "frozen", "ema"] = "shared"
    """The strong view's projection head: the same, a frozen copy of the initial one, or a moving average."""
    head_ema: float = Field(0.99, ge=0, lt=1)
    feature_stride: int = Field(8, ge=1)
    """Stride of the encoder map that is projected (0-cost rule: the coarsest map with a stride not above this)."""
    projection_dims: tuple[int, ...] = (128, 128)
    """Widths of the MLP after the encoder's own; the last is D."""
    projection_bias: bool = True
    gather: bool = False
    """All-gather the candidate pool across Train workers, so that a local batch of 1 still has negatives."""
    diagnostics_every_steps: int = Field(20, ge=1)


CONTRASTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "sampler": "class",
        "scope": "cross-image",
        "normalise": "sum",
        "num_negatives": 200,
        "replacement": False,
        "temperature": 0.3,
        "temperature_end": 0.07,
        "hinge": 0.5,
        "strong_grad": False,
        "head": "frozen",
        "feature_stride": 32,
        "projection_dims": (128, 128, 128),
        "projection_bias": False,
    },
}
