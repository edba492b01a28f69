"""Our segmenters with the weights of transformers' own models give these models' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.eomt_dinov3 import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

from cast_ray.models.segmenter import Segmenter
from cast_ray.recipe import EncoderConfig, ModelConfig

NUM_CLASSES, NUM_QUERIES = 3, 7


def images(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def shake(model: torch.nn.Module) -> None:
    """Moves every weight, so that none of equal initial value hides a wrong assignment."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def taken(config: ModelConfig, theirs: Any, folder: Path) -> Segmenter:
    """Our segmenter with the saved weights of theirs, and with its class head, which is not taken otherwise."""
    theirs.save_pretrained(folder)
    ours = Segmenter(config.model_copy(update={"checkpoint": str(folder)}), NUM_CLASSES).eval()
    ours.head.class_head.load_state_dict(theirs.class_predictor.state_dict())
    return ours


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved Mask2Former on a tiny Swin."""
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        dim_feedforward=64,
        num_attention_heads=4,
        encoder_layers=2,
        decoder_layers=5,
        num_queries=NUM_QUERIES,
        num_labels=NUM_CLASSES,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    shake(model)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    return folder


def test_mask2former(mask2former: Path, tmp_path: Path) -> None:
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    assert theirs.config.num_labels == NUM_CLASSES
    config = ModelConfig(
        encoder=EncoderConfig(name="swin-t"),
        decoder="msdeform",
        decoder_layers=2,
        decoder_feedforward_dim=48,
        hidden_dim=32,
        num_queries=NUM_QUERIES,
        num_layers=4,
        num_heads=4,
        feedforward_dim=64,
        proposals=False,
    )
    ours = taken(config, theirs, tmp_path)

    pixels = images(64, 96)
    with torch.no_grad():
        out = ours(pixels)
        wanted = theirs(ours._normalised(pixels), output_auxiliary_logits=True)
    assert len(out.class_logits) == len(wanted.auxiliary_logits) + 1 == 5
    for layer, auxiliary in zip(range(4), wanted.auxiliary_logits):
        torch.testing.assert_close(out.class_logits[layer], auxiliary["class_queries_logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.mask_logits[layer], auxiliary["masks_queries_logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.class_logits[-1], wanted.class_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.mask_logits[-1], wanted.masks_queries_logits, rtol=1e-4, atol=1e-4)
    assert out.mask_logits[-1].std() > 0.1  # not equal because both are flat


EOMT = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
    "num_blocks": 3,
    "num_queries": NUM_QUERIES,
    "num_register_tokens": 2,
    "num_labels": NUM_CLASSES,
}


def eomt_segmenter(name: str, theirs: Any, folder: Path) -> Segmenter:
    encoder = EncoderConfig(name=name)
    config = ModelConfig(encoder=encoder, head="eomt", num_queries=NUM_QUERIES, num_layers=3, proposals=False)
    return taken(config, theirs, folder)


def assert_same_eomt(ours: Segmenter, theirs: Any, probs: list[float]) -> None:
    pixels = images(64, 64)
    with torch.no_grad():
        out, wanted = ours(pixels), theirs(ours._normalised(pixels))
    torch.testing.assert_close(out.class_logits[-1], wanted.class_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.mask_logits[-1], wanted.masks_queries_logits, rtol=1e-4, atol=1e-4)
    assert len(out.mask_logits) == 1 + sum(p > 0 for p in probs)
    assert out.mask_logits[-1].std() > 0.1


@pytest.mark.parametrize("probs", [[1, 1, 1], [0, 0, 1], [0, 0, 0]], ids=["masked", "half annealed", "annealed"])
def test_eomt(tmp_path: Path, probs: list[float]) -> None:
    torch.manual_seed(0)
    theirs = EomtForUniversalSegmentation(EomtConfig(**EOMT)).eval()
    shake(theirs)
    theirs.attn_mask_probs.copy_(torch.tensor(probs))
    ours = eomt_segmenter("dinov2-s-reg", theirs, tmp_path)
    assert ours.head.probs == probs
    assert_same_eomt(ours, theirs, probs)


def test_eomt_on_dinov3(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**EOMT, intermediate_size=64)).eval()
    shake(theirs)
    assert_same_eomt(eomt_segmenter("dinov3-s", theirs, tmp_path), theirs, [1, 1, 1])
