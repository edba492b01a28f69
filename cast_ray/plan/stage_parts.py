"""Typed views of what a stage's configuration says.

`Stage.config` is plain data, because it is what a fingerprint covers and what a manifest keeps. Code that runs,
costs or describes a stage reads it through the view of the stage's kind. Each field is read when it is asked for, so
that manifests of earlier versions, which may lack some, can be looked at too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

from cast_ray.plan.graph import Stage
from cast_ray.recipe import (
    ContrastiveConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    PseudoConfig,
    Recipe,
    TrainConfig,
)
from cast_ray.recipe.part import CHANGES_NO_RESULT, marked


@dataclass(frozen=True)
class PublishedTeacher:
    """A teacher that starts from published checkpoints, which tell its architecture.

    settings: the fields of TeacherConfig that its training depends on, with its kind (`TeacherConfig.training_part`).
    """

    settings: Mapping[str, Any]


Model: TypeAlias = ModelConfig | PublishedTeacher
"""What a train stage trains: a segmenter that is built from its fields, or a teacher from checkpoints."""


def is_published(model: Mapping[str, Any]) -> bool:
    """Returns whether a stage's `model` is a teacher from published checkpoints: only those name their kind."""
    return "kind" in model


@dataclass(frozen=True)
class StagePart:
    """What the stages of all kinds say."""

    config: Mapping[str, Any]
    kind: ClassVar[str]

    @classmethod
    def of(cls, stage: Stage) -> Self:
        """Returns the view of a stage, which must be of the view's kind."""
        assert stage.kind == cls.kind, stage.kind
        return cls(stage.config)

    @property
    def split(self) -> dict[str, Any]:
        """How D_l and D_u were chosen, see `graph.split_part`. Stages that read neither have none."""
        return self.config["split"]

    @property
    def reads_extra(self) -> bool:
        """Whether D_u may hold images of the extra pool."""
        return self.split.get("pool", "rest") != "rest"

    @property
    def teacher_settings(self) -> dict[str, Any] | None:
        """Fields of TeacherConfig that the stage's teacher is read out with; None: those it was saved with."""
        return self.config.get("teacher")


@dataclass(frozen=True)
class TrainPart(StagePart):
    """What a train stage says."""

    kind = "train"

    @property
    def model(self) -> Model:
        """The segmenter or the teacher that is trained."""
        fields = self.config["model"]
        return PublishedTeacher(fields) if is_published(fields) else ModelConfig(**fields)

    @property
    def segmenter(self) -> ModelConfig | None:
        """The segmenter that is trained; None where it is a teacher from published checkpoints."""
        model = self.model
        return model if isinstance(model, ModelConfig) else None

    @property
    def is_on_source(self) -> bool:
        """Whether it trains on the dataset's source style instead of D_l and D_u."""
        return self.config.get("source", False)

    @property
    def batch_labelled(self) -> int:
        return self.config["train"]["batch_labelled"]

    @property
    def batch_unlabelled(self) -> int:
        """Images of D_u in each step; 0 of a stage that reads none."""
        return self.config["train"].get("batch_unlabelled", 0)

    @property
    def has_average(self) -> bool:
        """Whether it keeps an average of the weights."""
        return self.config["train"]["ema"] > 0

    @property
    def loss(self) -> LossConfig:
        return LossConfig(**self.config["loss"])

    @property
    def is_semi_strong(self) -> bool:
        """Whether L_semi reads the strong view of D_u."""
        return self.config["loss"].get("semi_view") == "strong"

    @property
    def contrastive(self) -> ContrastiveConfig | None:
        """Settings of L_pxl; None: there is none."""
        return ContrastiveConfig(**self.config["contrastive"]) if self.config["contrastive"] else None

    @property
    def crop_px(self) -> tuple[int, int] | None:
        """Height and width of the crops that it trains on, pixels; None: it trains on whole images."""
        data = self.config["data"]
        return None if data.get("whole_images") else (data["image_px"][0], data["image_px"][1])

    @property
    def copy_paste(self) -> float:
        """Probability that an image gets instances of another one pasted over it."""
        return self.config["data"].get("copy_paste", 0.0)

    def data(self, recipe: Recipe) -> DataConfig:
        """The recipe's data settings with this stage's own views and sizes."""
        return DataConfig(**recipe.data.model_dump() | self.config["data"])

    @property
    def init_seed(self) -> int:
        """Seed of the initial weights."""
        return self.config.get("init_seed", self.config["seed"])

    @property
    def order_seed(self) -> int:
        """Seed of the order of the images, of their views and of the points that the losses sample."""
        return self.config.get("order_seed", self.config["seed"])

    @property
    def refresh_steps(self) -> int:
        """Steps that one version of a refreshed teacher labels; 0: the teacher stays as it is."""
        return self.config.get("refresh_steps", 0)


@dataclass(frozen=True)
class LabelPart(StagePart):
    """What a label stage says."""

    kind = "label"

    @property
    def pseudo(self) -> PseudoConfig:
        """How predictions become labels."""
        return PseudoConfig(**self.config["pseudo"])

    @property
    def batch(self) -> int:
        """Images of a teacher's forward pass."""
        return self.config["batch"]

    @property
    def num_folds_held_out(self) -> int:
        """Into how many parts D_l is cut of which it labels one; 0: it labels D_u."""
        fold = self.config.get("split", {}).get("fold")
        return fold["of"] if fold else 0

    @property
    def is_soft(self) -> bool:
        """Whether labels also tell what the teacher believed."""
        return self.config.get("soft", False)

    @property
    def passes(self) -> float:
        """How often the teacher looks at each image, in passes at the image's own size: a vote asks several times."""
        pseudo = self.config.get("pseudo", {})
        return (1 + pseudo.get("vote_flip", False)) * sum(scale**2 for scale in pseudo.get("vote_scales", (1.0,)))


@dataclass(frozen=True)
class EvaluatePart(StagePart):
    """What an evaluate stage says."""

    kind = "evaluate"

    @property
    def settings(self) -> EvaluationConfig:
        """How the model is measured; the size of a forward pass, which changes no metric, is the default."""
        return EvaluationConfig(**self.config["evaluation"])

    @property
    def num_images(self) -> int | None:
        """Validation images that it measures on at most; None: all."""
        return self.config.get("evaluation", {}).get("num_images")


def train_config(stage: Stage, recipe: Recipe) -> TrainConfig:
    """Returns the optimisation settings of a train stage: its own, and from the recipe those that change no result.

    A stage without D_u takes no unlabelled images.
    """
    how: TrainConfig = getattr(recipe.stages, stage.step)
    part = {"batch_unlabelled": 0} | stage.config["train"]
    return TrainConfig(**part, **how.model_dump(include=set(marked(TrainConfig, CHANGES_NO_RESULT))))
