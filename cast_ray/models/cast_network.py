"""The network of a train stage: a segmenter and, where the row uses L_pxl, the projector of both views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from cast_ray.contracts.records import Predictions, Targets
from cast_ray.models.projector import Projector, select_stride
from cast_ray.recipe import ContrastiveConfig, TrainConfig


@dataclass
class Output:
    """What a network says of one step's images.

    predictions: of the weak view, which y of L_pxl is made of; z_weak, z_strong: L2-normalised projections
    [B, D, h, w], or None; supervised: what L_sup and L_semi read, where that is another view than `predictions`, of as
    many images (without feature maps).
    """

    predictions: Predictions
    z_weak: torch.Tensor | None = None
    z_strong: torch.Tensor | None = None
    supervised: Predictions | None = None


class TrainedNetwork(nn.Module):
    """What the training loop asks of a stage's network.

    `forward(weak, strong, targets)` returns an `Output`; strong is None where no term reads it, and targets are for
    networks that are prompted with them. A student's network also takes `strong_from`, see `CastNetwork`.
    """

    projector: Projector | None

    def __init__(self) -> None:
        super().__init__()
        self.projector = None  # not on the class: a module of that name would hide behind it

    @property
    def trained(self) -> nn.Module:
        """The model that the stage hands on; of a teacher, its `Teacher.trained`."""
        raise NotImplementedError

    def lr_factors(self, config: TrainConfig) -> dict[int, float]:
        """Returns id of each parameter that has another learning rate -> that rate relative to `config.lr`."""
        raise NotImplementedError

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped together."""
        return [list(self.parameters())]

    def anneal(self, progress: float) -> None:
        """Told before each step which share of the steps is done, and 1 at the end."""

    def checkpoint_activations(self) -> None:
        """Trades a second forward pass of each layer for the memory of its activations."""
        raise NotImplementedError


class MaskClassifier(Protocol):
    """A model that predicts a class and a mask for each of its queries, with an image encoder apart."""

    @property
    def feature_dims(self) -> dict[int, int]: ...

    def __call__(self, images: torch.Tensor, /) -> Predictions: ...

    def encode(self, images: torch.Tensor) -> dict[int, torch.Tensor]: ...

    def encoder_layers(self) -> list[list[nn.Parameter]]: ...

    def anneal(self, progress: float) -> None: ...

    def checkpoint_activations(self) -> list[nn.Module]: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...


M = TypeVar("M", bound=MaskClassifier)


class CastNetwork(TrainedNetwork, Generic[M]):
    """Runs both views in one forward call, as DistributedDataParallel needs it.

    The set losses read the weak view; of the images from `strong_from` on (D_u, with `loss.semi_view` strong) they read
    the strong one. L_pxl reads nothing of the strong view but its encoder map. Each strong image is encoded once, for
    both losses; decoder and head then run on both views of D_u, since y of L_pxl is made of the weak one.
    """

    segmenter: M

    def __init__(self, segmenter: M, contrastive: ContrastiveConfig | None):
        super().__init__()
        self.segmenter = segmenter
        self.contrastive = contrastive
        if contrastive is not None:
            self.stride = select_stride(segmenter.feature_dims, contrastive)
            self.projector = Projector(segmenter.feature_dims[self.stride], contrastive)

    @property
    def trained(self) -> nn.Module:
        assert isinstance(self.segmenter, nn.Module)
        return self.segmenter

    def lr_factors(self, config: TrainConfig) -> dict[int, float]:
        """Encoder layer l of n at `encoder_lr_factor * layer_decay^(n - l)`; its pretrained parameters only."""
        layers = self.segmenter.encoder_layers()
        return {
            id(parameter): config.encoder_lr_factor * config.layer_decay ** (len(layers) - 1 - depth)
            for depth, parameters in enumerate(layers)
            for parameter in parameters
        }

    def anneal(self, progress: float) -> None:
        self.segmenter.anneal(progress)

    def checkpoint_activations(self) -> None:
        self.segmenter.checkpoint_activations()

    def forward(
        self,
        weak: torch.Tensor,
        strong: torch.Tensor | None = None,
        targets: Sequence[Targets] = (),
        strong_from: int | None = None,
    ) -> Output:
        first = len(weak) if strong_from is None else strong_from
        if self.projector is None or self.contrastive is None or strong is None:
            mixed = weak if strong is None or first == len(weak) else torch.cat([weak[:first], strong[first:]])
            return Output(self.segmenter(mixed))
        predictions = self.segmenter(weak)
        supervised = predictions
        strong_maps: list[torch.Tensor] = []
        if first:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.contrastive.strong_grad):
                strong_maps.append(self.segmenter.encode(strong[:first])[self.stride])
        if first < len(weak):
            of_strong = self.segmenter(strong[first:])
            supervised = predictions.part(0, first).joined(of_strong)
            of_map = of_strong.features[self.stride]
            strong_maps.append(of_map if self.contrastive.strong_grad else of_map.detach())
        z_weak, z_strong = self.projector(predictions.features[self.stride], torch.cat(strong_maps))
        return Output(predictions, z_weak, z_strong, supervised if strong_from is not None else None)
