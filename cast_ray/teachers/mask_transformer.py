"""Large mask transformers by transformers (Mask2Former, MaskFormer, EoMT, EoMT-DINOv3) as teachers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    Mask2FormerForUniversalSegmentation,
    MaskFormerForInstanceSegmentation,
)

from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category, Predictions
from cast_ray.models.cast_network import CastNetwork, TrainedNetwork
from cast_ray.models.checkpoints import load_model, load_processor, processed_hw
from cast_ray.models.postprocess import predict_instances
from cast_ray.recipe import ContrastiveConfig, InputSize, PromptConfig, TeacherConfig
from cast_ray.teachers.prompts import texts_of
from cast_ray.teachers.protocol import Teacher, checkpoint_layers

CHECKPOINT = "teacher.mask_transformer.checkpoint"
MODELS = {
    "mask2former": Mask2FormerForUniversalSegmentation,
    "maskformer": MaskFormerForInstanceSegmentation,
    "eomt": EomtForUniversalSegmentation,
    "eomt_dinov3": EomtDinov3ForUniversalSegmentation,
}
PLAIN = ("eomt", "eomt_dinov3")
"""Model types that are a plain ViT."""
SIZE_MULTIPLE = 32
"""What images are padded to, so that backbones and pixel decoders halve them evenly."""


class MaskTransformer(nn.Module):
    """A checkpoint as a `MaskClassifier`: predictions of the dataset's classes for each layer, and backbone maps.

    Args:
        model: one of MODELS.
        processor: size and normalisation of its images.
        labels_of: per class the labels of the checkpoint that mean it.
        resizes: whether images come at their own size and are resized as the processor does; else they are taken as
            they are. A plain ViT resizes in any case.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: Any, processor: Any, labels_of: Sequence[Sequence[int]], resizes: bool = False):
        super().__init__()
        self.model, self.processor, self.resizes = model, processor, resizes
        self.labels_of = [list(labels) for labels in labels_of]
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1) * 255, persistent=False)

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain ViT, which takes one size of image and has one map."""
        return self.model.config.model_type in PLAIN

    @property
    def feature_dims(self) -> dict[int, int]:
        settings = self.model.config
        if self.is_plain:
            return {settings.patch_size: settings.hidden_size}
        widths = self._backbone().channels
        return {32 // 2 ** (len(widths) - 1 - i): width for i, width in enumerate(widths)}

    def _backbone(self) -> Any:
        return self.model.model.pixel_level_module.encoder

    def encoder_layers(self) -> list[list[nn.Parameter]]:
        """The backbone's parameters, as one layer."""
        if not self.is_plain:
            return [list(self._backbone().parameters())]
        return [[*self.model.embeddings.parameters(), *self.model.layers.parameters()]]

    def anneal(self, progress: float) -> None:
        """Nothing: a published EoMT has been annealed."""

    def checkpoint_activations(self) -> list[nn.Module]:
        return checkpoint_layers(self.model)

    def encode(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Backbone maps of uint8 [B, 3, H, W]: stride -> float [B, D, h, w]."""
        pixels = self._pixels(images)
        if not self.is_plain:
            shares = self._shares(images, pixels)
            return {s: _cut(x, shares) for s, x in zip(self.feature_dims, self._backbone()(pixels).feature_maps)}
        model = self.model
        states = model.embeddings(pixels)
        rotary = getattr(model, "rope_embeddings", None)  # of DINOv3, whose patches have no learnt positions
        positions = {"position_embeddings": rotary(pixels)} if rotary else {}
        for layer in model.layers[: model.num_hidden_layers - model.config.num_blocks]:
            states = layer(states, None, **positions)
        return {model.config.patch_size: self._as_map(states)}

    def _as_map(self, states_BTD: torch.Tensor) -> torch.Tensor:
        patches = states_BTD[:, self.model.embeddings.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.model.grid_size)

    def forward(self, images: torch.Tensor) -> Predictions:
        """Predictions of uint8 [B, 3, H, W], masks over the padded image cut back to it."""
        pixels = self._pixels(images)
        with self._kept_maps() as maps, self._kept_layers() as layers:
            extra = {} if self.is_plain else {"output_auxiliary_logits": True}
            out = self.model(pixel_values=pixels, **extra)
        if not self.is_plain:
            pairs = [(a["class_queries_logits"], a["masks_queries_logits"]) for a in out.auxiliary_logits or []]
            layers = [*pairs, (out.class_queries_logits, out.masks_queries_logits)]
        features = dict(zip(self.feature_dims, maps[0]))
        shares = (1.0, 1.0) if self.is_plain else self._shares(images, pixels)
        return Predictions(
            [self._of_dataset(logits) for logits, _ in layers],
            [_cut(masks, shares) for _, masks in layers],
            {stride: _cut(x, shares) for stride, x in features.items()},
            {},
        )

    def _of_dataset(self, logits_BQL: torch.Tensor) -> torch.Tensor:
        """[B, Q, C+1] of the checkpoint's own labels; several labels of one class add up their probabilities.

        Labels that no class means count as no object.
        """
        used = {label for labels in self.labels_of for label in labels}
        others = [label for label in range(logits_BQL.shape[-1]) if label not in used]
        groups = [*self.labels_of, others]
        return torch.stack([logits_BQL[..., group].float().logsumexp(-1) for group in groups], dim=-1)

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        if self.is_plain:
            side = self.model.config.image_size
            return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        height, width = self._seen_hw(images)
        if (height, width) != tuple(images.shape[-2:]):
            pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
        return F.pad(pixels, (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE))

    def _seen_hw(self, images: torch.Tensor) -> tuple[int, int]:
        """Height and width of images as the model sees them, without padding."""
        height, width = images.shape[-2], images.shape[-1]
        if self.resizes:
            wanted = processed_hw(self.processor, height, width)
            height, width = (max(1, round(side)) for side in wanted)
        return height, width

    def _shares(self, images: torch.Tensor, padded: torch.Tensor) -> tuple[float, float]:
        """How much of a padded image's height and width is the image."""
        height, width = self._seen_hw(images)
        return height / padded.shape[-2], width / padded.shape[-1]

    @contextmanager
    def _kept_maps(self) -> Iterator[list[list[torch.Tensor]]]:
        """The backbone's maps of the forward passes inside."""
        kept: list[list[torch.Tensor]] = []
        if self.is_plain:
            first = self.model.layers[self.model.num_hidden_layers - self.model.config.num_blocks]
            num = self.model.config.num_queries
            hook = first.register_forward_pre_hook(lambda _, args: kept.append([self._as_map(args[0][:, num:])]))
        else:
            hook = self._backbone().register_forward_hook(lambda _, __, out: kept.append(list(out.feature_maps)))
        try:
            yield kept
        finally:
            hook.remove()

    @contextmanager
    def _kept_layers(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """EoMT's predictions of every layer, of which its output holds the last only."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        if not self.is_plain:
            yield kept
            return

        def predict(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            masks, classes = type(self.model).predict(self.model, states)
            kept.append((classes, masks))
            return masks, classes

        self.model.predict = predict
        try:
            yield kept
        finally:
            del self.model.predict


def _cut(maps_BDHW: torch.Tensor, shares: tuple[float, float]) -> torch.Tensor:
    """The part of maps over a padded image that lies over the image itself."""
    height, width = (max(1, round(side * share)) for side, share in zip(maps_BDHW.shape[-2:], shares))
    return maps_BDHW[..., :height, :width]


class MaskTransformerTeacher(Teacher):
    """A mask transformer, zero-shot where its labels cover the classes; fine-tuned by the same losses as a student.

    Labels of the checkpoint that no class means count as no object. Images that come at their own size are resized as
    the checkpoint's processor does; where `teacher.image_px` fits them into a size, they are taken as they are.
    """

    kind = "mask2former"

    def __init__(
        self,
        segmenter: MaskTransformer,
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ):
        super().__init__(config, categories, input_size)
        self.segmenter = segmenter

    @classmethod
    def load(
        cls,
        folders: dict[str, Path],
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ) -> MaskTransformerTeacher:
        folder = folders[CHECKPOINT]
        model = load_model(MODELS, folder, CHECKPOINT)
        if config.mask_transformer.unknown_classes == "add":
            known = _labels_of(model.config.id2label, categories, config.prompt)
            add_labels(model, [name for name, labels in known.items() if not labels])
        labels_of = match_labels(model.config.id2label, categories, config.prompt)
        resizes = InputSize.of(input_size).resize == "native"
        segmenter = MaskTransformer(model, load_processor(folder, CHECKPOINT), labels_of, resizes)
        return cls(segmenter, config, categories, input_size)

    @property
    def trained(self) -> nn.Module:
        return self.segmenter

    def save_weights(self, folder: Path) -> None:
        self.segmenter.model.save_pretrained(folder / "checkpoint")
        self.segmenter.processor.save_pretrained(folder / "checkpoint")

    def find(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        return predict_instances(self.segmenter, images, image_hw, resized_hw, max_detections, min_score, self.is_soft)

    def for_training(self, contrastive: ContrastiveConfig | None) -> tuple[TrainedNetwork, None]:
        return CastNetwork(self.segmenter, contrastive), None


def add_labels(model: Any, names: Sequence[str]) -> None:
    """Gives the class head a row for each new label, before no-object; their weights are random and small."""
    if not names:
        return
    head, settings = model.class_predictor, model.config
    num = settings.num_labels
    wider = nn.Linear(head.in_features, num + len(names) + 1)
    with torch.no_grad():
        wider.weight.normal_(std=0.02)
        wider.weight[:num], wider.weight[-1] = head.weight[:num], head.weight[-1]
        wider.bias[:num], wider.bias[num:-1], wider.bias[-1] = head.bias[:num], head.bias[:num].mean(), head.bias[-1]
    model.class_predictor = wider
    weights = model.criterion.empty_weight  # of transformers' own loss, which is saved with the model
    model.criterion.empty_weight = torch.cat([weights[:-1], weights.new_ones(len(names)), weights[-1:]])
    settings.id2label = {**settings.id2label, **{num + i: name for i, name in enumerate(names)}}
    settings.label2id = {name: label for label, name in settings.id2label.items()}


def match_labels(id2label: dict[int, str], categories: Sequence[Category], config: PromptConfig) -> list[list[int]]:
    """Returns for each class the checkpoint's labels: those of its synonyms if it has any, otherwise the one of its
    name.

    Raises:
        ValueError: a class without a label, or two classes with the same; names them and the nearest labels.
    """
    matched = _labels_of(id2label, categories, config)
    for name, labels in matched.items():
        if not labels:
            known = list(_by_name(id2label))
            near = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.3)
            raise ValueError(
                f"{CHECKPOINT}: the checkpoint has no label for class {name!r}: name its labels for it in "
                f"teacher.prompt.synonyms (nearest: {', '.join(near or known[:6])}), or fine-tune with "
                "teacher.mask_transformer.unknown_classes=add"
            )
    owner: dict[int, str] = {}
    for name, labels in matched.items():
        for label in labels:
            if owner.setdefault(label, name) != name:
                raise ValueError(
                    f"{CHECKPOINT}: the label {id2label[label]!r} stands for both {owner[label]!r} and {name!r}: "
                    "expected one class, name other labels in teacher.prompt.synonyms"
                )
    return list(matched.values())


def _by_name(id2label: dict[int, str]) -> dict[str, list[int]]:
    known: dict[str, list[int]] = {}
    for label, name in id2label.items():
        known.setdefault(_plain(name), []).append(int(label))
    return known


def _labels_of(id2label: dict[int, str], categories: Sequence[Category], config: PromptConfig) -> dict[str, list[int]]:
    """Name of each class, as in `class_names`, to the checkpoint's labels for it."""
    known = _by_name(id2label)
    found: dict[str, list[int]] = {}
    for name, texts in texts_of(categories, config).items():
        labels = [label for text in texts for label in known.get(_plain(text), [])]
        if not labels and name not in config.synonyms:
            labels = known.get(_plain(name), [])  # of `add_labels`, for one of several classes of one name
        found[name] = list(dict.fromkeys(labels))
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").replace("-", " ").split())
