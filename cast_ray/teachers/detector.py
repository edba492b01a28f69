"""Grounding DINO and MM-Grounding-DINO by transformers: boxes and classes from an image and a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert
from transformers import GroundingDinoForObjectDetection, MMGroundingDinoForObjectDetection

from cast_ray.losses.teacher.detector import QueryDetections
from cast_ray.models.checkpoints import load_model, load_processor, load_tokenizer, processed_hw
from cast_ray.models.postprocess import groups_of_equal_size
from cast_ray.teachers.prompts import Prompt

MODELS = {
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}
BERT_SPECIAL_IDS = (101, 102, 1012)
"""[CLS], [SEP] and the full stop, by which transformers' models find the phrases of a prompt."""
SIZE_MULTIPLE = 32
"""The size of training images is a multiple of this, so that the backbone's maps cover them edge to edge."""


@dataclass(frozen=True)
class FoundBoxes:
    """Boxes of one image, best first: corners float [N, 4] in 0..1 of the image, labels int64 [N], scores float [N]."""

    corners: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor


class TextDetector(nn.Module):
    """A detector with its tokenizer and image processor.

    Args:
        model: (MM-)Grounding-DINO.
        tokenizer: of its text encoder.
        processor: size and normalisation of its images.
        field: of the recipe, for messages.

    Raises:
        ValueError: the tokenizer is not BERT's.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: Any, tokenizer: Any, processor: Any, field: str):
        super().__init__()
        found = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.convert_tokens_to_ids("."))
        if found != BERT_SPECIAL_IDS:
            raise ValueError(
                f"{field}: the tokenizer's [CLS], [SEP] and '.' are {found}: expected BERT's {BERT_SPECIAL_IDS}, by "
                "which the detector tells the classes of a prompt apart"
            )
        self.model = model
        self.tokenizer, self.processor = tokenizer, processor
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1) * 255, persistent=False)

    @classmethod
    def load(cls, folder: Path, field: str) -> TextDetector:
        """Loads the detector from a folder in the hub's format. Raises ValueError, see `load_model`."""
        return cls(
            load_model(MODELS, folder, field), load_tokenizer(folder, field), load_processor(folder, field), field
        )

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @property
    def max_tokens(self) -> int:
        settings = self.model.config
        return min(settings.max_text_len, settings.text_config.max_position_embeddings)

    @property
    def feature_dims(self) -> dict[int, int]:
        """stride -> channels of the backbone's maps."""
        settings = self.model.config.backbone_config
        first = getattr(settings, "patch_size", 4)
        widths = self.model.model.backbone.conv_encoder.intermediate_channel_sizes
        return {first * 2 ** (i - 1): width for i, width in zip(settings.out_indices, widths, strict=True)}

    def backbone_parameters(self) -> list[nn.Parameter]:
        return list(self.model.model.backbone.parameters())

    def text_encoder(self) -> nn.Module:
        return self.model.model.text_backbone

    def forward(
        self, images: torch.Tensor, prompt: Prompt, num_classes: int
    ) -> tuple[QueryDetections, dict[int, torch.Tensor]]:
        """Predictions of a batch of training images, with gradients.

        Args:
            images: uint8 [B, 3, H, W].
            prompt: of all images.
            num_classes: C.

        Returns:
            QueryDetections, and the backbone's maps: stride -> float [B, D, h, w], edge to edge with the image.
        """
        pixels = self.training_pixels(images)
        with self._shared_backbone() as kept:
            out, text_mask = self._run(pixels, None, prompt)
        num = len(images)
        token_map = prompt.token_map(num_classes, self.model.config.max_text_len).expand(num, -1, -1)
        logits, boxes = self._layers(out, text_mask)
        first_logits, first_boxes = self._proposals(out)
        found = QueryDetections([first_logits, *logits], [first_boxes, *boxes], token_map)
        return found, dict(zip(self.feature_dims, kept[0]))

    def encode(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Returns the backbone's maps of training images alone, see `forward`."""
        features = self.model.model.backbone.conv_encoder.model(self.training_pixels(images)).feature_maps
        return dict(zip(self.feature_dims, features))

    def training_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Whole images at the size that the processor would give them, rounded to a multiple of 32, normalised."""
        wanted = processed_hw(self.processor, images.shape[-2], images.shape[-1])
        rounded = [max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in wanted]
        pixels = F.interpolate(images.float(), size=rounded, mode="bilinear", align_corners=False, antialias=True)
        return (pixels - self.pixel_mean) / self.pixel_std

    def detect(
        self,
        images: Sequence[torch.Tensor],
        prompts: Sequence[Prompt],
        num_classes: int,
        score_threshold: float,
        max_detections: int,
    ) -> list[FoundBoxes]:
        """The best boxes of each image over all prompts.

        The score of query k for class c is the mean probability of the tokens of c's best phrase. The best pairs of
        query and class are taken, so one box may appear with several classes.

        Args:
            images: B of uint8 [3, h, w], of any sizes, on the device.
            prompts: that together hold every class.
            num_classes: C.

        Source: the scores of MMDetection's Grounding DINO. The backbone runs once for all prompts. Deviations: only
        images of one size run together, because the padding of a mixed batch reaches into its features: an image's
        boxes must not depend on its neighbours.
        """
        found: dict[int, FoundBoxes] = {}
        for members in groups_of_equal_size([tuple(image.shape) for image in images]):
            inputs = self.processor(images=[images[b] for b in members], return_tensors="pt", device=images[0].device)
            scores, boxes = [], []
            with self._shared_backbone():
                for prompt in prompts:
                    out, text_mask = self._run(inputs["pixel_values"], inputs["pixel_mask"], prompt)
                    logits, corners = self._layers(out, text_mask, last_only=True)
                    scores.append(prompt.class_scores(logits[-1].float().sigmoid(), num_classes))
                    boxes.append(box_convert(corners[-1].float(), "cxcywh", "xyxy").clamp(0, 1))
            for b, scores_QC, corners_Q4 in zip(members, torch.cat(scores, 1), torch.cat(boxes, 1)):
                found[b] = _best(scores_QC, corners_Q4, score_threshold, max_detections)
        return [found[b] for b in range(len(images))]

    def _run(self, pixels: torch.Tensor, pixel_mask: torch.Tensor | None, prompt: Prompt) -> tuple[Any, torch.Tensor]:
        ids = prompt.input_ids.expand(len(pixels), -1)
        out = self.model.model(
            pixel_values=pixels,
            pixel_mask=pixel_mask,
            input_ids=ids,
            token_type_ids=torch.zeros_like(ids),
            attention_mask=torch.ones_like(ids),
            return_dict=True,
        )
        return out, torch.ones_like(ids, dtype=torch.bool)

    def _layers(
        self, out: Any, text_mask: torch.Tensor, last_only: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Token logits and boxes of every decoder layer; the model's own forward gives the last layer's only."""
        hidden_BLQD = out.intermediate_hidden_states
        num_layers = hidden_BLQD.shape[1]
        token_logits, boxes = [], []
        for layer in range(num_layers - 1 if last_only else 0, num_layers):
            reference = out.intermediate_reference_points[:, layer - 1] if layer else out.init_reference_points
            states = hidden_BLQD[:, layer]
            token_logits.append(
                self.model.class_embed[layer](
                    vision_hidden_state=states,
                    text_hidden_state=out.encoder_last_hidden_state_text,
                    text_token_mask=text_mask,
                )
            )
            offset = self.model.bbox_embed[layer](states).float()
            boxes.append((offset + torch.special.logit(reference.float(), eps=1e-5)).sigmoid())
        return token_logits, boxes

    def _proposals(self, out: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's own predictions at the places that became queries."""
        best_BQ = out.enc_outputs_class.max(-1).values.topk(self.model.config.num_queries, dim=1).indices
        logits = out.enc_outputs_class.gather(1, best_BQ[..., None].expand(-1, -1, out.enc_outputs_class.shape[-1]))
        boxes = out.enc_outputs_coord_logits.gather(1, best_BQ[..., None].expand(-1, -1, 4))
        return logits, boxes.float().sigmoid()

    @contextmanager
    def _shared_backbone(self) -> Iterator[list[list[torch.Tensor]]]:
        """Runs the image backbone once for all calls inside; yields its maps, there after the first call."""
        backbone = self.model.model.backbone
        run = type(backbone).forward
        kept: list[list[torch.Tensor]] = []
        first: list[tuple[Any, Any]] = []

        def forward(pixels: torch.Tensor, mask: torch.Tensor) -> tuple[list[Any], list[Any]]:
            if not first:
                first.append(run(backbone, pixels, mask))
                kept.append([features for features, _ in first[0][0]])
            maps, positions = first[0]
            return list(maps), list(positions)  # the model appends to them

        backbone.forward = forward
        try:
            yield kept
        finally:
            del backbone.forward


def _best(scores_QC: torch.Tensor, corners_Q4: torch.Tensor, score_threshold: float, max_detections: int) -> FoundBoxes:
    num_classes = scores_QC.shape[1]
    top, index = scores_QC.flatten().topk(min(max_detections, scores_QC.numel()))
    index, top = index[top > score_threshold], top[top > score_threshold]
    return FoundBoxes(corners_Q4[index // num_classes], index % num_classes, top)
