"""Encoders, decoders and heads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cast_ray.common.registry import check_name
from cast_ray.recipe.part import OFF_BY_DEFAULT, Part

PUBLISHED_ENCODERS: dict[str, str] = {
    **{
        f"dinov2-{size[0]}{ending}": f"facebook/dinov2-{middle}{size}"
        for size in ("small", "base", "large")
        for ending, middle in (("", ""), ("-reg", "with-registers-"))
    },
    "dinov3-s": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3-l": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "resnet50": "microsoft/resnet-50",
    "sam2-s": "facebook/sam2.1-hiera-small",
    "swin-t": "microsoft/swin-tiny-patch4-window7-224",
    "swin-s": "microsoft/swin-small-patch4-window7-224",
    "convnext-t": "facebook/convnext-tiny-224",
}
"""Name of an encoder -> hub name of its published weights, which `checkpoint: hub` means."""

PUBLISHED_SEGMENTERS: dict[tuple[str, str], str] = {
    ("swin-t", "masked-attention"): "facebook/mask2former-swin-tiny-coco-instance",
    ("swin-s", "masked-attention"): "facebook/mask2former-swin-small-coco-instance",
    ("dinov2-s-reg16", "eomt"): "tue-mps/coco_panoptic_eomt_small_640_2x",
    ("dinov2-b-reg16", "eomt"): "tue-mps/coco_panoptic_eomt_base_640_2x",
    ("dinov2-l-reg16", "eomt"): "tue-mps/coco_instance_eomt_large_640",
    ("dinov3-s", "eomt"): "tue-mps/eomt-dinov3-coco-panoptic-small-640",
    ("dinov3-l", "eomt"): "tue-mps/eomt-dinov3-coco-instance-large-640",
}
"""Encoder and head of a segmenter -> hub name of its published weights, which `ModelConfig.checkpoint: hub` means."""


class EncoderConfig(Part):
    """One encoder by registry name, with what its builder takes.

    `conv`, `vit` and `convnext` have the widths and depths given here; every other name has the architecture of its
    published weights, or of the checkpoint's own config.
    """

    name: str = "convnext"
    """Name in the registry of encoders, for example convnext, vit or dinov2-s."""
    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels of the maps, finest first; `vit` has the third of its four as the width of its tokens."""
    depths: tuple[int, ...] = (1, 1, 1, 1)
    """Blocks of each stage; `vit` has their sum as the number of its layers."""
    stem_stride: int = Field(4, ge=1)
    """Stride of the first stage; each further one halves. 2 suits images of 64 px, 4 is the usual."""
    checkpoint: str = ""
    """Folder or hub name for `from_pretrained`; `hub`: the published weights of `name`; empty: random weights."""

    @property
    def source(self) -> str:
        """Folder or hub name of the weights that it starts from; empty: random ones, or `hub` of a name without any."""
        return PUBLISHED_ENCODERS.get(self.name, "") if self.checkpoint == "hub" else self.checkpoint

    @field_validator("name")
    @classmethod
    def _is_known_or_of_ones_own(cls, value: str) -> str:
        check_name("encoders", value)
        return value


BATCH_NORM_DECODERS = ("dpt-released",)
"""Decoders that take all images of a step at once: their statistics depend on them."""
DRAWS_BY_WORKER = ("swin-t",)
"""Encoders that drop random paths in training, drawn by each worker for its own images."""


class ModelConfig(Part):
    """A mask-classification segmenter: encoder, pixel decoder, head."""

    encoder: EncoderConfig = EncoderConfig()
    decoder: str = "dpt"
    """dpt, dpt-released (the authors': masks of twice the size, batch norm), fpn or msdeform (Mask2Former's deformable
    attention); head `eomt` has none."""
    decoder_layers: int = Field(6, ge=1)
    """Deformable-attention layers of decoder `msdeform`."""
    decoder_feedforward_dim: int = Field(1024, ge=8)
    """Width of the feed-forward part of those layers."""
    head: Literal["masked-attention", "eomt"] = "masked-attention"
    """eomt: no decoder; the queries join the last layers of a ViT encoder (encoder-only mask transformer)."""
    hidden_dim: int = Field(48, ge=8)
    """Channels of the decoder's maps and of the queries."""
    num_queries: int = Field(16, ge=1)
    """Object queries: the most masks that are found in an image."""
    num_layers: int = Field(3, ge=1)
    """Masked-attention layers; with head `eomt`: encoder layers that the queries join."""
    num_heads: int = Field(4, ge=1)
    """Attention heads of each of these layers."""
    feedforward_dim: int = Field(128, ge=8)
    """Width of the feed-forward part of these layers."""
    proposals: bool = True
    """Initialise the queries from dense location-assigned proposals (else learnt queries, as in Mask2Former)."""
    local_masks: Annotated[bool, OFF_BY_DEFAULT] = False
    """Keep the mask of each query in a window (a Gaussian of predicted place and size) around the query's proposal. It
    is for encoders without position embeddings (`conv`, `convnext` and others of convolutions), for which objects that
    look alike are one: their masks else hold several objects of an image that is larger than the training crops."""
    checkpoint: Annotated[str, OFF_BY_DEFAULT] = ""
    """Folder or hub name of a whole segmentation model (Mask2Former, EoMT, EoMT-DINOv3) that encoder, decoder and head
    start from; its class head is replaced by a new one for the dataset's classes. `hub`: the published weights for this
    encoder and head. Empty: decoder and head start from random weights, and the encoder from `encoder.checkpoint`,
    which is not read where this field is set."""

    @property
    def source(self) -> str:
        """Folder or hub name of the whole model that it starts from; empty: none, or `hub` where none is published."""
        if self.checkpoint == "hub":
            return PUBLISHED_SEGMENTERS.get((self.encoder.name, self.head), "")
        return self.checkpoint

    def without_weights(self) -> ModelConfig:
        """Returns the same architecture with random weights."""
        encoder = self.encoder.model_copy(update={"checkpoint": ""})
        return self.model_copy(update={"encoder": encoder, "checkpoint": ""})

    @field_validator("decoder")
    @classmethod
    def _is_known_or_of_ones_own(cls, value: str) -> str:
        check_name("decoders", value)
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        if self.head == "eomt" and self.proposals:
            raise ValueError("head 'eomt' has learnt queries only: expected proposals=false")
        if self.local_masks and not self.proposals:
            raise ValueError("local_masks needs the place of each query: expected proposals=true, or local_masks=false")
        return self


_MASK2FORMER: dict[str, Any] = {
    "encoder": {"name": "dinov2-s"},
    "head": "masked-attention",
    "num_queries": 100,
    "num_layers": 9,
    "num_heads": 8,
    "feedforward_dim": 2048,
    "proposals": False,
    "local_masks": False,
    "checkpoint": "",
}


def _published_mask2former(encoder: str) -> dict[str, Any]:
    return _MASK2FORMER | {
        "encoder": {"name": encoder, "checkpoint": ""},
        "decoder": "msdeform",
        "decoder_layers": 6,
        "decoder_feedforward_dim": 1024,
        "hidden_dim": 256,
        "checkpoint": "hub",
    }


def _published_eomt(encoder: str, num_layers: int) -> dict[str, Any]:
    return {
        "encoder": {"name": encoder, "checkpoint": ""},
        "head": "eomt",
        "num_queries": 200,
        "num_layers": num_layers,
        "proposals": False,
        "local_masks": False,
        "checkpoint": "hub",
    }


# The paper gives neither the widths nor the decoder's last stride: there ours stand, which meet its 52 M parameters.
STUDENT_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _MASK2FORMER | {"decoder": "dpt", "hidden_dim": 256},
    "released": _MASK2FORMER | {"decoder": "dpt-released", "hidden_dim": 384},
    "mask2former-swin-t": _published_mask2former("swin-t"),
    "mask2former-swin-s": _published_mask2former("swin-s"),
    "eomt-s": _published_eomt("dinov2-s-reg16", 3),
    "eomt-b": _published_eomt("dinov2-b-reg16", 3),
    "eomt-l": _published_eomt("dinov2-l-reg16", 4),
    "eomt-dinov3-s": _published_eomt("dinov3-s", 3),
    "eomt-dinov3-l": _published_eomt("dinov3-l", 4),
}
"""Named students. `paper` and `released` are the student as the paper and as the authors' code have it; the weights of
the encoder are not a part of either. The others are published models for segmentation at their published sizes, and
start from their published weights."""
