"""Inference against Mask2Former's own formula and transformers' implementation, without a dense stack of masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Mask2FormerImageProcessor

from cast_ray.contracts.instance import Instance
from cast_ray.models import postprocess
from cast_ray.models.postprocess import can_reach, encode_masks, to_instances


def logits(batch: int = 2, queries: int = 6, classes: int = 4, size: tuple[int, int] = (24, 32)):
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(batch, queries, 5, 5, generator=g), size=size, mode="bicubic")
    return 3 * torch.randn(batch, queries, classes + 1, generator=g), 6 * smooth


def decoded(instance: Instance) -> np.ndarray:
    return coco_mask.decode({"size": instance["size"], "counts": instance["rle"]}).astype(bool)


def original(classes: torch.Tensor, masks: torch.Tensor, image_hw, resized_hw, image_px, num: int):
    """`instance_inference` of Mask2Former's code on one image, with detectron2's resize: (class, score, mask)."""
    masks = F.interpolate(masks[None], size=image_px, mode="bilinear", align_corners=False)[0]
    masks = masks[:, : resized_hw[0], : resized_hw[1]]
    masks = F.interpolate(masks[None], size=image_hw, mode="bilinear", align_corners=False)[0]
    scores = F.softmax(classes, dim=-1)[:, :-1]
    labels = torch.arange(scores.shape[1])[None].repeat(len(scores), 1).flatten(0, 1)
    top, index = scores.flatten(0, 1).topk(num, sorted=False)
    labels = labels[index]
    masks = masks[index // scores.shape[1]]
    binary = (masks > 0).float()
    quality = (masks.sigmoid().flatten(1) * binary.flatten(1)).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    return [(int(c), float(s), m.bool().numpy()) for c, s, m in zip(labels, top * quality, binary)]


@pytest.mark.parametrize("num", [1, 9, 100])
def test_it_is_the_original_formula(num: int) -> None:
    classes, masks = logits()
    sizes, resized, crop = [(70, 131), (90, 120)], [(51, 96), (72, 96)], (72, 96)
    found = to_instances((classes, masks), sizes, resized, crop, num)
    for b in range(2):
        wanted = original(classes[b], masks[b], sizes[b], resized[b], crop, min(num, 24))
        wanted = sorted((w for w in wanted if w[2].any()), key=lambda w: -w[1])
        assert len(found[b]) == len(wanted) > 0
        for instance, (label, score, mask) in zip(found[b], wanted):
            assert (instance["label"], tuple(instance["size"])) == (label, sizes[b])
            assert instance["score"] == pytest.approx(score, rel=1e-4)
            assert np.array_equal(decoded(instance), mask)


def test_it_is_transformers_answer() -> None:
    """Their class fixes the crop at 384 px and the number of detections at that of the queries."""
    classes, masks = logits(size=(96, 96))
    theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(
        SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks),
        threshold=0.0,
        return_binary_maps=True,
    )
    crop = (384, 384)
    for ours, wanted in zip(to_instances((classes, masks), [crop] * 2, [crop] * 2, crop, 6), theirs):
        segments = sorted(wanted["segments_info"], key=lambda s: -s["score"])
        assert [i["label"] for i in ours] == [s["label_id"] for s in segments]
        assert [i["score"] for i in ours] == pytest.approx([s["score"] for s in segments], abs=1e-5)
        for instance, segment in zip(ours, segments):
            assert np.array_equal(decoded(instance), wanted["segmentation"][segment["id"]].bool().numpy())


def test_overlaps_are_kept_and_no_score_is_too_low() -> None:
    classes = torch.tensor([[[9.0, 0.0, 0.0], [-9.0, -9.0, 9.0]]])
    (found,) = to_instances((classes, torch.full((1, 2, 8, 8), 5.0)), [(32, 32)], [(32, 32)], (32, 32), 4)
    assert len(found) == 4 and all(decoded(i).all() for i in found)
    assert min(i["score"] for i in found) < 1e-6


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So that a sum over one mask is added up as one over several is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("min_score", [0.05, 0.1, 0.3, 0.5, 1.0])
def test_a_least_score_leaves_out_what_lies_below_it_and_changes_nothing_else(min_score: float) -> None:
    predictions = logits(batch=3, queries=20)
    sizes, resized, crop = [(70, 131), (90, 120), (10, 10)], [(51, 96), (72, 96), (72, 72)], (72, 96)
    everything = to_instances(predictions, sizes, resized, crop, 60)
    kept = [[i for i in found if i["score"] >= min_score] for found in everything]
    assert to_instances(predictions, sizes, resized, crop, 60, min_score) == kept
    assert sum(map(len, kept)) < sum(map(len, everything))


def test_masks_that_cannot_reach_the_least_score_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(masks: torch.Tensor, *arguments: Any) -> Any:
        made.append(len(masks))
        return encode_masks(masks, *arguments)

    monkeypatch.setattr(postprocess, "encode_masks", counted)
    classes, masks = logits(batch=1, queries=40)
    best_Q = classes[0].softmax(-1)[:, :-1].amax(1)
    for min_score in (0.0, 0.3, 0.9):
        to_instances((classes, masks), [(64, 64)], [(64, 64)], (64, 64), 160, min_score)
    assert made == [40, int((best_Q >= 0.3).sum()), int((best_Q >= 0.9).sum())] and 0 < made[2] < made[1] < 40


def test_a_quality_that_rounds_above_1_is_not_cut_off() -> None:
    """The mean over many sure pixels may come out a little above 1, and the score above P(class)."""
    least = 0.3
    below = torch.tensor([least * (1 - 1e-6), least * 0.99, math.nan])
    assert can_reach(below, least).tolist() == [True, False, True]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return out


def test_masks_of_a_large_image_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "CHUNK_PIXELS", 1 << 20)
    classes, masks = logits(batch=1, queries=50)
    size = (700, 1000)
    with Largest() as largest:
        (found,) = to_instances((classes, masks), [size], [size], size, 100)
    assert len(found) == 100
    assert largest.most <= 4 << 20  # of 140 MB for all 50 queries at once
