"""Published encoder architectures by name, and their weights from a hub-format folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    ConvNextBackbone,
    Dinov2Backbone,
    Dinov2WithRegistersBackbone,
    DINOv3ViTBackbone,
    PretrainedConfig,
    PreTrainedModel,
    ResNetBackbone,
    Sam2HieraDetModel,
    Sam2Model,
    Sam2VisionModel,
    SwinBackbone,
)

from cast_ray.recipe import EncoderConfig

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What the pixels of every published encoder here are normalised with."""

MODELS: dict[str, type[PreTrainedModel]] = {
    "convnext": ConvNextBackbone,
    "dinov2": Dinov2Backbone,
    "dinov2_with_registers": Dinov2WithRegistersBackbone,
    "dinov3_vit": DINOv3ViTBackbone,
    "resnet": ResNetBackbone,
    "sam2_hiera_det_model": Sam2HieraDetModel,
    "swin": SwinBackbone,
}
# A whole SAM2 holds the encoder inside; the hub's configs call it a video model.
_INSIDE_SAM2 = {"sam2": Sam2Model, "sam2_video": Sam2Model, "sam2_vision_model": Sam2VisionModel}
# Norms of the maps, which classification checkpoints do not have: made anew.
_NEW_IN_A_BACKBONE = "hidden_states_norms."


@dataclass(frozen=True)
class Architecture:
    """model_type: transformers' own name; settings: of its config."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)


def _dinov2(size: str, dim: int, layers: int) -> dict[str, Architecture]:
    settings = {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": dim // 64,
        "image_size": 518,
        "patch_size": 14,
    }
    return {
        f"dinov2-{size[0]}": Architecture("dinov2", settings),
        f"dinov2-{size[0]}-reg": Architecture("dinov2_with_registers", settings),
        # As EoMT has it, for images of 640 px.
        f"dinov2-{size[0]}-reg16": Architecture(
            "dinov2_with_registers", settings | {"image_size": 640, "patch_size": 16}
        ),
    }


ARCHITECTURES: dict[str, Architecture] = {
    **_dinov2("small", 384, 12),
    **_dinov2("base", 768, 12),
    **_dinov2("large", 1024, 24),
    "dinov3-s": Architecture("dinov3_vit", {"num_register_tokens": 4}),
    "dinov3-l": Architecture(
        "dinov3_vit",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "num_register_tokens": 4,
        },
    ),
    "resnet50": Architecture("resnet"),
    "sam2-s": Architecture(
        "sam2_hiera_det_model",
        {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    ),
    "swin-t": Architecture("swin"),
    "swin-s": Architecture("swin", {"depths": [2, 2, 18, 2]}),
    # Its config's default sizes are tuples, which the backbone class does not take.
    "convnext-t": Architecture("convnext", {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}),
}
"""settings: what differs from the defaults of transformers' config class. Their published weights are in
`recipe.models.PUBLISHED_ENCODERS`."""


def build_backbone(config: EncoderConfig, known: Architecture, saved: dict[str, Any] | None = None) -> PreTrainedModel:
    """The transformers backbone of an encoder.

    Args:
        config: name and checkpoint.
        known: architecture of the name, used where no checkpoint brings its own.
        saved: config of the backbone inside a saved model: built with random weights, whatever `config.checkpoint`
            says, since the saved weights follow.

    Raises:
        ValueError: the checkpoint is missing, of another model type or incomplete.
    """
    if saved is not None:
        settings = MODELS[known.model_type].config_class.from_dict(saved)
    elif config.checkpoint:
        return _load(config, known)
    else:
        settings = AutoConfig.for_model(known.model_type, **known.settings)
    return MODELS[known.model_type](_with_stages(settings))


def _load(config: EncoderConfig, known: Architecture) -> PreTrainedModel:
    source = config.source
    where = f"encoder.checkpoint {source!r}"
    if not source:
        raise ValueError(f"encoder.checkpoint is 'hub': the encoder {config.name!r} has no published weights")
    try:
        settings = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{where}: no model to load: {_first_line(error)}") from None
    expected = {known.model_type} | (set(_INSIDE_SAM2) if known.model_type == "sam2_hiera_det_model" else set())
    if settings.model_type not in expected:
        raise ValueError(
            f"{where} holds a model of type {settings.model_type!r}: encoder {config.name!r} expects "
            f"{' or '.join(sorted(expected))}"
        )
    kind = _INSIDE_SAM2.get(settings.model_type, MODELS[known.model_type])
    try:
        # Float32 whatever the file has: half-precision weights are for inference.
        model, report = kind.from_pretrained(
            source, config=_with_stages(settings), dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{where}: the weights cannot be loaded: {_first_line(error)}") from None
    inside = {Sam2Model: "vision_encoder.backbone", Sam2VisionModel: "backbone"}.get(kind, "")
    missing = sorted(k for k in report["missing_keys"] if k.startswith(inside) and _NEW_IN_A_BACKBONE not in k)
    if missing:  # transformers would train them from random values, with a warning
        raise ValueError(
            f"{where} lacks {len(missing)} weights of the encoder {config.name!r}: {', '.join(missing[:3])}"
        )
    return model.get_submodule(inside) if inside else model


def _with_stages(settings: PretrainedConfig) -> PretrainedConfig:
    """Hierarchical backbones give the map of every stage but the stem's; the others are walked layer by layer."""
    if settings.model_type in ("convnext", "resnet", "swin"):
        settings.out_features = settings.stage_names[1:]
    return settings


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
