"""Teachers at their published size without weights: parameters, operations and time, with nothing to download."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    PreTrainedModel,
    Sam2Config,
    Sam2Model,
    SwinConfig,
)

from cast_ray.models.checkpoints import quiet_transformers
from cast_ray.recipe import TeacherConfig
from cast_ray.teachers.box_segmenter import BoxSegmenter
from cast_ray.teachers.detector import TextDetector
from cast_ray.teachers.mask_transformer import MaskTransformer
from cast_ray.teachers.prompts import Prompt

COUNTED = ("grounded_sam", "mask2former")
"""Kinds of teachers that can be built without their checkpoints."""
NUM_BOXES = 20
"""Boxes per image with which the segmenter's share is counted."""
TOKENS_PER_CLASS = 2
SWIN: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
HIERA: dict[str, tuple[int, int, list[int], list[int], list[int]]] = {
    "tiny": (96, 1, [1, 2, 7, 2], [8, 4, 14, 7], [5, 7, 9]),
    "small": (96, 1, [1, 2, 11, 2], [8, 4, 14, 7], [7, 10, 13]),
    "base": (112, 2, [2, 3, 16, 3], [8, 4, 14, 7], [12, 16, 20]),
    "large": (144, 2, [2, 6, 36, 4], [8, 4, 16, 8], [23, 33, 43]),
}
"""Width and heads of the first stage (doubled by each further one), blocks, windows, blocks with global attention."""
# What a model takes of its image processor and tokenizer.
_PROCESSOR = SimpleNamespace(
    image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 800, "longest_edge": 1333}
)
_TOKENIZER = SimpleNamespace(cls_token_id=101, sep_token_id=102, convert_tokens_to_ids=lambda _: 1012)


def outline_teacher(config: TeacherConfig, num_classes: int, device: str = "meta") -> nn.Module:
    """A teacher from checkpoints at the size of the published ones, with random weights.

    The checkpoints are not looked at: the size is the word of their names (tiny, small, base or large; large where
    there is none). A forward pass over uint8 [B, 3, H, W] does the work of labelling; of `grounded_sam` with one prompt
    and NUM_BOXES boxes an image.

    Args:
        config: its kind, one of COUNTED.
        num_classes: C.
        device: meta: shapes alone.

    Raises:
        ValueError: an expert, which is a segmenter; sam3, whose forward pass needs the values of its tensors; an
            ensemble.
    """
    if config.kind not in COUNTED:
        raise ValueError(f"teacher.kind is {config.kind}: expected {' or '.join(COUNTED)}")
    build = _GroundedSam if config.kind == "grounded_sam" else _mask2former
    with torch.device(device), quiet_transformers():
        return build(config, num_classes).to(device).eval()


def _size(checkpoint: str, sizes: dict[str, Any]) -> Any:
    """What a checkpoint's name says; the hub's own names have one of these words."""
    name = checkpoint.rstrip("/").rpartition("/")[2]
    return sizes[next((word for word in sizes if word in name), "large")]


def _build(kind: type[PreTrainedModel], settings: Any) -> PreTrainedModel:
    model = kind(settings)
    if model.device.type == "meta":
        model.set_attn_implementation("eager")  # the fused ones look at the values of masks
    return model


@contextmanager
def _unchecked() -> Iterator[None]:
    """Switches off transformers' checks of tensors' values, because tensors on the meta device have no values."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class _GroundedSam(nn.Module):
    """MM-Grounding-DINO with Swin and SAM2 with Hiera. Of Swin-L the detector takes the finest stage too."""

    def __init__(self, config: TeacherConfig, num_classes: int):
        super().__init__()
        names = config.grounded_sam
        swin = _size(names.detector, SWIN)
        stages = [1, 2, 3, 4] if swin is SWIN["large"] else [2, 3, 4]
        settings = MMGroundingDinoConfig(
            backbone_config=SwinConfig(**swin, image_size=384, out_indices=stages),
            text_config=BertConfig(),
            num_feature_levels=len(stages) + 1,
            decoder_bbox_embed_share=False,
            decoder_cls_embed_share=False,
        )
        detector = _build(MMGroundingDinoForObjectDetection, settings)
        self.detector = TextDetector(detector, _TOKENIZER, _PROCESSOR, "teacher")
        vision = _hiera(*_size(names.segmenter, HIERA))
        sam2 = Sam2Config(vision_config=vision, prompt_encoder_config={}, mask_decoder_config={})
        self.segmenter = BoxSegmenter(_build(Sam2Model, sam2), _PROCESSOR)
        self.num_tokens = 2 + num_classes * (TOKENS_PER_CLASS + 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Mask logits [B NUM_BOXES, h, w]."""
        device = images.device
        ids = torch.full((self.num_tokens,), 2000, device=device)
        prompt = Prompt(
            ids, torch.zeros(0, self.num_tokens, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        )
        with _unchecked():
            found, _ = self.detector(images, prompt, 1)
        boxes = found.boxes[-1][:, :NUM_BOXES]
        image = torch.arange(len(images), device=device).repeat_interleave(NUM_BOXES)
        return self.segmenter.masks(self.segmenter.embed(list(images)), image, boxes.flatten(0, 1))[0]


def _hiera(width: int, heads: int, blocks: list[int], windows: list[int], global_blocks: list[int]) -> dict[str, Any]:
    """SAM2's vision encoder."""
    widths = [width * 2**stage for stage in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "num_attention_heads": heads,
        "blocks_per_stage": blocks,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "window_size_per_stage": windows,
        "global_attention_blocks": global_blocks,
    }
    return {"backbone_config": backbone, "backbone_channel_list": widths[::-1]}


def _mask2former(config: TeacherConfig, num_classes: int) -> nn.Module:
    """Mask2Former with Swin; of Swin-L the published ones have 200 queries."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    labels = {i: str(i) for i in range(num_classes)}
    swin = _size(config.mask_transformer.checkpoint, SWIN)
    settings = Mask2FormerConfig(
        backbone_config=SwinConfig(**swin, image_size=384, out_features=stages),
        num_queries=200 if swin is SWIN["large"] else 100,
        id2label=labels,
    )
    model = _build(Mask2FormerForUniversalSegmentation, settings)
    return MaskTransformer(model, _PROCESSOR, [[i] for i in range(num_classes)])
