"""Pixel decoders: from an encoder's maps to the levels a masked-attention head attends to and its mask features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTFeatureFusionLayer, DPTPreActResidualLayer

MASK_STRIDE = 4
"""Stride of the mask features, and of `Predictions.mask_logits`."""


@dataclass
class DecodedFeatures:
    """levels: stride -> float [B, D, h, w], coarsest first; mask_features: float [B, D, H / 4, W / 4]."""

    levels: dict[int, torch.Tensor]
    mask_features: torch.Tensor


class DPTDecoder(nn.Module):
    """DPT fusion from the coarsest map down to stride 4: each level adds a refined lateral map and doubles the size.

    Takes the maps of stride 4 and above. Levels are the fused maps before the stride-4 one is refined into the mask
    features. Source: Ranftl et al. 2021, by transformers' fusion layers. Deviations: no reassemble stage (the
    encoders here are hierarchical), and the last fusion keeps its size, because masks are predicted at stride 4.
    """

    def __init__(self, channels: dict[int, int], hidden_dim: int):
        super().__init__()
        self.strides = sorted((s for s in channels if s >= MASK_STRIDE), reverse=True)
        if not self.strides or self.strides[-1] != MASK_STRIDE:
            raise ValueError(f"decoder 'dpt' needs an encoder map of stride {MASK_STRIDE}: got {sorted(channels)}")
        for coarse, fine in zip(self.strides, self.strides[1:]):
            if coarse != 2 * fine:
                raise ValueError(f"decoder 'dpt' needs strides that double: got {sorted(channels)}")
        config = DPTConfig(fusion_hidden_size=hidden_dim, use_batch_norm_in_fusion_residual=False)
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels[s], hidden_dim, 3 if s > MASK_STRIDE else 1, padding=int(s > MASK_STRIDE), bias=False)
            for s in self.strides
        )
        self.fusions = nn.ModuleList(DPTFeatureFusionLayer(config, align_corners=False) for _ in self.strides[:-1])
        # The coarsest fusion has nothing to fuse with: DDP refuses parameters that never get a gradient.
        if self.fusions:
            del self.fusions[0].residual_layer1
        self.refine = DPTPreActResidualLayer(config)
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
