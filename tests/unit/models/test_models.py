"""Segmenter and postprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import Predictions
from cast_ray.models.heads import pick_proposals
from cast_ray.models.postprocess import to_instances
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import EncoderConfig, ModelConfig

ENCODERS = {
    "convnext": EncoderConfig(name="convnext", widths=(8, 16, 24, 32), depths=(1, 1, 1, 1), stem_stride=2),
    "convnext-4": EncoderConfig(name="convnext", widths=(8, 16, 24), depths=(1, 1, 1), stem_stride=4),
    "conv": EncoderConfig(name="conv", widths=(8, 16, 24, 32), depths=(1, 1, 2, 1), stem_stride=2),
}


def tiny(encoder: str = "convnext", proposals: bool = True, local_masks: bool = False) -> ModelConfig:
    return ModelConfig(
        encoder=ENCODERS[encoder],
        hidden_dim=16,
        num_queries=5,
        num_layers=2,
        feedforward_dim=16,
        proposals=proposals,
        local_masks=local_masks,
    )


def images(batch: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("proposals", "local_masks"), [(True, False), (True, True), (False, False)])
def test_forward_shapes_and_every_parameter_gets_a_gradient(encoder: str, proposals: bool, local_masks: bool):
    model = build_segmenter(tiny(encoder, proposals, local_masks), num_classes=3, seed=0)
    out = model(images())
    assert isinstance(out, Predictions)
    assert len(out.class_logits) == len(out.mask_logits) == 3
    assert {tuple(x.shape) for x in out.class_logits} == {(2, 5, 4)}
    assert {tuple(x.shape) for x in out.mask_logits} == {(2, 5, 8, 12)}
    for stride, dim in model.feature_dims.items():
        assert tuple(out.features[stride].shape) == (2, dim, 32 // stride, 48 // stride)
    assert all(len(x) == 2 for x in out.auxiliary.values())
    assert bool(out.auxiliary) == proposals
    terms = [x.square().mean() for x in (*out.class_logits, *out.mask_logits)]
    terms += [x.sum() * 1e-3 for x in (*out.features.values(), *out.auxiliary.values())]
    sum(terms).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_image_is_predicted_alike_alone_and_in_a_batch(encoder: str):
    model = build_segmenter(tiny(encoder), 3, 0)
    both, alone = model(images()), model(images()[1:])
    torch.testing.assert_close(both.mask_logits[-1][1:], alone.mask_logits[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.class_logits[-1][1:], alone.class_logits[-1], atol=1e-4, rtol=1e-4)


def test_weights_depend_on_the_seed_only_and_the_global_state_is_kept():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_segmenter(tiny(), 3, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    again, other = build_segmenter(tiny(), 3, seed=1).state_dict(), build_segmenter(tiny(), 3, seed=2).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.class_head.weight"], other["head.class_head.weight"])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("proposals", "local_masks"), [(True, False), (True, True), (False, False)])
def test_an_image_off_the_stride_is_padded_and_its_masks_are_cut(encoder: str, proposals: bool, local_masks: bool):
    model = build_segmenter(tiny(encoder, proposals, local_masks), 3, 0)
    out = model(images(2, 40, 52))
    assert out.mask_logits[-1].shape[2:] == (10, 13)
    assert {s: tuple(x.shape[2:]) for s, x in out.features.items()} == {
        s: (-(-40 // s), -(-52 // s)) for s in model.feature_dims
    }
    # What lies under the padding is cut off: only the encoder and the pixel decoder see it.
    padded = F.pad(images(2, 40, 52), (0, 12, 0, 8))
    for stride, features in model.encode(padded).items():
        if 40 % stride == 0 and 52 % stride == 0:
            torch.testing.assert_close(out.features[stride], features[..., : 40 // stride, : 52 // stride])


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        build_segmenter(ModelConfig(encoder=EncoderConfig(name="nonet")), 3, 0)
    with pytest.raises(ValueError, match="stride 4"):
        build_segmenter(ModelConfig(encoder=EncoderConfig(stem_stride=8)), 3, 0)
    with pytest.raises(ValueError, match="hidden_dim is 18"):
        build_segmenter(ModelConfig(hidden_dim=18), 3, 0)


def test_local_maxima_come_before_their_neighbours():
    objectness = torch.zeros(4, 4)
    objectness[0, 0], objectness[0, 1], objectness[3, 3] = 5.0, 4.0, 1.0
    logits = torch.stack([objectness.flatten(), torch.zeros(16)], -1)[None]
    logits[0, :, 1] = torch.where(objectness.flatten() == 0, 6.0, 0.0)
    assert pick_proposals(logits, (4, 4), 3)[0, :2].tolist() == [0, 15]
    assert pick_proposals(logits, (4, 4), 99).shape == (1, 16)


def test_instances_come_back_at_image_size_by_score():
    logits = torch.full((1, 2, 8, 8), -9.0)
    logits[0, 0, :4, :4] = 9.0
    logits[0, 1, 2:, 2:] = 0.5
    classes = torch.tensor([[[0.0, 3.0, 0.0], [4.0, 0.0, 0.0]]])
    # 64x48 shown at 32x24 inside a 32x32 crop: the right quarter is padding.
    (found,) = to_instances((classes, logits), [(64, 48)], [(32, 24)], (32, 32), 3)
    assert [i["score"] for i in found] == sorted((i["score"] for i in found), reverse=True)
    assert len(found) == 3
    best = next(i for i in found if i["label"] == 1 and i["mask_quality"] > 0.9)
    mask = coco_mask.decode({"size": best["size"], "counts": best["rle"]})
    assert mask.shape == (64, 48)
    assert mask[:30, :30].all() and not mask[36:].any() and not mask[:, 36:].any()
    assert best["score"] == pytest.approx(best["mask_quality"] * np.exp(3) / (np.exp(3) + 2), rel=1e-3)


def test_empty_masks_are_left_out():
    assert to_instances(
        (torch.zeros(1, 2, 3), torch.full((1, 2, 8, 8), -1.0)), [(32, 32)], [(32, 32)], (32, 32), 9
    ) == [[]]


def test_a_convnext_checkpoint_folder_gives_its_weights_and_strides(tmp_path):
    source = build_segmenter(tiny("convnext-4"), 3, seed=4).encoder
    source.backbone.save_pretrained(tmp_path)  # type: ignore[operator]
    config = tiny().model_copy(update={"encoder": EncoderConfig(name="convnext", checkpoint=str(tmp_path))})
    loaded = build_segmenter(config, 3, seed=5).encoder
    assert loaded.channels == source.channels == {4: 8, 8: 16, 16: 24}
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for stride, features in source.eval()(pixels).items():
        torch.testing.assert_close(loaded.eval()(pixels)[stride], features)


def test_the_plain_encoder_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="'conv' has no pretrained weights"):
        build_segmenter(ModelConfig(encoder=EncoderConfig(name="conv", checkpoint="somewhere")), 3, 0)
    with pytest.raises(ValueError, match="stem_stride is 3"):
        build_segmenter(ModelConfig(encoder=EncoderConfig(name="conv", stem_stride=3)), 3, 0)
