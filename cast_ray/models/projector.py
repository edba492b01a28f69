"""The projection head of the contrastive loss: encoder maps to unit vectors, one head for each view."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_ray.recipe import ContrastiveConfig


class Projector(nn.Module):
    """Maps an encoder map to z = g(f) / |g(f)| at every location, with g an MLP with ReLU.

    The strong view's head is, by `config.head`: `shared` g itself; `frozen` a copy of the initial g that never changes;
    `ema` a moving average of g, advanced by `update_ema` after each optimiser step. Frozen and averaged heads have no
    trainable parameters but live in the state dict, so a checkpoint restores them.

    Args:
        in_dim: channels of the encoder map.
        config: widths, bias, head mode and whether the strong branch has gradients.

    Source: CAST (arXiv 2505.21904); `contrastive=released` gives its code's 768-128-128-128 head without bias.
    """

    def __init__(self, in_dim: int, config: ContrastiveConfig):
        super().__init__()
        if not config.projection_dims:
            raise ValueError("contrastive.projection_dims: expected at least one width, got none")
        self.config = config
        self.head = _mlp(in_dim, config.projection_dims, config.projection_bias)
        self.strong_head: nn.Module | None = None
        if config.head != "shared":
            self.strong_head = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor]:
        """z of the weak view, and z_s of the strong view through the strong head.

        Args:
            weak, strong: float [B, in_dim, h, w].

        Returns:
            Two float32 [B, D, h, w] of unit length along D, also under autocast; channels last in memory. z_s has no
            gradients unless `strong_grad`.
        """
        if self.strong_head is None and self.config.strong_grad:
            z_weak, z_strong = _project(self.head, torch.cat([weak, strong])).chunk(2)
            return z_weak, z_strong
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.strong_grad):
            z_strong = _project(self.head if self.strong_head is None else self.strong_head, strong)
        return _project(self.head, weak), z_strong

    @torch.no_grad()
    def update_ema(self) -> None:
        """theta_s <- m theta_s + (1 - m) theta with m = `config.head_ema`; does nothing unless `head` is `ema`."""
        if self.config.head != "ema":
            return
        assert self.strong_head is not None
        for average, current in zip(self.strong_head.parameters(), self.head.parameters()):
            average.lerp_(current.detach().to(average), 1 - self.config.head_ema)


def select_stride(features: Mapping[int, Any], config: ContrastiveConfig) -> int:
    """Stride of the map to project: the coarsest not above `config.feature_stride` (None: of all), else the finest.

    Raises:
        ValueError: the encoder gave no map.
    """
    if not features:
        raise ValueError("contrastive: expected at least one encoder map to project, got none")
    limit = config.feature_stride or max(features)
    return max((s for s in features if s <= limit), default=min(features))


def _mlp(in_dim: int, widths: tuple[int, ...], bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_dim, width, bias=bias), nn.ReLU()]
        in_dim = width
    return nn.Sequential(*layers[:-1])


def _project(head: nn.Module, features: Tensor) -> Tensor:
    """Location by location as rows of one matrix: on small maps half the time of 1x1 convolutions."""
    num_images, dim, height, width = features.shape
    vectors = head(features.permute(0, 2, 3, 1).reshape(-1, dim))
    # Half precision loses the small differences of nearly equal cosines that 1/T then magnifies.
    with torch.autocast(vectors.device.type, enabled=False):
        z = F.normalize(vectors.float(), dim=1)
    return z.view(num_images, height, width, -1).permute(0, 3, 1, 2)
