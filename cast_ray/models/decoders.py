"""Pixel decoders: from an encoder's maps to the levels a masked-attention head attends to and its mask features."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from transformers import DPTConfig, Mask2FormerConfig
from transformers.models.dpt.modeling_dpt import DPTFeatureFusionLayer, DPTPreActResidualLayer
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
)

from cast_ray.common import registry
from cast_ray.models.batch_norm import JointBatchNorm
from cast_ray.recipe import ModelConfig

MASK_STRIDE = 4
"""Stride of the mask features and of `Predictions.mask_logits`, except with decoder `dpt-released`."""
NUM_GROUPS = 32
"""Groups of the group norms, as in Mask2Former."""


@dataclass
class DecodedFeatures:
    """levels: stride -> float [B, D, h, w], coarsest first; mask_features: float [B, D, H / 4, W / 4].

    Those of decoder `dpt-released` have H / 2 and W / 2.
    """

    levels: dict[int, torch.Tensor]
    mask_features: torch.Tensor


class PixelDecoder(nn.Module):
    """What the segmenter needs to know of a decoder.

    `keeps_padding`: the head sees the maps of the padded image and the masks are cut at the end; a ViT's patch grid may
    then have odd sides. Else the levels and mask features are cut first, so that padding is not attended to.
    """

    keeps_padding: ClassVar[bool] = False


def find_decoder(name: str) -> type[PixelDecoder]:
    """Returns the decoder that a recipe names.

    Raises:
        ValueError: it is not known, cannot be imported, or is not a decoder.
    """
    found = registry.lookup("decoders", name)
    if not (isinstance(found, type) and issubclass(found, PixelDecoder)):
        raise ValueError(f"{name!r}: expected a class below cast_ray.models.decoders.PixelDecoder")
    return found


class DPTDecoder(PixelDecoder):
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


class ReleasedDPTDecoder(PixelDecoder):
    """The authors' pixel decoder: each DPT fusion doubles the size, the last one too, and its layers have batch norm.

    Of encoder maps of stride 28, 14, 7 and 3.5 (patches of 14 px) the attended levels are the fused maps of stride 14,
    7 and 3.5, and the mask features have stride 1.75; strides here are keyed as powers of two. It takes the maps of
    stride 4 and above. The statistics of batch norm are those of the step's images on all workers (`JointBatchNorm`).

    Source: the released student's configuration; Ranftl et al. 2021 for the fusion (bilinear, corners aligned), by
    transformers' layers. Deviations: a fused map takes the size of the next lateral one, which is twice its own but for
    patch grids of odd sides; the mask features' projection is 1x1 as in Mask2Former, since no source gives its kernel.
    """

    keeps_padding = True

    def __init__(self, channels: dict[int, int], config: ModelConfig):
        super().__init__()
        hidden_dim = config.hidden_dim
        self.strides = _doubling_strides("dpt-released", channels)
        if len(self.strides) < 2:
            raise ValueError(
                f"decoder 'dpt-released' needs two encoder maps of stride {MASK_STRIDE} and above: "
                f"got {sorted(channels)}"
            )
        dpt_config = DPTConfig(fusion_hidden_size=hidden_dim, use_batch_norm_in_fusion_residual=True)
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels[s], hidden_dim, 3, padding=1, bias=False) for s in self.strides
        )
        self.fusions = nn.ModuleList(_SizedFusion(dpt_config) for _ in self.strides)
        # The coarsest fusion has nothing to fuse with: DDP refuses parameters that never get a gradient.
        del self.fusions[0].residual_layer1
        self.project = nn.Conv2d(hidden_dim, hidden_dim, 1)

    def forward(self, maps: dict[int, torch.Tensor]) -> DecodedFeatures:
        """Decodes like `DPTDecoder.forward`, with the levels that follow the coarsest map and mask features of stride
        2."""
        laterals = [conv(maps[s]) for s, conv in zip(self.strides, self.laterals)]
        height, width = laterals[-1].shape[-2:]
        sizes = [(x.shape[-2], x.shape[-1]) for x in laterals[1:]] + [(2 * height, 2 * width)]
        fused, levels = laterals[0], {}
        for i, (fusion, size) in enumerate(zip(self.fusions, sizes)):
            fused = fusion(fused, laterals[i] if i else None, size)
            if i + 1 < len(self.strides):
                levels[self.strides[i + 1]] = fused
        return DecodedFeatures(levels, self.project(fused))


class _SizedFusion(DPTFeatureFusionLayer):
    """DPT's fusion to a given size, with batch norm over all workers."""

    def __init__(self, config: DPTConfig):
        super().__init__(config, align_corners=True)
        for layer in (self.residual_layer1, self.residual_layer2):
            layer.batch_norm1, layer.batch_norm2 = (JointBatchNorm(config.fusion_hidden_size) for _ in range(2))

    def forward(self, fused: torch.Tensor, lateral: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        if lateral is not None:
            fused = fused + self.residual_layer1(lateral)
        fused = self.residual_layer2(fused)
        return self.projection(F.interpolate(fused, size=size, mode="bilinear", align_corners=self.align_corners))


class FPNDecoder(PixelDecoder):
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
        """Decodes like `DPTDecoder.forward`."""
        out = self.fpn({str(s): maps[s] for s in self.strides})
        levels = {s: out[str(s)] for s in reversed(self.strides)}
        return DecodedFeatures(levels, self.project(levels[MASK_STRIDE]))


class MSDeformDecoder(PixelDecoder):
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
        """Decodes like `DPTDecoder.forward`, with the three coarsest levels."""
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
