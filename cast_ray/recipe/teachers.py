"""Which teacher labels the unlabelled images, and how each kind is prompted, fine-tuned and read out."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cast_ray.recipe.models import ModelConfig
from cast_ray.recipe.part import CHANGES_NO_RESULT, Part, identity_of

KINDS = ("expert", "mask2former", "grounded_sam", "sam3", "ensemble")
PUBLISHED = tuple(kind for kind in KINDS if kind != "expert")
"""Kinds whose published weights label images without any training."""


class PromptConfig(Part):
    """Class names as the text that a teacher is asked with."""

    synonyms: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Class -> the words for it, instead of its name; with mask2former: the checkpoint's labels for it."""
    max_tokens: int | None = Field(None, ge=8)
    """Most tokens of one prompt; classes that do not fit go into further ones. None: as many as the model takes."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class InferenceConfig(Part):
    """From a text-prompted teacher's outputs to instances."""

    score_threshold: float = Field(0.3, ge=0, le=1)
    """Least detector's score of a label; average precision is measured without a threshold."""
    max_detections: int = Field(100, ge=1)
    """Per image."""
    rank_by: Literal["detector", "segmenter", "product"] = "detector"
    """The score of an instance: the detector's, the mask's predicted IoU, or both multiplied."""
    boxes_at_a_time: Annotated[int, CHANGES_NO_RESULT] = Field(32, ge=1)
    """Boxes that are turned into masks together: bounds memory, changes nothing else."""


class GroundedSamConfig(Part):
    """A text-prompted detector and a box-prompted segmenter. Defaults: the paper's teacher and its fine-tuning."""

    detector: str = "openmmlab-community/mm_grounding_dino_large_all"
    """Folder or hub name of a Grounding-DINO or MM-Grounding-DINO."""
    segmenter: str = "facebook/sam2.1-hiera-large"
    """Folder or hub name of a SAM2."""
    train_detector: bool = True
    """Boxes and classes; the text encoder stays frozen, the backbone learns at `encoder_lr_factor`."""
    train_segmenter: bool = True
    """Prompt encoder and mask decoder, on ground-truth boxes."""
    segmenter_lr_factor: float = Field(0.1, gt=0)
    """The segmenter's learning rate relative to the detector's: 5e-6 of 5e-5."""
    class_weight: float = Field(1.0, ge=0)
    """Weight of the focal loss between queries and the words of the classes."""
    box_weight: float = Field(5.0, ge=0)
    """Weight of the L1 distance between boxes."""
    giou_weight: float = Field(2.0, ge=0)
    """Weight of 1 - generalised IoU of boxes."""
    cost_class: float = Field(2.0, ge=0)
    """Cost of the class in the detector's matcher."""
    cost_box: float = Field(5.0, ge=0)
    """Cost of the L1 distance between boxes in the matcher."""
    cost_giou: float = Field(2.0, ge=0)
    """Cost of the generalised IoU of boxes in the matcher."""
    mask_focal_weight: float = Field(20.0, ge=0)
    """Weight of the focal loss of the segmenter's masks."""
    mask_dice_weight: float = Field(1.0, ge=0)
    """Weight of the dice loss of the segmenter's masks."""
    mask_iou_weight: float = Field(1.0, ge=0)
    """Weight of the predicted IoU's error."""
    max_prompted: int = Field(32, ge=1)
    """Ground-truth boxes of an image that the segmenter is trained on in one step, drawn at random."""
    contrast_masks: Literal["segmenter", "boxes"] = "segmenter"
    """P_m of L_pxl: the segmenter's masks of the detector's best boxes, or (cheaper) the boxes themselves."""
    contrast_queries: int = Field(50, ge=1)
    """K, the detector's best boxes that y is made of."""

    @model_validator(mode="after")
    def _trains_something(self) -> GroundedSamConfig:
        if not (self.train_detector or self.train_segmenter):
            raise ValueError(
                "train_detector and train_segmenter are both false: expected one (or stages.use_adapt=false)"
            )
        return self


class Sam3Config(Part):
    """One model from text to masks."""

    checkpoint: str = "facebook/sam3"
    """Folder or hub name."""
    prompts_at_a_time: Annotated[int, CHANGES_NO_RESULT] = Field(16, ge=1)
    """Pairs of an image and a class that are asked about together: bounds memory, changes nothing else."""
    max_asked: int = Field(8, ge=1)
    """Classes asked for in a training step: those of the images first, then others as negatives."""
    contrast_queries: int = Field(50, ge=1)
    """K, the surest answers about an image that y of L_pxl is made of."""


class MaskTransformerConfig(Part):
    """Mask2Former and its like."""

    checkpoint: str = "facebook/mask2former-swin-large-coco-instance"
    """Folder or hub name of a transformers model for universal segmentation."""
    unknown_classes: Literal["refuse", "add"] = "refuse"
    """A class that the checkpoint has no label for: an error, or a new row of the class head, which only fine-tuning
    can fill."""


class EnsembleConfig(Part):
    """Several teachers fused image by image, class by class."""

    members: tuple[str, ...] = ("grounded_sam", "sam3")
    """Kinds, each as its own section says, or folders of saved teachers."""
    iou_threshold: float = Field(0.6, gt=0, le=1)
    """Masks of one class that overlap at least so much are one instance."""
    method: Literal["vote", "nms"] = "vote"
    """vote: pixels that most of the score finds inside, score averaged over all members; nms: the surest mask wins."""


CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "mask2former": ("mask_transformer.checkpoint",),
    "grounded_sam": ("grounded_sam.detector", "grounded_sam.segmenter"),
    "sam3": ("sam3.checkpoint",),
}
"""Kind -> the fields that name its checkpoints."""


class TeacherConfig(ModelConfig):
    """The teacher. For `kind: expert` the fields of a segmenter; each other kind has a section of its own."""

    kind: Literal["expert", "mask2former", "grounded_sam", "sam3", "ensemble"] = "expert"
    """expert: a segmenter trained by the stages themselves; the others start from published checkpoints."""
    image_px: tuple[int, int] | None = None
    """Height and width that images are fitted to for this teacher, and its training crop. None: an expert sees what the
    student sees; a teacher from checkpoints sees whole images at their own size, which its own processor resizes once,
    in labelling and in training."""
    prompt: PromptConfig = PromptConfig()
    inference: InferenceConfig = InferenceConfig()
    grounded_sam: GroundedSamConfig = GroundedSamConfig()
    sam3: Sam3Config = Sam3Config()
    mask_transformer: MaskTransformerConfig = MaskTransformerConfig()
    ensemble: EnsembleConfig = EnsembleConfig()

    @model_validator(mode="after")
    def _members_are_known(self) -> TeacherConfig:
        for member in self.ensemble.members if self.kind == "ensemble" else ():
            if member not in KINDS and "/" not in member:
                kinds = ", ".join(kind for kind in PUBLISHED if kind != "ensemble")
                raise ValueError(f"ensemble.members: {member!r} is no kind ({kinds}) and no path")
            if member in ("expert", "ensemble"):
                raise ValueError(f"ensemble.members: {member!r} has no checkpoint: expected a saved teacher's folder")
        return self

    @model_validator(mode="after")
    def _checkpoint_is_of_an_expert(self) -> TeacherConfig:
        if self.checkpoint and self.kind != "expert":
            fields = " and ".join(self.checkpoint_fields()) or "no field of its own"
            raise ValueError(
                f"teacher.checkpoint is {self.checkpoint!r} and teacher.kind {self.kind}: it is read with kind expert "
                f"only, expected {fields} in its place"
            )
        return self

    @property
    def segmenter(self) -> ModelConfig:
        """What an expert is built of."""
        return ModelConfig(**self.model_dump(include=set(ModelConfig.model_fields)))

    @property
    def has_contrast(self) -> bool:
        """Whether L_pxl has weights of this teacher to train."""
        return self.kind != "grounded_sam" or self.grounded_sam.train_detector

    def checkpoint_fields(self) -> dict[str, str]:
        """Field -> folder or hub name, of every checkpoint that the kind is made of."""
        fields = [f for kind in self._kinds() for f in CHECKPOINTS.get(kind, ())]
        values: dict[str, str] = {}
        for field in fields:
            section, _, name = field.partition(".")
            values[f"teacher.{field}"] = getattr(getattr(self, section), name)
        if self.kind == "ensemble":
            values |= {f"teacher.ensemble.members[{i}]": m for i, m in enumerate(self.ensemble.members) if "/" in m}
        return values

    def _kinds(self) -> tuple[str, ...]:
        return self.ensemble.members if self.kind == "ensemble" else (self.kind,)

    def identity(self) -> dict[str, Any]:
        """What theta_T0 is made of beside the contents of its checkpoints."""
        part: dict[str, Any] = {"kind": self.kind, "prompt": identity_of(self.prompt)}
        if self.kind == "mask2former":
            part["unknown_classes"] = self.mask_transformer.unknown_classes
        if self.kind == "ensemble":
            part["ensemble"] = identity_of(self.ensemble)
        return part

    def training_part(self) -> dict[str, Any]:
        """What a train stage of the teacher depends on beside its parents."""
        if self.kind == "expert":
            return identity_of(self.segmenter)
        part: dict[str, Any] = {"kind": self.kind}
        if self.kind == "grounded_sam":
            part["grounded_sam"] = identity_of(self.grounded_sam, exclude=("detector", "segmenter"))
        if self.kind == "sam3":
            part["sam3"] = identity_of(self.sam3, exclude=("checkpoint",))
        return part

    def inference_part(self) -> dict[str, Any]:
        """What labels and evaluations of the teacher depend on beside its weights; {} where nothing."""
        if self.kind in ("expert", "mask2former"):
            return {}
        return {"inference": identity_of(self.inference)}

    def settings(self) -> dict[str, Any]:
        """All that a saved teacher keeps of this, as plain data."""
        return json.loads(self.model_dump_json())
