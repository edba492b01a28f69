"""Image encoders: a module from normalised pixels to feature maps by stride."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cast_ray.models.backbones import ARCHITECTURES, IMAGENET, Architecture, build_backbone
from cast_ray.recipe import EncoderConfig


class Encoder(nn.Module):
    """What the segmenter needs of an encoder: maps by stride, and their widths before anything runs.

    `channels` maps stride -> D for every map that `forward` returns, finest first. `mean` and `std` are what the
    pixels (in 0..1) are normalised with. `required_multiple` divides height and width of the pixels. `architecture` is
    the config of a published backbone, for a saved model to be built again without its checkpoint; None where
    `EncoderConfig` says it all.
    """

    channels: dict[int, int]
    required_multiple: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    architecture: dict[str, Any] | None = None

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        """Feature maps of a batch.

        Args:
            pixels: float [B, 3, H, W], normalised by `mean` and `std`, H and W multiples of `required_multiple`.

        Returns:
            stride -> float [B, D, H / stride, W / stride].
        """
        raise NotImplementedError

    def blocks(self) -> Sequence[nn.Module]:
        """The layers, input side first: units of layer-wise learning rates and of gradient checkpointing."""
        raise NotImplementedError

    def pretrained(self) -> nn.Module:
        """The part that a checkpoint can fill: what gets the encoder's own learning rate."""
        return self

    def layers(self) -> list[list[nn.Parameter]]:
        """The parameters of `pretrained()` by depth: stem, then each block with what follows it up to the next."""
        depth_of = {id(p): depth for depth, block in enumerate(self.blocks(), 1) for p in block.parameters()}
        grouped: list[list[nn.Parameter]] = [[] for _ in range(len(self.blocks()) + 1)]
        depth = 0
        for parameter in self.pretrained().parameters():
            depth = depth_of.get(id(parameter), depth)
            grouped[depth].append(parameter)
        return [parameters for parameters in grouped if parameters]


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Makes each block forget its activations and compute them again in the backward pass."""
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class HierarchicalEncoder(Encoder):
    """ConvNeXt, ResNet, Swin and SAM2's Hiera by transformers: one map per stage, each of half the size.

    Deviations: BatchNorm keeps its published statistics and weights (as in Detectron2), so that N workers compute what
    one would.
    """

    def __init__(self, config: EncoderConfig, known: Architecture, saved: dict[str, Any] | None = None):
        super().__init__()
        self.backbone = build_backbone(config, known, saved)
        self.architecture = self.backbone.config.to_dict()
        self.mean, self.std = IMAGENET["mean"], IMAGENET["std"]
        settings = self.backbone.config
        stem = {"resnet": 4, "sam2_hiera_det_model": 4}.get(settings.model_type) or settings.patch_size
        widths = settings.embed_dim_per_stage if self._is_hiera else self.backbone.channels
        self.channels = {stem * 2**i: width for i, width in enumerate(widths)}
        self.required_multiple = max(self.channels)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        if settings.model_type == "swin":
            self.backbone.swin.layernorm.requires_grad_(False)  # of the pooled output, which nothing reads

    @property
    def _is_hiera(self) -> bool:
        return self.backbone.config.model_type == "sam2_hiera_det_model"

    def train(self, mode: bool = True) -> HierarchicalEncoder:
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        if self._is_hiera:
            maps = [x.permute(0, 3, 1, 2) for x in self.backbone(pixels).intermediate_hidden_states]
        else:
            maps = self.backbone(pixels).feature_maps
        return dict(zip(self.channels, maps))

    def blocks(self) -> Sequence[nn.Module]:
        kind, backbone = self.backbone.config.model_type, self.backbone
        if kind == "sam2_hiera_det_model":
            return list(backbone.blocks)
        if kind == "swin":
            return [block for stage in backbone.swin.encoder.layers for block in stage.blocks]
        return [block for stage in backbone.encoder.stages for block in stage.layers]


class _ConvBlock(nn.Module):
    """Residual 3x3 convolutions with group norm."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(_groups(width), width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(_groups(width), width),
        )

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        return torch.relu(x_BDHW + self.body(x_BDHW))


class PlainConvEncoder(Encoder):
    """Strided 3x3 convolutions with group norm and residual blocks: the cheapest encoder per CPU-second.

    Per stage one strided convolution and `depths[i] - 1` residual blocks. `stem_stride` is 2 or 4 (two strided
    convolutions). Source: our own; ResNet's BatchNorm would make N workers differ from one.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        if config.checkpoint:
            raise ValueError(
                f"encoder.checkpoint is {config.checkpoint!r}: the encoder 'conv' has no pretrained weights"
            )
        if config.stem_stride not in (2, 4):
            raise ValueError(f"encoder.stem_stride is {config.stem_stride}: the encoder 'conv' expects 2 or 4")
        stem = [_strided(3, config.widths[0])]
        if config.stem_stride == 4:
            stem.append(_strided(config.widths[0], config.widths[0]))
        stages = [nn.Sequential(*stem)]
        stages += [_strided(before, after) for before, after in pairwise(config.widths)]
        for stage, width, depth in zip(stages, config.widths, config.depths):
            stage.extend(_ConvBlock(width) for _ in range(depth - 1))
        self.stages = nn.ModuleList(stages)
        self.channels = {config.stem_stride * 2**i: width for i, width in enumerate(config.widths)}
        self.required_multiple = max(self.channels)

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        maps, x_BDHW = {}, pixels
        for stride, stage in zip(self.channels, self.stages):
            x_BDHW = stage(x_BDHW)
            maps[stride] = x_BDHW
        return maps

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.stages)


def _groups(width: int) -> int:
    return max(g for g in (1, 2, 4, 8) if width % g == 0)


def _strided(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(_groups(after), after),
        nn.ReLU(inplace=True),
    )


def hierarchical(config: EncoderConfig, saved: dict[str, Any] | None = None) -> Encoder:
    """Builds a published `HierarchicalEncoder`: convnext-t, resnet50, sam2-s, swin-t, swin-s."""
    return HierarchicalEncoder(config, ARCHITECTURES[config.name], saved)


def convnext(config: EncoderConfig, saved: dict[str, Any] | None = None) -> Encoder:
    """Builds a ConvNeXt of the widths and depths in `config`, or of its checkpoint.

    Deviations: a stem of stride 2 is offered for images of 64 px, whose stride-32 map would be 2x2; layer scale starts
    at 1 instead of 1e-6, because networks this shallow are trained for hundreds of steps, not hundreds of epochs.
    """
    settings = {
        "patch_size": config.stem_stride,
        "num_stages": len(config.widths),
        "hidden_sizes": list(config.widths),
        "depths": list(config.depths),
        "layer_scale_init_value": 1.0,
    }
    encoder = HierarchicalEncoder(config, Architecture("convnext", settings), saved)
    if not config.checkpoint:
        encoder.mean, encoder.std = Encoder.mean, Encoder.std
    return encoder


def conv(config: EncoderConfig, saved: dict[str, Any] | None = None) -> Encoder:
    """Builds a `PlainConvEncoder`; see EncoderConfig for the fields."""
    return PlainConvEncoder(config)
