"""Teachers at their published size without weights: parameters, operations and time, with nothing to download."""

from __future__ import annotations

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
    Sam3Config,
    Sam3Model,
    SwinConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cast_ray.models.segmenter import outline
from cast_ray.recipe import TeacherConfig
from cast_ray.teachers.box_segmenter import BoxSegmenter
from cast_ray.teachers.checkpoints import quiet_transformers
from cast_ray.teachers.detector import TextDetector
from cast_ray.teachers.mask_transformer import MaskTransformer
from cast_ray.teachers.prompts import Prompt
from cast_ray.teachers.sam3 import PROMPT_TOKENS, PromptedSam3

NUM_BOXES = 20
"""Of an image: what the segmenter's share is counted with."""
TOKENS_PER_CLASS = 2
SWIN_L = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12, "image_size": 384}
HIERA_L = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 144,
    "num_attention_heads": 2,
    "blocks_per_stage": [2, 6, 36, 4],
    "embed_dim_per_stage": [144, 288, 576, 1152],
    "num_attention_heads_per_stage": [2, 4, 8, 16],
    "window_size_per_stage": [8, 4, 16, 8],
    "global_attention_blocks": [23, 33, 43],
}
# What a model takes of its image processor and tokenizer.
_PROCESSOR = SimpleNamespace(
    image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 800, "longest_edge": 1333}
)
_TOKENIZER = SimpleNamespace(cls_token_id=101, sep_token_id=102, convert_tokens_to_ids=lambda _: 1012)


def outline_teacher(config: TeacherConfig, num_classes: int, device: str = "meta") -> nn.Module:
    """A teacher of the recipe's kind at the size of its published checkpoint, with random weights.

    Its forward pass over uint8 [B, 3, H, W] does the work of labelling: for `grounded_sam` one prompt and NUM_BOXES
    boxes an image, for `sam3` one question a class.

    Args:
        config: its kind; of an expert the architecture.
        num_classes: C.
        device: meta: shapes alone.

    Raises:
        ValueError: an ensemble, whose cost is the sum of its members'.
    """
    if config.kind == "expert":
        return outline(config.segmenter, num_classes)
    if config.kind == "ensemble":
        raise ValueError("teacher.kind is ensemble: its cost is the sum of its members': expected one of them")
    kinds: dict[str, Any] = {"grounded_sam": _GroundedSam, "sam3": _Sam3, "mask2former": _mask2former}
    with torch.device(device), quiet_transformers():
        return kinds[config.kind](num_classes).to(device).eval()


def _build(kind: type[PreTrainedModel], settings: Any) -> PreTrainedModel:
    model = kind(settings)
    if model.device.type == "meta":
        model.set_attn_implementation("eager")  # the fused ones look at the values of masks
    return model


class _GroundedSam(nn.Module):
    """MM-Grounding-DINO Swin-L and SAM2.1-L."""

    def __init__(self, num_classes: int):
        super().__init__()
        settings = MMGroundingDinoConfig(
            backbone_config=SwinConfig(**SWIN_L, out_indices=[1, 2, 3, 4]),
            text_config=BertConfig(),
            num_feature_levels=5,
            decoder_bbox_embed_share=False,
            decoder_cls_embed_share=False,
        )
        detector = _build(MMGroundingDinoForObjectDetection, settings)
        self.detector = TextDetector(detector, _TOKENIZER, _PROCESSOR, "teacher")
        vision = {"backbone_config": HIERA_L, "backbone_channel_list": [1152, 576, 288, 144]}
        sam2 = Sam2Config(vision_config=vision, prompt_encoder_config={}, mask_decoder_config={})
        self.segmenter = BoxSegmenter(_build(Sam2Model, sam2), _PROCESSOR)
        self.num_tokens = 2 + num_classes * (TOKENS_PER_CLASS + 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        device = images.device
        ids = torch.full((self.num_tokens,), 2000, device=device)
        prompt = Prompt(ids, torch.zeros(0, self.num_tokens, device=device), torch.zeros(0, device=device))
        out, text_mask = self.detector._run(self.detector.training_pixels(images), None, prompt)
        boxes = self.detector._layers(out, text_mask, last_only=True)[1][-1][:, :NUM_BOXES]
        image = torch.arange(len(images), device=device).repeat_interleave(NUM_BOXES)
        return self.segmenter.masks(self.segmenter.embed(list(images)), image, boxes.flatten(0, 1))[0]


class _Sam3(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.sam3 = PromptedSam3(_build(Sam3Model, Sam3Config()), None, _PROCESSOR)
        self.num_classes = num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        device = images.device
        ids = torch.zeros((self.num_classes, PROMPT_TOKENS), dtype=torch.int64, device=device)
        mask = torch.ones_like(ids)
        text = self.sam3.model.get_text_features(input_ids=ids, attention_mask=mask)
        assert isinstance(text, BaseModelOutputWithPooling) and text.pooler_output is not None
        image = torch.arange(len(images), device=device).repeat_interleave(self.num_classes)
        words = torch.arange(self.num_classes, device=device).repeat(len(images))
        return self.sam3.ask(self.sam3.see(list(images)), (text.pooler_output, mask), image, words).masks


def _mask2former(num_classes: int) -> nn.Module:
    """Mask2Former Swin-L of 200 queries."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    labels = {i: str(i) for i in range(num_classes)}
    settings = Mask2FormerConfig(
        backbone_config=SwinConfig(**SWIN_L, out_features=stages), num_queries=200, id2label=labels
    )
    model = _build(Mask2FormerForUniversalSegmentation, settings)
    return MaskTransformer(model, _PROCESSOR, [[i] for i in range(num_classes)])
