"""Published segmentation models (Mask2Former, EoMT, EoMT-DINOv3) as the weights that a `Segmenter` starts from.

The parts of a segmenter are transformers' own modules, so that a whole published model fits into them: encoder, decoder
and head take its weights under other names, and compute the same. The class head is the one part that is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    Mask2FormerForUniversalSegmentation,
    PretrainedConfig,
    PreTrainedModel,
)

from cast_ray.models.backbones import ARCHITECTURES, IMAGENET
from cast_ray.models.checkpoints import find_checkpoint, first_line, load_model, load_processor, load_settings
from cast_ray.models.decoders import MASK_STRIDE
from cast_ray.recipe import ModelConfig

FIELD = "checkpoint"
"""Field of the recipe, for messages."""
NEW = ("head.class_head.", "encoder.backbone.embeddings.mask_token")
"""Weights of a segmenter that no published model fills: the class head, and what only pre-training reads."""
MODELS: dict[str, type[PreTrainedModel]] = {
    "mask2former": Mask2FormerForUniversalSegmentation,
    "eomt": EomtForUniversalSegmentation,
    "eomt_dinov3": EomtDinov3ForUniversalSegmentation,
}
"""transformers' model type -> class of the whole model."""


@dataclass(frozen=True)
class StartWeights:
    """What a segmenter starts from.

    source: folder or hub name; architecture: of the encoder, see `Encoder.architecture`; tensors: by the names that
    `Segmenter` has for them, without those of NEW.
    """

    source: str
    architecture: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def fill(self, segmenter: nn.Module) -> None:
        """Gives a segmenter of the same settings these weights.

        Raises:
            ValueError: a weight of another shape, one that the segmenter lacks, or the other way round.
        """
        try:
            found = segmenter.load_state_dict(self.tensors, strict=False)
        except RuntimeError as error:  # of many lines, the first of which says nothing
            reason = str(error).strip().splitlines()[1:2] or [first_line(error)]
            raise ValueError(f"{FIELD} {self.source!r} does not fit its settings: {reason[0].strip()}") from None
        left = [*found.unexpected_keys, *(key for key in found.missing_keys if not key.startswith(NEW))]
        if left:
            raise ValueError(
                f"{FIELD} {self.source!r}: {len(left)} weights have no counterpart in the segmenter: "
                f"{', '.join(left[:3])}"
            )


def check_start(config: ModelConfig) -> None:
    """Checks that a whole model in a folder fits the settings of a segmenter, before anything is computed.

    Nothing is fetched: of a hub name, only that one is published for `hub` is checked.

    Raises:
        ValueError: no such folder, another kind of model, or settings that differ; one line that names them.
    """
    source = _source(config)
    if Path(source).expanduser().is_dir():
        _check_fit(config, source, _settings(find_checkpoint(source, FIELD), source))
    elif not source.partition("/")[2] or source.startswith(("/", ".", "~")):
        raise ValueError(f"{FIELD}: no folder {source!r}")


def load_start(config: ModelConfig) -> StartWeights:
    """Loads the whole model that `config.checkpoint` names, from a folder or from the hub.

    Raises:
        ValueError: see `check_start`; a checkpoint that is missing, broken or incomplete, or of images that are
            normalised otherwise than the encoder's.
    """
    source = _source(config)
    folder = find_checkpoint(source, FIELD)
    settings = _settings(folder, source)
    _check_fit(config, source, settings)
    _check_normalisation(folder, source)
    model = load_model(MODELS, folder, FIELD)
    kind = KINDS[settings.model_type]
    return StartWeights(source, kind.architecture(settings), kind.tensors(model.state_dict()))


def _source(config: ModelConfig) -> str:
    if config.source:
        return config.source
    raise ValueError(
        f"{FIELD} is 'hub': no published weights are known for encoder {config.encoder.name!r} with head "
        f"{config.head!r}: expected a folder or a hub name"
    )


def _settings(folder: Path, source: str) -> PretrainedConfig:
    settings = load_settings(folder, f"{FIELD} {source!r}")
    if settings.model_type not in KINDS:
        raise ValueError(
            f"{FIELD} {source!r} holds a model of type {settings.model_type!r}: expected a whole segmentation model, "
            f"{' or '.join(KINDS)} (the weights of an encoder alone are encoder.{FIELD})"
        )
    return settings


def _check_fit(config: ModelConfig, source: str, settings: PretrainedConfig) -> None:
    kind = KINDS[settings.model_type]
    if other := {key: value for key, value in kind.supported(settings).items() if getattr(settings, key) != value}:
        found = ", ".join(f"{key}={getattr(settings, key)} (expected {value})" for key, value in other.items())
        raise ValueError(f"{FIELD} {source!r}: this variant of {settings.model_type} is not supported: {found}")
    encoder = kind.encoder(settings)
    names = [name for name, known in ARCHITECTURES.items() if known.model_type == encoder]
    wrong = [] if config.encoder.name in names else [f"encoder.name={' or '.join(names)} ({config.encoder.name})"]
    for field, value in kind.fields(settings).items():
        if getattr(config, field) != value:
            wrong.append(f"{field}={value} ({getattr(config, field)})")
    if wrong:
        raise ValueError(f"{FIELD} {source!r} is of other settings than the recipe's: expected {', '.join(wrong)}")


def _check_normalisation(folder: Path, source: str) -> None:
    """Refuses a checkpoint whose image processor normalises otherwise than the encoders do; one without a processor
    is taken to do as they do."""
    if not (folder / "preprocessor_config.json").is_file():
        return
    processor = load_processor(folder, FIELD)
    for name, expected in (("image_mean", IMAGENET["mean"]), ("image_std", IMAGENET["std"])):
        found = getattr(processor, name)
        if found is not None and any(abs(a - b) > 0.005 for a, b in zip(found, expected)):
            raise ValueError(f"{FIELD} {source!r}: {name} is {list(found)}: expected {list(expected)}")


@dataclass(frozen=True)
class _Kind:
    """How one kind of published model becomes a segmenter.

    encoder: transformers' model type of its encoder; supported: settings of transformers' config that must have one
    value; fields: of `ModelConfig`, with the values that they must have; architecture: of the encoder; tensors: the
    state dict of the whole model by the segmenter's names.
    """

    encoder: Callable[[Any], str]
    supported: Callable[[Any], dict[str, Any]]
    fields: Callable[[Any], dict[str, Any]]
    architecture: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


def _renamed(weights: Mapping[str, torch.Tensor], prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights below one of the prefixes, each with its new prefix; the others are left out."""
    found = {}
    for key, value in weights.items():
        if (before := next((prefix for prefix in prefixes if key.startswith(prefix)), None)) is not None:
            found[prefixes[before] + key[len(before) :]] = value
    return found


def _mask2former_fields(settings: Any) -> dict[str, Any]:
    return {
        "head": "masked-attention",
        "decoder": "msdeform",
        "decoder_layers": settings.encoder_layers,
        "decoder_feedforward_dim": settings.encoder_feedforward_dim,
        "hidden_dim": settings.hidden_dim,
        "num_queries": settings.num_queries,
        "num_layers": settings.decoder_layers - 1,  # transformers builds one layer fewer than it is told
        "num_heads": settings.num_attention_heads,
        "feedforward_dim": settings.dim_feedforward,
        "proposals": False,
        "local_masks": False,
    }


def _mask2former_supported(settings: Any) -> dict[str, Any]:
    width = settings.hidden_dim
    projection = {"enforce_input_projection": False, "feature_size": width, "mask_feature_size": width}
    return {"pre_norm": False, "common_stride": MASK_STRIDE, "activation_function": "relu", **projection}


def _mask2former_tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return _renamed(
        weights,
        {
            "model.pixel_level_module.encoder.": "encoder.backbone.",
            "model.pixel_level_module.decoder.": "decoder.pixel_decoder.",
            "model.transformer_module.queries_embedder.": "head.query_position.",
            "model.transformer_module.queries_features.": "head.query_content.",
            "model.transformer_module.level_embed.": "head.level_embedding.",
            "model.transformer_module.decoder.": "head.decoder.",
        },
    )


def _eomt_fields(settings: Any) -> dict[str, Any]:
    return {
        "head": "eomt",
        "num_queries": settings.num_queries,
        "num_layers": settings.num_blocks,
        "proposals": False,
        "local_masks": False,
    }


def _eomt_supported(settings: Any) -> dict[str, Any]:
    return {
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_dropout": 0.0,
        "num_upscale_blocks": max(1, round(math.log2(settings.patch_size / MASK_STRIDE))),
    }


def _vit_architecture(kind: type[PretrainedConfig], settings: Any) -> dict[str, Any]:
    """The settings of an EoMT's encoder as those of the backbone alone: the fields that both configs have."""
    own = set(kind().to_dict()) - set(PretrainedConfig().to_dict())
    return {"model_type": kind.model_type} | {k: v for k, v in settings.to_dict().items() if k in own}


def _dinov3_architecture(settings: Any) -> dict[str, Any]:
    found = _vit_architecture(DINOv3ViTConfig, settings)
    if settings.rope_parameters:
        found["rope_theta"] = settings.rope_parameters["rope_theta"]
    return found


def _eomt_names(layers: str, norm: str) -> dict[str, str]:
    return {
        "query.": "head.query.",
        "upscale_block.": "head.upscale_block.",
        "mask_head.": "head.mask_head.",
        "attn_mask_probs": "head.attn_mask_probs",
        "layers.": f"encoder.backbone.{layers}.",
        "layernorm.": f"encoder.backbone.{norm}.",
        "embeddings.": "encoder.backbone.embeddings.",
        "rope_embeddings.": "encoder.backbone.rope_embeddings.",
    }


def _eomt_tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = _renamed(weights, _eomt_names("encoder.layer", "layernorm"))
    tensors = {key.replace("attention.out_proj", "attention.o_proj"): value for key, value in named.items()}
    # EoMT's class token has no position of its own: what DINOv2 adds to it is then nothing.
    positions_TD = tensors.pop("encoder.backbone.embeddings.position_embeddings.weight")
    positions_TD = torch.cat([torch.zeros_like(positions_TD[:1]), positions_TD])
    return tensors | {"encoder.backbone.embeddings.position_embeddings": positions_TD[None]}


KINDS: dict[str, _Kind] = {
    "mask2former": _Kind(
        encoder=lambda settings: settings.backbone_config.model_type,
        supported=_mask2former_supported,
        fields=_mask2former_fields,
        architecture=lambda settings: settings.backbone_config.to_dict(),
        tensors=_mask2former_tensors,
    ),
    "eomt": _Kind(
        encoder=lambda _: "dinov2_with_registers",
        supported=_eomt_supported,
        fields=_eomt_fields,
        architecture=lambda settings: _vit_architecture(Dinov2WithRegistersConfig, settings),
        tensors=_eomt_tensors,
    ),
    "eomt_dinov3": _Kind(
        encoder=lambda _: "dinov3_vit",
        supported=_eomt_supported,
        fields=_eomt_fields,
        architecture=_dinov3_architecture,
        tensors=lambda weights: _renamed(weights, _eomt_names("model.layer", "norm")),
    ),
}
"""transformers' model type -> how it becomes a segmenter."""
