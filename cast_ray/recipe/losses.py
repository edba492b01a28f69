"""J = L_sup + lambda_semi L_semi + lambda_pxl L_pxl: weights of the terms and every choice of the contrastive one."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cast_ray.common.registry import PATTERN
from cast_ray.recipe.part import OFF_BY_DEFAULT, Part


class LossConfig(Part):
    """J = L_sup + lambda_semi L_semi + lambda_pxl L_pxl and the weights inside the set loss."""

    lambda_semi: float = Field(1.0, ge=0)
    """Weight of the pseudo-label loss of the student. The teacher's own (1c) is 1 where this is above 0."""
    semi_view: Annotated[Literal["weak", "strong"], OFF_BY_DEFAULT] = "weak"
    """View of D_u that the student's pseudo-label loss reads. weak: the method's. strong: colours and blur make the
    task harder than the teacher's (FixMatch; Guided Distillation, with lambda_semi 2). It costs the strong view of D_u
    in the stream and, beside L_pxl, decoder and head on both views of D_u: y of L_pxl stays that of the weak one."""
    soft_targets: Annotated[Literal["off", "class", "mask", "both"], OFF_BY_DEFAULT] = "off"
    """What the student's matched queries learn of a pseudo-label. off: its class and mask, as the method's. class,
    mask, both: the class distribution (no-object included) and the mask probabilities of the teacher's query in their
    place. A teacher without queries, or one that votes, gives its score (the rest is no-object's) and the mask itself.
    """
    burn_in_fraction: Annotated[float, OFF_BY_DEFAULT] = Field(0.0, ge=0, lt=1)
    """First share of the student's steps (2b) in which L_semi has weight 0, so that it learns from D_l (and L_pxl)
    alone before pseudo-labels count. 0: the method's."""
    lambda_pxl: float = Field(0.1, ge=0)
    """Weight of L_pxl, of teacher and student alike (released: 0.1; the papers sweep 0.01 to 0.5)."""
    class_weight: float = Field(2.0, ge=0)
    """Weight of the cross-entropy of the queries' classes."""
    mask_weight: float = Field(5.0, ge=0)
    """Weight of the binary cross-entropy of the matched masks, at the sampled points."""
    dice_weight: float = Field(5.0, ge=0)
    """Weight of the dice loss of the matched masks, at the same points."""
    no_object_weight: float = Field(0.1, ge=0)
    """Weight of queries without an object inside the class term, relative to matched ones."""
    cost_class: float = Field(2.0, ge=0)
    """Class cost of the matcher (transformers' Mask2FormerLoss takes 1, newer ones the loss's own weight)."""
    cost_mask: float = Field(5.0, ge=0)
    """Cost of the masks' binary cross-entropy in the matcher."""
    cost_dice: float = Field(5.0, ge=0)
    """Cost of the masks' dice loss in the matcher."""
    num_points: int = Field(12544, ge=1)
    """Points P of each mask at which the mask terms are computed."""
    oversample_ratio: float = Field(3.0, ge=1)
    """Candidates for the uncertain points, relative to `num_points` (`exact` only)."""
    importance_ratio: float = Field(0.75, ge=0, le=1)
    """Share of the points that are the most uncertain candidates; the rest is uniform (`exact` only)."""
    exact: bool = True
    """Mask2Former's point sampling; False: faster, coarser matching points and uniform loss points."""
    proposal_weight: float = Field(1.0, ge=0)
    """Weight of the dense proposals' auxiliary loss (models with `proposals` only)."""
    pseudo_weighting: Literal["hard", "score"] = "hard"
    """Weight of a pseudo-label: 1, or the teacher's score. The terms are divided by the number of labels, not by the
    sum of their weights: a step whose only label has score 0.5 counts half."""

    extra_term: str = ""
    """A term of your own in the student's J of step 2b: `MODULE:FUNCTION`, which Python must be able to import here and
    in Ray's workers; empty: none. `FUNCTION(output, batch)` returns (sum, count), two scalar tensors of this worker's
    images; see `examples/own_loss.py`. The text of the module is part of the stage's identity."""
    extra_weight: float = Field(1.0, ge=0)
    """Weight of `extra_term`."""

    @field_validator("extra_term")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if value and not re.fullmatch(PATTERN, value):
            raise ValueError("expected MODULE:FUNCTION of a loss term of your own, or nothing")
        return value


class ContrastiveConfig(Part):
    """L_pxl. The defaults are the paper's variant of the method; `contrastive=released` is the authors' code."""

    kind: Literal["cast", "supervised", "pc2seg", "infonce", "none"] = "cast"
    """cast, or a rival: class-supervised pixel contrast, debiased pixel contrast, plain cross-view InfoNCE."""
    sampler: Literal["uniform", "mask", "class", "fusion", "oracle"] = "fusion"
    """How the negatives of an anchor are drawn. uniform: all alike. mask, class, fusion: the likelier, the more their
    predicted masks, classes or both differ from the anchor's. oracle: by the hidden truth, as a bound (`kind=cast`)."""
    scope: Literal["batch", "same-image", "cross-image"] = "batch"
    """Where negatives may lie: any pixel of the batch, the anchor's image only, the other images only."""
    estimator: Literal["sampled", "expectation"] = "sampled"
    """sampled: R negatives are drawn for each anchor. expectation: every candidate counts as often as it would be drawn
    in the mean."""
    normalise: Literal["l2", "sum"] = "l2"
    """How y is normalised before the inner product."""
    num_negatives: int = Field(64, ge=1)
    """R, drawn for each anchor."""
    num_anchors: int | None = Field(1024, ge=1)
    """Anchors drawn per image (all pixels when the map has fewer); None: all pixels."""
    pool_size: int | None = Field(4096, ge=1)
    """Candidate pixels of the batch (`gather`: of all workers') that negatives are drawn from; None: all pixels."""
    replacement: bool = True
    """Draw the R negatives with replacement (released: without, by Gumbel top-k)."""
    temperature: float = Field(0.1, gt=0)
    """T at the first step."""
    temperature_end: float | None = Field(None, gt=0)
    """T at `temperature_steps` (linear); None: constant."""
    temperature_steps: int = Field(90_000, ge=1)
    """Steps in which T goes from `temperature` to `temperature_end`."""
    hinge: float | None = None
    """max(0, s- - hinge) on the negative similarities after dividing by T; None: no hinge."""
    strong_grad: bool = True
    """Whether gradients flow into the strong view's projection."""
    head: Literal["shared", "frozen", "ema"] = "shared"
    """The strong view's projection head: the same, a frozen copy of the initial one, or a moving average."""
    head_ema: float = Field(0.99, ge=0, lt=1)
    """Decay of the moving average of `head=ema`."""
    feature_stride: int | None = Field(8, ge=1)
    """Stride of the encoder map that is projected: the coarsest one not above this; None: the coarsest of all."""
    projection_dims: tuple[int, ...] = (128, 128)
    """Widths of the MLP after the encoder's own; the last is D."""
    projection_bias: bool = True
    """Whether the layers of that MLP have biases."""
    gather: bool = True
    """Negatives from the images of all Train workers, as if they were one batch; else each worker's own only, and the
    law of the loss depends on their number."""
    diagnostics_every_steps: int = Field(20, ge=1)
    """Steps between two points of margin, false-negative rate and the other diagnostics."""

    @model_validator(mode="after")
    def _only_the_oracle_sees_hidden_truth(self) -> ContrastiveConfig:
        if self.sampler == "oracle" and self.kind not in ("cast", "none"):
            raise ValueError(
                f"contrastive.sampler is oracle with contrastive.kind {self.kind}: expected kind cast, for the hidden "
                "truth that the oracle reads would reach a rival's loss"
            )
        return self


# What the method's two descriptions say, field by field. The paper leaves R, T, the head's widths and the map open:
# there the fields keep their values.
CONTRASTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "kind": "cast",
        "sampler": "fusion",
        "normalise": "l2",
        "scope": "batch",
        "gather": True,
        "estimator": "sampled",
        "temperature_end": None,
        "hinge": None,
        "strong_grad": True,
        "head": "shared",
    },
    "released": {
        "kind": "cast",
        "sampler": "class",
        "normalise": "sum",
        "scope": "cross-image",
        "gather": False,
        "estimator": "sampled",
        "num_negatives": 200,
        "replacement": False,
        "num_anchors": None,
        "pool_size": None,
        "temperature": 0.3,
        "temperature_end": 0.07,
        "temperature_steps": 90_000,
        "hinge": 0.5,
        "strong_grad": False,
        "head": "frozen",
        "feature_stride": None,
        "projection_dims": (128, 128, 128),
        "projection_bias": False,
    },
}
