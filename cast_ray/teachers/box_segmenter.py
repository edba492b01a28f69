"""SAM2 by transformers: a mask for each box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam2Model

from cast_ray.models.checkpoints import load_model, load_processor

MODELS = {"sam2": Sam2Model, "sam2_video": Sam2Model}
"""The hub's SAM2 checkpoints call themselves video models; an image needs none of their memory."""


class BoxSegmenter(nn.Module):
    """A SAM2 with the size and normalisation of its images.

    Args:
        model: its image encoder is never trained here.
        processor: of its images.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model, self.processor = model, processor
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    @classmethod
    def load(cls, folder: Path, field: str) -> BoxSegmenter:
        """Loads the segmenter from a folder in the hub's format. Raises ValueError, see `load_model`."""
        return cls(load_model(MODELS, folder, field), load_processor(folder, field))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @property
    def side_px(self) -> int:
        """Height and width of the square that every image is resized to."""
        return self.model.prompt_encoder.input_image_size

    @property
    def mask_px(self) -> int:
        """Height and width of its masks."""
        return self.model.backbone_feature_sizes[0][0]

    def embed(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Image embeddings, finest first, each computed once however many boxes follow.

        Args:
            images: B of uint8 [3, h, w], of any sizes.

        Returns:
            float [B, D, h, w] each. Gradients flow into the mask decoder's own projections of them alone.
        """
        size = [self.side_px, self.side_px]
        pixels = torch.cat(
            [F.interpolate(i[None].float(), size=size, mode="bilinear", antialias=True) / 255 for i in images]
        )
        model = self.model
        with torch.no_grad():
            maps = model.vision_encoder((pixels - self.pixel_mean) / self.pixel_std, return_dict=True).fpn_hidden_states
        fine, middle, coarse = maps
        no_memory = model.no_memory_embedding.transpose(1, 2)[..., None]
        return [model.mask_decoder.conv_s0(fine), model.mask_decoder.conv_s1(middle), coarse + no_memory]

    def masks(
        self, embeddings: Sequence[torch.Tensor], image: torch.Tensor, corners: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One mask for each box.

        Args:
            embeddings: of `embed`.
            image: int64 [K], the image of each box.
            corners: float [K, 4], x0, y0, x1, y1 in 0..1 of the image.

        Returns:
            mask logits [K, h, w] that cover the image edge to edge, and predicted IoUs [K], 0..1.
        """
        out = self.model(
            image_embeddings=[maps[image] for maps in embeddings],
            input_boxes=(corners * self.side_px)[:, None],
            multimask_output=False,
        )
        return out.pred_masks[:, 0, 0], out.iou_scores[:, 0, 0]

    @torch.no_grad()
    def masks_in_parts(
        self, embeddings: Sequence[torch.Tensor], image: torch.Tensor, corners: torch.Tensor, boxes_at_a_time: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes masks like `masks`, without gradients, holding the decoder's activations of a few boxes at a time."""
        if not len(image):
            side = self.mask_px
            return corners.new_zeros((0, side, side)), corners.new_zeros(0)
        parts = zip(image.split(boxes_at_a_time), corners.split(boxes_at_a_time))
        found = [self.masks(embeddings, i, c) for i, c in parts]
        return torch.cat([m for m, _ in found]), torch.cat([q for _, q in found])
