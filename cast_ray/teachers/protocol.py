"""What every teacher is: a model that labels images, can be saved, and may be fine-tuned by the stages."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import ValidationError
from torch import nn

from cast_ray.common import registry
from cast_ray.common.files import write_atomically
from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category, Targets, class_names
from cast_ray.models.autocast import DTYPES, autocast
from cast_ray.models.cast_network import Output, TrainedNetwork
from cast_ray.models.checkpoints import quiet_transformers
from cast_ray.models.drawing import class_colours
from cast_ray.models.encoders import checkpoint_blocks
from cast_ray.recipe import ContrastiveConfig, InputSize, Precision, TeacherConfig

CARD = "teacher.json"


class TeacherTerms(Protocol):
    """The supervised terms of a teacher's network, by exact name; see `engine.objective.Criterion`."""

    weights: dict[str, float]

    def __call__(self, output: Output, targets: Sequence[Targets]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]: ...


class Teacher(nn.Module, ABC):
    """A teacher for a list of classes.

    Args:
        config: its kind's own section is read.
        categories: C classes, in the order of the labels.
        input_size: at which it is given whole images; (H, W) in pixels: fitted into it.
    """

    kind: ClassVar[str]
    takes_any_class: ClassVar[bool] = False
    """Whether a saved one can be asked for other classes than those it was saved with."""
    why_not_trained: ClassVar[str] = ""
    """Why the stages cannot fine-tune this kind, and what to do instead; empty where they can."""

    def __init__(self, config: TeacherConfig, categories: Sequence[Category], input_size: InputSize | tuple[int, int]):
        super().__init__()
        self.config = config
        self.categories = tuple(categories)
        self.input_size = InputSize.of(input_size)
        self.precision: Precision = "off"
        """What `predict` computes in; a trained teacher is saved with that of its training."""
        self.is_soft = False
        """Whether instances are to tell class_probs and mask_probs, see `to_instances`; of kinds with queries."""

    @property
    def class_names(self) -> list[str]:
        """C names, each once: see `records.class_names`."""
        return class_names(self.categories)

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        return class_colours(len(self.categories))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode()
    def predict(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]] | None = None,
        resized_hw: Sequence[tuple[int, int]] | None = None,
        max_detections: int | None = None,
        min_score: float = 0.0,
    ) -> list[Instances]:
        """Instances of each image at its own size.

        Args:
            images: uint8 [B, 3, H, W] of `views.fit_image` at `input_size`.
            image_hw: B original sizes, pixels; None: as given.
            resized_hw: B sizes inside the padding, pixels; None: no padding.
            max_detections: at most so many per image; None: `teacher.inference.max_detections`.
            min_score: least score of an instance. Masks that cannot reach it are not made, which changes no other.

        Returns:
            Per image, in falling score order.

        Raises:
            ValueError: the device has too little memory; says what to lower.
        """
        given = [(images.shape[-2], images.shape[-1])] * len(images)
        images = images.to(self.device)
        limit = max_detections or self.config.inference.max_detections
        try:
            with autocast(self.precision, self.device):
                return self.find(images, image_hw or given, resized_hw or given, limit, min_score)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"teacher.kind {self.kind!r} does not fit into the memory of {self.device} with {len(images)} images "
                f"of {images.shape[-2]}x{images.shape[-1]}: lower teacher.image_px or "
                f"teacher.inference.boxes_at_a_time ({str(error).splitlines()[0]})"
            ) from None

    @abstractmethod
    def find(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        """`predict` on the device, with all sizes given."""

    def for_training(self, contrastive: ContrastiveConfig | None) -> tuple[TrainedNetwork, TeacherTerms | None]:
        """Makes a network over this teacher's own weights, and its loss terms (None: those of a segmenter).

        Raises:
            ValueError: the kind cannot be fine-tuned.
        """
        raise ValueError(f"teacher.kind {self.kind!r} cannot be fine-tuned: {self.why_not_trained}")

    @property
    def trained(self) -> nn.Module:
        """The module that the network of `for_training` trains: a refreshed teacher takes its weights."""
        return self

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Writes models, tokenizers and processors in transformers' own format, each in its folder."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        folders: dict[str, Path],
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ) -> Teacher:
        """Loads the teacher from the folders of its checkpoints, by the recipe's field (`teacher.sam3.checkpoint`).

        Raises:
            ValueError: a checkpoint that is missing, incomplete or of another type; a class that it does not know.
        """

    @classmethod
    def parts(cls, config: TeacherConfig) -> dict[str, str]:
        """Field of each checkpoint -> its folder inside a saved teacher."""
        return {field: field.rpartition(".")[2] for field in config.checkpoint_fields()}


def checkpoint_layers(module: nn.Module) -> list[nn.Module]:
    """Makes the trained layers of transformers' models compute their activations again; returns these layers."""
    found: list[nn.Module] = []

    def visit(part: nn.Module) -> None:
        if type(part).__name__.endswith(("Layer", "Block")) and any(p.requires_grad for p in part.parameters()):
            found.append(part)
        else:
            for child in part.children():
                visit(child)

    visit(module)
    checkpoint_blocks(found)
    return found


def save_teacher(teacher: Teacher, folder: Path) -> None:
    """Writes a folder that `load_teacher` reads: `teacher.json` and the teacher's own models."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        teacher.save_weights(folder)
    card = {
        "kind": teacher.kind,
        "config": teacher.config.settings(),
        "categories": [{"id": c.id, "name": c.name} for c in teacher.categories],
        "input_size": teacher.input_size.part(),
        "precision": teacher.precision,
    }
    write_atomically(folder / CARD, json.dumps(card, indent=1))


def read_card(folder: Path) -> dict[str, Any]:
    """What `teacher.json` says.

    Raises:
        ValueError: there is none, or it is not one of ours; names the file.
    """
    try:
        card = json.loads((folder / CARD).read_text())
        TeacherConfig(**card["config"])
        if card.setdefault("precision", "off") not in ("off", *DTYPES):
            raise ValueError(f"precision is {card['precision']!r}: expected off, {' or '.join(DTYPES)}")
        return card
    except OSError:
        raise ValueError(f"no saved teacher in {str(folder)!r}: {CARD} is missing") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{folder / CARD}: not a saved teacher: {str(error).splitlines()[0]}") from None


def load_teacher(
    folder: Path,
    part: dict[str, Any] | None = None,
    input_size: InputSize | tuple[int, int] | None = None,
    categories: Sequence[Category] | None = None,
) -> Teacher:
    """A saved teacher, in evaluation mode on the CPU.

    Args:
        folder: as `save_teacher` writes it.
        part: fields of TeacherConfig that replace the saved ones (a stage's part of the recipe).
        input_size: at which it is given whole images; None: as saved.
        categories: to look for; None: as saved.

    Raises:
        ValueError: see `read_card` and `Teacher.load`; other classes of a teacher that only knows its own.
    """
    card = read_card(folder)
    config = TeacherConfig(**_merged(card["config"], part or {}))
    kind: type[Teacher] = registry.lookup("teachers", card["kind"])
    folders = {field: folder / name for field, name in kind.parts(config).items()}
    saved = [Category(**c) for c in card["categories"]]
    if categories is not None and not kind.takes_any_class and [c.name for c in categories] != [c.name for c in saved]:
        raise ValueError(f"{str(folder)!r} only knows its own classes: {', '.join(c.name for c in saved[:12])}")
    size = input_size or InputSize.read(card.get("input_size", card))  # before, images were always fitted
    teacher = kind.load(folders, config, categories or saved, size).eval()
    teacher.precision = card["precision"]
    return teacher


def _merged(saved: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    merged = dict(saved)
    for key, value in part.items():
        merged[key] = _merged(saved[key], value) if isinstance(value, dict) and key in saved else value
    return merged
