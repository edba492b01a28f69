"""The network of a train stage: a segmenter and, where the row uses L_pxl, the projector of both views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cast_ray.models.projector import Projector, select_stride
from cast_ray.models.segmenter import Segmenter
from cast_ray.recipe import ContrastiveConfig
from cast_ray.records import Predictions


@dataclass
class Output:
    """predictions of the weak view; z_weak, z_strong: L2-normalised projections [B, D, h, w], or None."""

    predictions: Predictions
    z_weak: torch.Tensor | None = None
    z_strong: torch.Tensor | None = None


class CastNetwork(nn.Module):
    """Runs both views in one forward call, as DistributedDataParallel needs it.

    The set losses read the weak view. The strong view passes through the encoder and the projector only, which is all
    that L_pxl reads of it.
    """

    def __init__(self, segmenter: Segmenter, contrastive: ContrastiveConfig | None):
        super().__init__()
        self.segmenter = segmenter
        self.contrastive = contrastive
        self.projector: Projector | None = None
        if contrastive is not None:
            self.stride = select_stride(segmenter.feature_dims, contrastive)
            self.projector = Projector(segmenter.feature_dims[self.stride], contrastive)

    def forward(self, weak: torch.Tensor, strong: torch.Tensor | None = None) -> Output:
        predictions = self.segmenter(weak)
        if self.projector is None or self.contrastive is None or strong is None:
            return Output(predictions)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.contrastive.strong_grad):
            strong_features = self.segmenter.encode(strong)[self.stride]
        return Output(predictions, *self.projector(predictions.features[self.stride], strong_features))
