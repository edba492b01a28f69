"""Copy-paste of instances pixel by pixel, and its place in a training stream's plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cast_ray.data.copy_paste import SHARE, copy_paste

H, W, C = 12, 16, 3


def sample(seed: int, count: int, *, strong: bool = True, soft: bool = False, truth: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, H, W), bool)
    for mask in masks:
        top, left = rng.integers(0, H - 3), rng.integers(0, W - 4)
        mask[top : top + rng.integers(2, 6), left : left + rng.integers(2, 7)] = True
    labels = rng.integers(0, C, count)
    instance, category = np.zeros((H, W), np.int16), np.full((H, W), C, np.int16)
    for k, mask in enumerate(masks):
        instance[mask], category[mask] = k + 1, labels[k]
    if not truth:
        instance[:], category[:] = -1, -1
    weak = rng.integers(0, 256, (3, H, W)).astype(np.uint8)
    found = {
        "weak": weak,
        "strong": rng.integers(0, 256, (3, H, W)).astype(np.uint8) if strong else weak,
        "valid": rng.random((H, W)) < 0.9,
        "masks": masks,
        "labels": labels,
        "weights": rng.random(count).astype(np.float32),
        "ignore": rng.random((H, W)) < 0.1,
        "truth_instance": instance,
        "truth_class": category,
    }
    if soft:
        found["class_probs"] = rng.random((count, C + 1)).astype(np.float32)
        found["mask_probs"] = rng.integers(0, 256, (count, 3, 4)).astype(np.uint8)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("strong", "soft", "truth"), [(True, False, True), (False, True, False)])
def test_every_pixel_is_the_sources_or_the_samples(seed: int, strong: bool, soft: bool, truth: bool) -> None:
    before = sample(seed, 4, strong=strong, soft=soft, truth=truth)
    source = sample(seed + 50, 3, strong=strong, truth=truth)
    copies = {name: array.copy() for name, array in before.items()}
    after = copy_paste(before, source, np.random.default_rng(seed), min_visible_px=4)
    taken = np.random.default_rng(seed).random(3) < SHARE
    assert all(np.array_equal(before[name], copies[name]) for name in before)  # nothing is written in place
    if not taken.any():
        assert after is before
        return
    over = source["masks"][taken].any(0)
    for y in range(H):
        for x in range(W):
            origin = source if over[y, x] else before
            assert (after["weak"][:, y, x] == origin["weak"][:, y, x]).all()
            assert (after["strong"][:, y, x] == origin["strong"][:, y, x]).all()
            assert after["valid"][y, x] == (before["valid"][y, x] or over[y, x])
            assert after["ignore"][y, x] == (before["ignore"][y, x] and not over[y, x])
            if not truth:
                assert after["truth_class"][y, x] == after["truth_instance"][y, x] == -1
            elif not over[y, x]:
                assert after["truth_instance"][y, x] == before["truth_instance"][y, x]
                assert after["truth_class"][y, x] == before["truth_class"][y, x]
    assert (after["strong"] is after["weak"]) == (not strong)  # which saves its way to the worker
    left = [k for k in range(4) if (before["masks"][k] & ~over).sum() >= 4]
    wanted = [before["masks"][k] & ~over for k in left] + list(source["masks"][taken])
    assert np.array_equal(after["masks"], wanted)
    assert after["labels"].tolist() == before["labels"][left].tolist() + source["labels"][taken].tolist()
    assert after["weights"].tolist() == before["weights"][left].tolist() + source["weights"][taken].tolist()
    if truth:
        assert after["truth_instance"][over].min() > before["truth_instance"].max()
        last = source["masks"][taken][-1]
        assert (after["truth_class"][last] == source["labels"][taken][-1]).all()
    if soft:
        assert len(after["mask_probs"]) == len(after["class_probs"]) == len(after["masks"])
        assert np.array_equal(after["class_probs"][: len(left)], before["class_probs"][left])
        assert (after["class_probs"][len(left) :].argmax(1) == source["labels"][taken]).all()
        shares = source["masks"][taken].reshape(-1, 3, 4, 4, 4).mean((2, 4))  # of the pixels of each cell of the grid
        np.testing.assert_allclose(after["mask_probs"][len(left) :] / 255, shares, atol=0.01)
