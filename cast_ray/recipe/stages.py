"""The six steps of CAST, how each is optimised, and how pseudo-labels and evaluations are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cast_ray.recipe.part import CHANGES_NO_RESULT, OFF_BY_DEFAULT, Part


class TrainConfig(Part):
    """Optimisation of one stage. Batch sizes are global: they do not change with the number of workers."""

    steps: int = Field(400, ge=0)
    """Optimiser steps."""
    batch_labelled: int = Field(8, ge=1)
    """Labelled images of every step."""
    batch_unlabelled: int = Field(8, ge=0)
    """Unlabelled images added to every step where the row uses them; never swapped for labelled ones."""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW, for decoder and head."""
    encoder_lr_factor: float = Field(1.0, gt=0)
    """Learning rate of the encoder's last layer, relative to that of decoder and head."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer of the encoder learns at this share of the rate of the layer after it."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of AdamW."""
    decay_biases: Annotated[bool, OFF_BY_DEFAULT] = False
    """Decay biases and layer scales too, as Mask2Former and the released code do. Norms, embeddings and learnt
    positions are never decayed."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to at most this norm, taken over all parameters (of detector and segmenter apart)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises linearly to its schedule; 0: none."""
    schedule: Literal["hold-decay", "poly", "constant"] = "hold-decay"
    """Learning rate after the warm-up. hold-decay: the peak, then linear to 0. poly: the peak times (1 - step/steps) to
    the power `poly_power`. constant: the peak."""
    decay_fraction: float = Field(0.3, ge=0, le=1)
    """Last share of the steps over which hold-decay falls linearly to 0."""
    poly_power: float = 0.9
    """Exponent of the schedule `poly`."""
    ema: float = Field(0.995, ge=0, lt=1)
    """Decay of the weight average that is evaluated and handed on; 0: the raw weights."""
    checkpoint_every_steps: Annotated[int, CHANGES_NO_RESULT] = Field(200, ge=1)
    """Steps between two checkpoints, from which a stage resumes."""
    accumulate: Annotated[int, CHANGES_NO_RESULT] = Field(1, ge=1)
    """Parts in which a worker's images of a step go through the network: less memory, one more forward pass, and the
    same result."""


class StagesConfig(Part):
    """The six steps of CAST and which of them a row takes."""

    images_per_step: Literal["supervised", "total"] = "supervised"
    """What stays equal between rows with and without D_u in step 2b. supervised: the labelled images of a step, so that
    D_u adds to them. total: all images of a step, as in the published experiments: a row without D_u takes
    `batch_labelled` + `batch_unlabelled` labelled images."""
    foundation: str = ""
    """Folder of a saved teacher to use as theta_T0 instead of `pretrain` or the checkpoints that `teacher` names."""
    pretrain: TrainConfig = TrainConfig(steps=1000, batch_unlabelled=0)
    """theta_T0 of the embedded experiment: the teacher trained on the source style, in place of a foundation model."""
    adapt: TrainConfig = TrainConfig(steps=300, batch_unlabelled=0)
    """1a: theta_T0 -> theta_T' on D_l."""
    selftrain: TrainConfig = TrainConfig(steps=300)
    """1c: theta_T0 -> theta_T'' on D_l + D_u."""
    distill: TrainConfig = TrainConfig(steps=400)
    """2b: student -> theta_s* on D_l + D_u."""
    refine: TrainConfig = TrainConfig(steps=100, batch_unlabelled=0, lr=2e-4)
    """3: theta_s* -> theta_s-dagger on D_l. It fine-tunes: at the rate of 2b, which it would start at again, it would
    undo what D_u has taught; presets take a tenth of that rate or less."""
    use_adapt: bool = True
    """False: the teacher labels D_u as theta_T0 (paper table "stages")."""
    use_distill: bool = True
    """False: the student is trained on D_l only."""
    use_refine: bool = True
    """False: the student stays as step 2b leaves it."""


class PseudoConfig(Part):
    """From teacher predictions to pseudo-labels (1b, 2a)."""

    score_threshold: float = Field(0.3, ge=0, le=1)
    """A prediction is trusted when its score lies above."""
    class_thresholds: Annotated[Literal["fixed", "balanced"], OFF_BY_DEFAULT] = "fixed"
    """fixed: `score_threshold` for every class. balanced: each class has its threshold, not below that one,
    at which the predictions on D_u hold as many of it an image as D_l does (found before painting, once for all of
    D_u; not with labels.mode=online)."""
    precision: Annotated[float | None, OFF_BY_DEFAULT] = Field(None, gt=0, lt=1)
    """Share of the labels of each class that is to be right at mask IoU 0.5, for example 0.9. Each class then has the
    lowest score, not below `score_threshold`, above which this share is shown to be held on D_l, by teachers that have
    not been trained on the images they score (`precision_folds`); a class for which it cannot be shown is left
    unlabelled. Not with labels.mode=online. None: off."""
    precision_error: Annotated[float, OFF_BY_DEFAULT] = Field(0.1, gt=0, lt=1)
    """Probability, over the choice of D_l, that a class or a group of small classes falls short of `precision` all the
    same. Lower values need more labelled images."""
    precision_folds: Annotated[int, OFF_BY_DEFAULT] = Field(5, ge=2)
    """Parts of D_l. Each is scored by a teacher that is trained on the others, as steps 1a and 1c train the row's own,
    so that `precision` costs about so many times these steps; rows and precisions share them. A teacher that is not
    trained on D_l (stages.use_adapt=false) scores D_l itself."""
    mask_quality_threshold: float = Field(0.0, ge=0, le=1)
    """A prediction is trusted when its mask quality, as the teacher estimates it, is at least this; 0: not asked."""
    order: Literal["score", "detector"] = "score"
    """In which predictions are counted and painted: falling score, or as the teacher's detector returns them (the
    released code's). The embedded teacher returns them in falling score order."""
    max_per_image: int = Field(100, ge=1)
    """Most labels of an image: the first ones in `order`."""
    min_area_px: int = Field(12, ge=0)
    """A label with fewer pixels, after painting, is dropped."""
    non_overlapping: bool = True
    """Paint the masks in `order`; a pixel belongs to the first that takes it."""
    min_visible_share: Annotated[float, OFF_BY_DEFAULT] = Field(0.0, ge=0, le=1)
    """With `non_overlapping`: a prediction is dropped when a smaller share than this of its mask is still free. What is
    left of a near-duplicate is a ring around the object that took its pixels, not an object. 0: the released code's."""
    nms_iou: Annotated[float, OFF_BY_DEFAULT] = Field(1.0, gt=0, le=1)
    """Before painting, of predictions of one class whose masks overlap with at least this IoU only the one with the
    highest score stays (non-maximum suppression). 1: off."""
    vote_flip: Annotated[bool, OFF_BY_DEFAULT] = False
    """The teacher also labels each image mirrored, and the answers are fused by a vote; twice the time."""
    vote_scales: Annotated[tuple[float, ...], OFF_BY_DEFAULT] = Field((1.0,), min_length=1)
    """Scales of each image, relative to the size that it is fitted to, that the teacher labels and a vote fuses. A
    teacher whose processor has a fixed size sees that size at any of them."""
    vote_iou: float = Field(0.6, gt=0, le=1)
    """Answers of one class whose masks overlap with at least this IoU are one instance of the vote."""

    @field_validator("vote_scales")
    @classmethod
    def _scales_are_positive(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if min(scales) <= 0 or len(set(scales)) != len(scales):
            raise ValueError("expected different scales above 0, for example [1.0, 1.5]")
        return scales

    @model_validator(mode="after")
    def _one_rule_for_thresholds(self) -> PseudoConfig:
        if self.precision is not None and self.class_thresholds != "fixed":
            raise ValueError(
                f"pseudo.precision is {self.precision} and pseudo.class_thresholds {self.class_thresholds}: each class "
                "has one threshold; expected pseudo.class_thresholds=fixed, or no pseudo.precision"
            )
        return self

    @property
    def has_vote(self) -> bool:
        """Whether the teacher is asked more than once about an image."""
        return self.vote_flip or self.vote_scales != (1.0,)

    on_empty: Annotated[Literal["stop", "warn"], CHANGES_NO_RESULT] = "stop"
    """What to do when no image of the pool got a single pseudo-label."""


KINDS_OF_AP = {"coco": "COCO AP", "cityscapes": "Cityscapes AP"}
"""`evaluation.metric` -> what that AP is called, wherever it stands beside the other kind."""


class EvaluationConfig(Part):
    """How trained models are measured."""

    metric: Literal["coco", "cityscapes"] = "coco"
    """COCO's mask AP or Cityscapes' own instance AP: two numbers that cannot be compared with each other."""
    max_detections: int = Field(100, ge=1)
    """Most detections kept of an image, and with COCO's AP of each class of it: those with the highest scores."""
    batch: Annotated[int, CHANGES_NO_RESULT] = Field(16, ge=1)
    """Images of one forward pass, at most 16."""
    num_images: int | None = Field(None, ge=1)
    """Evaluate on the first so many validation images (None: all)."""
    every_steps: Annotated[int, CHANGES_NO_RESULT] = Field(0, ge=0)
    """Also validate each so many steps of a train stage, beside it and on separate resources; 0: at its end only.
    It changes no weight; stages found in the store are not validated again."""
