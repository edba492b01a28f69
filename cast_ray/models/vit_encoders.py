"""Vision transformers as encoders: tokens of one stride, and DPT's reassemble stage that makes a pyramid of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTReassembleLayer

from cast_ray.models.backbones import ARCHITECTURES, IMAGENET, Architecture, build_backbone
from cast_ray.models.encoders import Encoder
from cast_ray.recipe import EncoderConfig

REASSEMBLE_FACTORS = (4, 2, 1, 0.5)
"""Scale of each level relative to the patch grid, finest level first.

Source: DPT (Ranftl et al. 2021), in its form that ignores the readout token.
"""


@dataclass
class Tokens:
    """states: float [B, P + h w, D], P prefix tokens (class, registers) first; grid: h, w; options: of every layer."""

    states: torch.Tensor
    grid: tuple[int, int]
    options: dict[str, Any]


class ViTEncoder(Encoder):
    """DINOv2 (with or without registers) or DINOv3 by transformers, layer by layer.

    With a pyramid, four hidden layers at a quarter, half, three quarters and the whole of the depth (5, 12, 18, 24 of
    24, as in DPT) are normalised and reassembled to 4, 2, 1 and 1/2 times the patch grid, with a quarter, half, once
    and twice the token's width. Without, the map is the patch tokens' own. Either way it is keyed by its stride
    rounded to a power of two: patches of 14 px give 4, 8, 16, 32 for 3.5, 7, 14, 28 px.

    Args:
        config: name and checkpoint.
        known: architecture of the name.
        saved: see `build_backbone`.
        pyramid: whether a pixel decoder follows.
        even_grid: whether images are padded until the patch grid has even sides, so that the coarsest map has exactly
            half of them; else it has half of an odd side rounded up.
        num_joint_layers: last layers that `forward` leaves to the head (`eomt`).

    Source: DPT by transformers' DPTReassembleLayer. Deviations: the class token is not read out into the patches.
    """

    def __init__(
        self,
        config: EncoderConfig,
        known: Architecture,
        saved: dict[str, Any] | None = None,
        *,
        pyramid: bool = True,
        even_grid: bool = True,
        num_joint_layers: int = 0,
    ):
        super().__init__()
        self.backbone = build_backbone(config, known, saved)
        settings = self.backbone.config
        self.architecture = settings.to_dict()
        self.mean, self.std = IMAGENET["mean"], IMAGENET["std"]
        self.num_prefix_tokens = 1 + getattr(settings, "num_register_tokens", 0)
        self.patch_px, self.width = settings.patch_size, settings.hidden_size
        if self.backbone.embeddings.mask_token is not None:
            self.backbone.embeddings.mask_token.requires_grad_(False)  # of pre-training by masked images
        depth = len(self.transformer_layers)
        if num_joint_layers >= depth:
            raise ValueError(f"num_layers is {num_joint_layers}: the encoder {config.name!r} has {depth} layers in all")
        self.num_own_layers = depth - num_joint_layers
        stride = 2 ** round(math.log2(self.patch_px))
        self.pyramid: nn.ModuleList | None = None
        if not pyramid:
            self.channels = {stride: self.width}
            self.required_multiple = self.patch_px
            return
        widths = [self.width // 4, self.width // 2, self.width, 2 * self.width]
        self.channels = dict(zip((stride // 4, stride // 2, stride, 2 * stride), widths))
        self.required_multiple = 2 * self.patch_px if even_grid else self.patch_px
        layer_config = DPTConfig(hidden_size=self.width)
        self.pyramid = nn.ModuleList(DPTReassembleLayer(layer_config, w, f) for w, f in zip(widths, REASSEMBLE_FACTORS))
        self.taken = {24: (5, 12, 18, 24)}.get(depth) or tuple(max(1, round(depth * k / 4)) for k in (1, 2, 3, 4))

    @property
    def transformer_layers(self) -> list[nn.Module]:
        return list(self.backbone.model.layer if self._is_dinov3 else self.backbone.encoder.layer)

    @property
    def norm(self) -> nn.Module:
        return self.backbone.norm if self._is_dinov3 else self.backbone.layernorm

    @property
    def _is_dinov3(self) -> bool:
        return self.backbone.config.model_type == "dinov3_vit"

    def embed(self, pixels: torch.Tensor) -> Tokens:
        """Patch and prefix tokens before the first layer; position embeddings are resampled to the grid."""
        grid = (pixels.shape[-2] // self.patch_px, pixels.shape[-1] // self.patch_px)
        options = {"position_embeddings": self.backbone.rope_embeddings(pixels)} if self._is_dinov3 else {}
        return Tokens(self.backbone.embeddings(pixels), grid, options)

    def to_map(self, states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The normalised patch tokens, the last of `states` [B, T, D], as float [B, D, h, w]."""
        patches = self.norm(states)[:, -grid[0] * grid[1] :]
        return patches.transpose(1, 2).unflatten(2, grid)

    def run(self, tokens: Tokens) -> list[torch.Tensor]:
        """The states after each of the encoder's own layers."""
        states, found = tokens.states, []
        for layer in self.transformer_layers[: self.num_own_layers]:
            states = layer(states, **tokens.options)
            found.append(states)
        return found

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        tokens = self.embed(pixels)
        states = self.run(tokens)
        if self.pyramid is None:
            return {next(iter(self.channels)): self.to_map(states[-1], tokens.grid)}
        maps = [layer(self.to_map(states[n - 1], tokens.grid)) for n, layer in zip(self.taken, self.pyramid)]
        return dict(zip(self.channels, maps))

    def blocks(self) -> Sequence[nn.Module]:
        return self.transformer_layers

    def pretrained(self) -> nn.Module:
        return self.backbone


def vision_transformer(config: EncoderConfig, saved: dict[str, Any] | None = None, **options: Any) -> Encoder:
    """Builds a published `ViTEncoder`: dinov2-s, -b, -l, each also with registers (`-reg`) and with registers and
    patches of 16 px (`-reg16`), and dinov3-s, -l."""
    return ViTEncoder(config, ARCHITECTURES[config.name], saved, **options)


def vit(config: EncoderConfig, saved: dict[str, Any] | None = None, **options: Any) -> Encoder:
    """Builds a tiny DINOv2 for drawn images: width `widths[2]`, sum(`depths`) layers, patches of 4 `stem_stride` px.

    Raises:
        ValueError: not four widths that double, as the pyramid has them.
    """
    if config.checkpoint:
        raise ValueError(f"encoder.checkpoint is {config.checkpoint!r}: the encoder 'vit' has no pretrained weights")
    width = config.widths[2] if len(config.widths) == 4 else 0
    if list(config.widths) != [width // 4, width // 2, width, 2 * width] or width < 8:
        raise ValueError(f"encoder.widths is {list(config.widths)}: the encoder 'vit' expects four that double")
    settings = {
        "hidden_size": width,
        "num_hidden_layers": sum(config.depths),
        "num_attention_heads": max(1, width // 32),
        "patch_size": 4 * config.stem_stride,
        "image_size": 16 * config.stem_stride,
    }
    encoder = ViTEncoder(config, Architecture("dinov2", settings), saved, **options)
    encoder.mean, encoder.std = Encoder.mean, Encoder.std
    return encoder
