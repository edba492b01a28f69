"""Image encoders: a module from normalised pixels to feature maps by stride."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from transformers import ConvNextBackbone, ConvNextConfig

from cast_ray.recipe import EncoderConfig


class Encoder(nn.Module):
    """What the segmenter needs of an encoder: maps by stride, and their widths before anything runs.

    `channels` maps stride -> D for every map that `forward` returns, finest first. `mean` and `std` are what the
    pixels (in 0..1) are normalised with.
    """

    channels: dict[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        """Feature maps of a batch.

        Args:
            pixels: float [B, 3, H, W], normalised by `mean` and `std`.

        Returns:
            stride -> float [B, D, H / stride, W / stride].
        """
        raise NotImplementedError


class ConvNextEncoder(Encoder):
    """ConvNeXt by transformers: LayerNorm everywhere, so that N workers compute what one would.

    Deviations: a stem of stride 2 is offered for images of 64 px, whose stride-32 map would be 2x2; layer scale
    starts at 1 instead of 1e-6, because networks this shallow are trained for hundreds of steps, not hundreds of
    epochs.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        if config.checkpoint:
            settings = ConvNextConfig.from_pretrained(config.checkpoint)
            self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        else:
            settings = ConvNextConfig(
                patch_size=config.stem_stride,
                num_stages=len(config.widths),
                hidden_sizes=list(config.widths),
                depths=list(config.depths),
                layer_scale_init_value=1.0,
            )
        settings.out_features = settings.stage_names[1:]
        if config.checkpoint:
            self.backbone = ConvNextBackbone.from_pretrained(config.checkpoint, config=settings)
        else:
            self.backbone = ConvNextBackbone(settings)
        stem = self.backbone.config.patch_size
        self.channels = {stem * 2**i: width for i, width in enumerate(self.backbone.channels)}

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        return dict(zip(self.channels, self.backbone(pixels).feature_maps))


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

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        maps, x_BDHW = {}, pixels
        for stride, stage in zip(self.channels, self.stages):
            x_BDHW = stage(x_BDHW)
            maps[stride] = x_BDHW
        return maps


def _groups(width: int) -> int:
    return max(g for g in (1, 2, 4, 8) if width % g == 0)


def _strided(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(_groups(after), after),
        nn.ReLU(inplace=True),
    )


def convnext(config: EncoderConfig) -> Encoder:
    """Builds a `ConvNextEncoder`."""
    return ConvNextEncoder(config)


def conv(config: EncoderConfig) -> Encoder:
    """Builds a `PlainConvEncoder`; see EncoderConfig for the fields."""
    return PlainConvEncoder(config)
