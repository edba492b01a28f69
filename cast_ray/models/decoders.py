"""Pixel decoders: from an encoder's maps to the levels a masked-attention head attends to and its mask features."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from transformers import DPTConfig, Mask2FormerConfig
from transformers.models.dpt.modeling_dpt import DPTFeatureFusionLayer, DPTPreActResidualLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
)

from cast_ray.recipe import ModelConfig

MASK_STRIDE = 4
"""Stride of the mask features, and of `Predictions.mask_logits`."""
NUM_GROUPS = 32
"""Of the group norms, as in Mask2Former."""


@dataclass
class DecodedFeatures:
    """levels: stride -> float [B, D, h, w], coarsest first; mask_features: float [B, D, H / 4, W / 4]."""

    levels: dict[int, torch.Tensor]
    mask_features: torch.Tensor


class DPTDecoder(nn.Module):
    """DPT fusion from the coarsest map down to stride 4: each level adds a refined lateral map and doubles the size.

    Takes the maps of stride 4 and above. Levels are the fused maps before the stride-4 one is refined into the mask
    features. Source: Ranftl et al. 2021, by transformers' fusion layers. Deviations: the reassemble stage belongs to
    the encoder (`ViTEncoder`; hierarchical ones need none), and the last fusion keeps its size, because masks are
    predicted at stride 4.
    """

    def __init__(self, channels: dict[int, int], config: ModelConfig):
        super().__init__()
        hidden_dim = config.hidden_dim
        self.strides = _doubling_strides("dpt", channels)
        dpt_config = DPTConfig(fusion_hidden_size=hidden_dim, use_batch_norm_in_fusion_residual=False)
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels[s], hidden_dim, 3 if s > MASK_STRIDE else 1, padding=int(s > MASK_STRIDE), bias=False)
            for s in self.strides
        )
        self.fusions = nn.ModuleList(DPTFeatureFusionLayer(dpt_config, align_corners=False) for _ in self.strides[:-1])
        # The coarsest fusion has nothing to fuse with: DDP refuses parameters that never get a gradient.
        if self.fusions:
            del self.fusions[0].residual_layer1
        self.refine = DPTPreActResidualLayer(dpt_config)
        self.project = nn.Conv2d(hidden_dim, hidden_dim, 1)

    def forward(self, maps: dict[int, torch.Tensor]) -> DecodedFeatures:
        """Decodes the encoder's maps.

        Args:
            maps: stride -> float [B, D, h, w].

        Returns:
            Levels with stride = the encoder's strides of 4 and above, and the mask features.
        """
        laterals = [conv(maps[s]) for s, conv in zip(self.strides, self.laterals)]
        levels = {self.strides[0]: laterals[0]}
        fused = laterals[0]
        for i, fusion in enumerate(self.fusions):
            fused = fusion(fused, laterals[i] if i else None)
            levels[self.strides[i + 1]] = fused
        mask_features = self.project(self.refine(fused + laterals[-1] if self.fusions else fused))
        return DecodedFeatures(levels, mask_features)


class FPNDecoder(nn.Module):
    """A feature pyramid network over the maps of stride 4 and above; the finest level becomes the mask features.

    Source: Lin et al. 2017 by torchvision, with group norm as in Mask2Former's FPN decoder.
    """

    def __init__(self, channels: dict[int, int], config: ModelConfig):
        super().__init__()
        self.strides = _doubling_strides("fpn", channels)[::-1]
        norm = partial(nn.GroupNorm, math.gcd(NUM_GROUPS, config.hidden_dim))
        self.fpn = FeaturePyramidNetwork([channels[s] for s in self.strides], config.hidden_dim, norm_layer=norm)
        self.project = nn.Conv2d(config.hidden_dim, config.hidden_dim, 3, padding=1)

    def forward(self, maps: dict[int, torch.Tensor]) -> DecodedFeatures:
        """As `DPTDecoder.forward`."""
        out = self.fpn({str(s): maps[s] for s in self.strides})
        levels = {s: out[str(s)] for s in reversed(self.strides)}
        return DecodedFeatures(levels, self.project(levels[MASK_STRIDE]))


class MSDeformDecoder(nn.Module):
    """Mask2Former's pixel decoder: deformable attention over the three coarsest maps, then up to stride 4.

    Takes the maps of stride 4 and above. Its own width is `hidden_dim` rounded up to a multiple of 32; where that
    differs, levels are projected to `hidden_dim`, as Mask2Former's head does. Computed in float32 also under autocast,
    as sampling positions in half precision are off by up to half a pixel.
    Source: Cheng et al. 2022 by transformers' Mask2FormerPixelDecoder.
    """

    def __init__(self, channels: dict[int, int], config: ModelConfig):
        super().__init__()
        self.strides = _doubling_strides("msdeform", channels)[::-1]
        if len(self.strides) < 3:
            raise ValueError(
                f"decoder 'msdeform' needs three encoder maps of stride {MASK_STRIDE} and above: got {sorted(channels)}"
            )
        width = -(-config.hidden_dim // NUM_GROUPS) * NUM_GROUPS
        settings = Mask2FormerConfig(
            feature_size=width,
            mask_feature_size=config.hidden_dim,
            encoder_layers=config.decoder_layers,
            encoder_feedforward_dim=config.decoder_feedforward_dim,
            num_attention_heads=config.num_heads,
            common_stride=MASK_STRIDE,
            feature_strides=self.strides,
            dropout=0.0,
        )
        self.pixel_decoder = _Initialised(settings, [channels[s] for s in self.strides]).decoder
        self.projections = nn.ModuleList(
            nn.Conv2d(width, config.hidden_dim, 1) if width != config.hidden_dim else nn.Identity() for _ in range(3)
        )

    def train(self, mode: bool = True) -> MSDeformDecoder:
        super().train(mode)
        # Without dropout the modes differ in one thing: in training each layer asks the device whether all is finite.
        self.pixel_decoder.eval()
        return self

    def forward(self, maps: dict[int, torch.Tensor]) -> DecodedFeatures:
        """As `DPTDecoder.forward`, with the three coarsest levels."""
        device = maps[self.strides[0]].device
        with nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
            out = self.pixel_decoder([maps[s].float() for s in self.strides], return_dict=True)
            levels = [project(x) for project, x in zip(self.projections, out.multi_scale_features)]
        return DecodedFeatures(dict(zip(reversed(self.strides), levels)), out.mask_features)


class _Initialised(Mask2FormerPreTrainedModel):
    """A pixel decoder with Mask2Former's initial weights, which its own constructor leaves to the whole model."""

    def __init__(self, settings: Mask2FormerConfig, channels: list[int]):
        super().__init__(settings)
        self.decoder = Mask2FormerPixelDecoder(settings, channels)
        self.post_init()


def _doubling_strides(name: str, channels: dict[int, int]) -> list[int]:
    """The strides of 4 and above, coarsest first.

    Raises:
        ValueError: none is 4, or one is not twice the next.
    """
    strides = sorted((s for s in channels if s >= MASK_STRIDE), reverse=True)
    if not strides or strides[-1] != MASK_STRIDE:
        raise ValueError(f"decoder {name!r} needs an encoder map of stride {MASK_STRIDE}: got {sorted(channels)}")
    for coarse, fine in pairwise(strides):
        if coarse != 2 * fine:
            raise ValueError(f"decoder {name!r} needs strides that double: got {sorted(channels)}")
    return strides
