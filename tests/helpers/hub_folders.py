"""Tiny models in the hub's own format, one for each published encoder, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    SwinConfig,
    SwinForImageClassification,
)

from cast_ray.models.backbones import ARCHITECTURES

VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
HIERA = {
    "hidden_size": 8,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [8, 4, 4, 2],
    "global_attention_blocks": [3],
}


SAM2: dict[str, Any] = {
    "vision_config": {
        "backbone_config": {"model_type": "sam2_hiera_det_model", **HIERA},
        "backbone_channel_list": [64, 32, 16, 8],
        "fpn_hidden_size": 16,
    },
    "prompt_encoder_config": {"hidden_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "mlp_dim": 16,
        "iou_head_hidden_dim": 16,
    },
}


def make_sam2_video() -> Sam2VideoModel:
    """SAM2 with its memory, as which the hub's configs of the image models name themselves."""
    torch.manual_seed(3)
    sizes = ("memory_attention_hidden_size", "memory_attention_feed_forward_hidden_size", "memory_encoder_hidden_size")
    more = ("mask_downsampler_embed_dim", "memory_fuser_embed_dim", "memory_fuser_intermediate_dim")
    small = dict.fromkeys((*sizes, *more), 16) | {"memory_encoder_output_channels": 8}
    heads = {"memory_attention_num_layers": 1, "memory_attention_downsample_rate": 1}
    return Sam2VideoModel(Sam2VideoConfig(**SAM2, **small, **heads, memory_attention_num_attention_heads=1))


def make_model(name: str) -> PreTrainedModel:
    """A tiny model of the class that the hub has for an encoder's name, heads and all."""
    torch.manual_seed(3)
    kind = ARCHITECTURES[name].model_type
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**VIT, image_size=56, patch_size=14))
    if kind == "dinov2_with_registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT, image_size=56, patch_size=14))
    if kind == "dinov3_vit":
        return DINOv3ViTModel(DINOv3ViTConfig(**VIT, intermediate_size=64, num_register_tokens=2))
    if kind == "resnet":
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
        return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5))
    if kind == "swin":
        sizes = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
        return SwinForImageClassification(SwinConfig(**sizes, num_labels=5))
    if kind == "convnext":
        sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
        return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=5))
    assert kind == "sam2_hiera_det_model", kind
    return Sam2Model(Sam2Config(**SAM2))


def save_folder(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Saves `make_model(name)` and returns its weights."""
    model = make_model(name)
    model.save_pretrained(folder)
    return model.state_dict()
