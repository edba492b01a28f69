"""Encoders, decoders and heads."""

from __future__ import annotations

from pydantic import Field

from cast_ray.recipe.part import Part


class EncoderConfig(Part):
    """One encoder by registry name, with what its builder takes."""

    name: str = "convnext"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    stem_stride: int = Field(4, ge=1)
    """Stride of the first stage; each further one halves. 2 suits images of 64 px, 4 is the usual."""
    checkpoint: str = ""
    """Folder or hub name for `from_pretrained`; empty: random weights."""


class ModelConfig(Part):
    """A mask-classification segmenter: encoder, decoder, masked-attention head."""

    encoder: EncoderConfig = EncoderConfig()
    decoder: str = "dpt"
    hidden_dim: int = Field(48, ge=8)
    num_queries: int = Field(16, ge=1)
    num_layers: int = Field(3, ge=1)
    """Masked-attention layers."""
    num_heads: int = Field(4, ge=1)
    feedforward_dim: int = Field(128, ge=8)
    proposals: bool = True
    """Initialise the queries from dense location-assigned proposals (else learnt queries, as in Mask2Former)."""
