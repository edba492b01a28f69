"""The segmenter of every stage: encoder, pixel decoder and head, for images of any size."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from cast_ray.common import registry
from cast_ray.contracts.records import Predictions
from cast_ray.models.decoders import DecodedFeatures, PixelDecoder, find_decoder
from cast_ray.models.encoders import Encoder, checkpoint_blocks
from cast_ray.models.heads import EomtHead, MaskedAttentionHead
from cast_ray.models.padding import cut_padding, pad_to_multiple
from cast_ray.models.published import load_start
from cast_ray.models.vit_encoders import ViTEncoder, vision_transformer, vit
from cast_ray.recipe import ModelConfig

Key = TypeVar("Key")


class Segmenter(nn.Module):
    """Mask classification: Q queries, each a class distribution and a mask.

    Images are padded to what the encoder takes; its maps and the masks are cut back to the image before anything else
    sees them, so that padding is neither attended to nor contrasted (decoder `dpt-released` attends to it).

    Args:
        config: encoder, decoder and head.
        num_classes: C, without no-object.
        architecture: `Encoder.architecture` of a saved model, in place of `config.checkpoint` and of the encoder's.

    Raises:
        ValueError: an unknown encoder or decoder name, a checkpoint that does not load or has other settings, or a part
            that does not fit the others.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: ModelConfig, num_classes: int, architecture: dict[str, Any] | None = None):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        dim = config.hidden_dim
        if config.head != "eomt" and (dim % 4 or dim % config.num_heads):
            raise ValueError(f"hidden_dim is {dim}: expected a multiple of 4 and of num_heads ({config.num_heads})")
        start = load_start(config) if config.checkpoint and architecture is None else None
        if start is not None:
            architecture = start.architecture
        build = registry.lookup("encoders", config.encoder.name)
        options: dict[str, Any] = {}
        if config.head == "eomt":
            if build not in (vit, vision_transformer):
                raise ValueError(f"encoder.name is {config.encoder.name!r}: head 'eomt' needs a plain ViT")
            options = {"pyramid": False, "num_joint_layers": config.num_layers}
        else:
            decoder = find_decoder(config.decoder)
            if decoder.keeps_padding and build in (vit, vision_transformer):
                options = {"even_grid": False}
        self.encoder: Encoder = build(config.encoder, architecture, **options)
        if not isinstance(self.encoder, Encoder):
            found = type(self.encoder).__name__
            raise ValueError(f"encoder.name {config.encoder.name!r}: expected an encoder back, found a {found}")
        self.feature_dims = dict(self.encoder.channels)
        self.decoder: PixelDecoder | None = None
        self.head: MaskedAttentionHead | EomtHead
        if config.head == "eomt":
            assert isinstance(self.encoder, ViTEncoder)
            self.head = EomtHead(config, num_classes, self.encoder)
        else:
            self.decoder = decoder(self.feature_dims, config)
            self.head = MaskedAttentionHead(config, num_classes)
        if start is not None:
            start.fill(self)
        self.register_buffer("pixel_mean", torch.tensor(self.encoder.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.encoder.std).view(3, 1, 1) * 255, persistent=False)

    def encoder_layers(self) -> list[list[nn.Parameter]]:
        """Returns the pretrained parameters of the encoder by depth, stem first, which may learn at different rates."""
        return self.encoder.layers()

    def anneal(self, progress: float) -> None:
        """Tells a head that changes during training (`eomt`) the share of the steps that is done."""
        if isinstance(self.head, EomtHead):
            self.head.anneal(progress)

    def checkpoint_activations(self) -> list[nn.Module]:
        """Trades a second forward pass of each layer of encoder and head for the memory of its activations.

        Returns:
            these layers.
        """
        blocks = list(self.encoder.blocks())
        if isinstance(self.head, MaskedAttentionHead):
            blocks += self.head.decoder.layers
        checkpoint_blocks(blocks)
        return blocks

    def encode(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """The encoder's feature maps.

        Args:
            images: uint8 [B, 3, H, W], RGB.

        Returns:
            stride -> float [B, D, H / stride, W / stride], D = `feature_dims[stride]`, edge to edge with the image.
        """
        pixels = self._normalised(images)
        return self._cut(self.encoder(pixels), pixels, images)

    def forward(self, images: torch.Tensor) -> Predictions:
        """Predictions of a batch, one set per layer of the head and one before the first.

        Args:
            images: uint8 [B, 3, H, W], RGB, of any size.

        Returns:
            Predictions; `auxiliary` is what the head gives.
        """
        pixels = self._normalised(images)
        if isinstance(self.head, EomtHead):
            assert isinstance(self.encoder, ViTEncoder)
            tokens = self.encoder.embed(pixels)
            states = self.encoder.run(tokens)[-1]
            maps = {next(iter(self.feature_dims)): self.encoder.to_map(states, tokens.grid)}
            out = self.head(self.encoder, tokens, states)
            out.mask_logits = list(self._cut(dict(enumerate(out.mask_logits)), pixels, images).values())
        else:
            assert self.decoder is not None
            maps = self.encoder(pixels)
            decoded = self.decoder(maps)
            if self.decoder.keeps_padding:
                out = self.head(decoded)
                out.mask_logits = list(self._cut(dict(enumerate(out.mask_logits)), pixels, images).values())
                out.auxiliary = self._cut(out.auxiliary, pixels, images)
            else:
                (mask_features,) = self._cut({0: decoded.mask_features}, pixels, images).values()
                out = self.head(DecodedFeatures(self._cut(decoded.levels, pixels, images), mask_features))
        return Predictions(out.class_logits, out.mask_logits, self._cut(maps, pixels, images), out.auxiliary)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        padded = pad_to_multiple(images, self.encoder.required_multiple)
        return (padded.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def _cut(
        self, maps: dict[Key, torch.Tensor], pixels: torch.Tensor, images: torch.Tensor
    ) -> dict[Key, torch.Tensor]:
        padded, own = (pixels.shape[-2], pixels.shape[-1]), (images.shape[-2], images.shape[-1])
        return {key: cut_padding(x_BDHW, padded, own) for key, x_BDHW in maps.items()}


def build_segmenter(config: ModelConfig, num_classes: int, seed: int) -> Segmenter:
    """A segmenter whose initial weights depend on `seed` only; the global random state is left as it was.

    Args:
        config: encoder, decoder and head.
        num_classes: C, without no-object.
        seed: seed of the initial weights.

    Raises:
        ValueError: see `Segmenter`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Segmenter(config, num_classes)


def outline(config: ModelConfig, num_classes: int) -> Segmenter:
    """A segmenter without weights, on the meta device: parameter counts and shapes of any size at no memory.

    Its encoder has the architecture of its name, also where `config` names a checkpoint.

    Raises:
        ValueError: see `Segmenter`.
    """
    with torch.device("meta"):
        # A few parts of transformers ignore the context.
        return Segmenter(config.without_weights(), num_classes).to("meta")
