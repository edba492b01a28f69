"""Local masks: objects that look alike are told apart, also in images larger than those of the training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from cast_ray.contracts.mask_windows import window_logits
from cast_ray.contracts.records import Batch, Targets
from cast_ray.engine.loop import RunSettings, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.postprocess import predict_instances
from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.recipe import EncoderConfig, LossConfig, ModelConfig, TrainConfig

RADIUS_PX = 6


def make(local_masks: bool) -> Segmenter:
    config = ModelConfig(
        encoder=EncoderConfig(name="conv", widths=(8, 16, 24, 32), stem_stride=2),
        hidden_dim=24,
        num_queries=60,
        num_layers=2,
        feedforward_dim=32,
        local_masks=local_masks,
    )
    return build_segmenter(config, 1, seed=0)


def draw(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image uint8 [3, size, size] of equal discs, in a third of its cells of 16 px, and their masks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    side = size // 16
    cells = rng.choice(side**2, side**2 // 3, replace=False)
    centres = 16 * np.stack([cells // side, cells % side], 1) + 8 + rng.uniform(-2, 2, (len(cells), 2))
    masks = np.stack([(y - top) ** 2 + (x - left) ** 2 <= RADIUS_PX**2 for top, left in centres])
    image = rng.integers(0, 40, (3, size, size)) + 160 * masks.any(0)
    return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(masks)


@torch.no_grad()
def test_the_masks_of_two_equal_objects_differ() -> None:
    image = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    places = [(192, 192), (240, 240)]  # as the network's grids lie to the one, they lie to the other
    for top, left in places:
        image[:, :, top : top + 16, left : left + 16] = 200
    inside = [(slice(top // 4, top // 4 + 4), slice(left // 4, left // 4 + 4)) for top, left in places]
    for local in (False, True):
        model = make(local).eval()
        out = model(image)
        level = out.auxiliary["proposal_class_logits"].shape[2:]
        assert level == (56, 56)
        own, other = (out.mask_logits[-1][0, :, rows, columns].mean((1, 2)) for rows, columns in inside)
        apart = (own - other).abs().max()
        assert (apart > 1) == local, apart


@torch.no_grad()
def test_windows_are_computed_in_single_precision() -> None:
    """In bfloat16 places beyond 128 cells would be off by a cell, and squared distances by more."""
    model = make(True).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(draw(64, 0)[0][None])
    assert out.mask_logits[-1].dtype == torch.float32 and out.mask_logits[-1].isfinite().all()
    windows = torch.zeros(1, 1, 4)
    near = window_logits(windows, torch.tensor([[3]]), (1, 7), (2, 14))
    far = window_logits(windows.bfloat16(), torch.tensor([[300]]), (1, 304), (2, 608))
    torch.testing.assert_close(far[..., 594:], near)


def batches(steps: int, size: int) -> Iterator[Batch]:
    for step in range(steps):
        drawn = [draw(size, 4 * step + i) for i in range(4)]
        images = torch.stack([image for image, _ in drawn])
        unknown = torch.full((4, size, size), -1, dtype=torch.int16)
        targets = [Targets(m, torch.zeros(len(m), dtype=torch.int64), torch.ones(len(m))) for _, m in drawn]
        yield Batch(images, images, torch.ones(4, size, size, dtype=torch.bool), targets, 4, unknown, unknown)


def found_share(model: Segmenter, size: int) -> float:
    """The share of the discs of four new images that is found with an IoU of at least .5, among as many predictions."""
    hits = total = 0
    for seed in range(10_000, 10_004):
        image, masks = draw(size, seed)
        truth = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        (instances,) = predict_instances(model, image[None], max_detections=len(masks))
        rles = [{"size": i["size"], "counts": i["rle"]} for i in instances]
        hits += int((coco_mask.iou(rles, truth, [0] * len(truth)).max(0) >= 0.5).sum()) if rles else 0
        total += len(masks)
    return hits / total


def test_what_is_learnt_on_crops_holds_in_larger_images() -> None:
    """Without windows the same training finds a fifth of the discs of a crop, and none in an image six times as large.

    Their masks then hold several discs each.
    """
    model = make(local_masks=True)
    config = TrainConfig(steps=60, lr=4e-3, ema=0.9)
    objective = Objective(LossConfig(num_points=256, lambda_semi=0), None)
    train(CastNetwork(model, None), objective, batches(60, 64), config, RunSettings("", 0, World()))
    model.eval()
    assert found_share(model, 64) > 0.5
    assert found_share(model, 160) > 0.25


def test_windows_need_the_place_of_each_query() -> None:
    with pytest.raises(ValidationError, match="local_masks needs the place of each query: expected proposals=true"):
        ModelConfig(proposals=False, local_masks=True)
