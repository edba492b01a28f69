"""Weak and strong views: shared geometry, seeds, masks at crop size."""

import random

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision.transforms.v2.functional as functional
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import INSTANCE_TYPE, Category, ClassMap
from cast_ray.data import views
from cast_ray.data.views import fit_image, make_sample
from cast_ray.recipe import DataConfig

CLASSES = ClassMap([Category(1, "disc"), Category(4, "square"), Category(9, "cross")])
STILL = DataConfig(image_px=(32, 32), scale_jitter=(1.0, 1.0), flip=False, color_jitter=0)


def _box(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def _instance(mask, category=4, score=1.0, is_crowd=False):
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    return {"category_id": category, "rle": rle, "score": score, "is_crowd": is_crowd}


def _row(image, instances, **fields):
    return {
        "image_id": "1",
        "uri": "a.png",
        "height": image.shape[0],
        "width": image.shape[1],
        "instances": instances,
        **fields,
    }


def _image(height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _sample(image, instances, data=STILL, seed=0, use_instances=True, truth=True, **fields):
    row = _row(image, instances, **fields)
    return make_sample(image, row, CLASSES, data, seed, use_instances=use_instances, truth=truth)


def test_without_jitter_the_weak_view_is_the_image():
    image, mask = _image(), _box(32, 32, 3, 5, 20, 30)
    sample = _sample(image, [_instance(mask, score=0.75)])
    np.testing.assert_array_equal(sample["weak"], image.transpose(2, 0, 1))
    np.testing.assert_array_equal(sample["masks"], mask[None])
    assert sample["labels"].tolist() == [1] and sample["weights"].tolist() == [0.75]
    assert sample["valid"].all() and not sample["ignore"].any()
    np.testing.assert_array_equal(sample["truth_instance"], mask.astype(np.int16))
    np.testing.assert_array_equal(sample["truth_class"], np.where(mask, 1, 3))
    assert {n: a.dtype.name for n, a in sample.items()} == {
        "weak": "uint8",
        "strong": "uint8",
        "valid": "bool",
        "masks": "bool",
        "labels": "int64",
        "weights": "float32",
        "ignore": "bool",
        "truth_instance": "int16",
        "truth_class": "int16",
    }


def test_image_and_masks_share_geometry():
    """A white box on black, and its mask, stay in the same place under any scale, crop, padding and flip."""
    data = DataConfig(image_px=(48, 64), scale_jitter=(0.4, 2.0), color_jitter=0)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(20, 150, 2).tolist()
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask = _box(height, width, top, left, top + height // 2, left + width // 3)
        image = np.repeat(255 * mask[:, :, None].astype(np.uint8), 3, axis=2)
        sample = _sample(image, [_instance(mask)], data, seed)
        bright = sample["weak"][0] > 127
        drawn = sample["masks"].any(0)
        disagree = (bright != drawn).sum()
        outline = 2 * (height + width) * 64 / min(height, width)
        assert disagree <= max(4, 0.04 * bright.sum() + 0.2 * outline)
        assert not sample["weak"][:, ~sample["valid"]].any() and not sample["strong"][:, ~sample["valid"]].any()
        assert not (drawn & ~sample["valid"]).any()
        assert (sample["truth_instance"][~sample["valid"]] == -1).all()
        assert sample["weak"].shape == sample["strong"].shape == (3, 48, 64)


def test_masks_are_cut_as_if_drawn_at_the_images_size():
    """Any run lengths, any crop (reduced, enlarged, padded, mirrored), against pycocotools and plain indexing."""
    rng = np.random.default_rng(0)
    for case in range(200):
        height, width = rng.integers(1, 80, 2).tolist()
        data = DataConfig(image_px=tuple(rng.integers(1, 70, 2).tolist()), scale_jitter=(0.3, 3.0))
        g = views._random_geometry(height, width, data, rng)
        rows = g.top + (np.arange(g.out_height) * 2 + 1) * g.height // (2 * g.out_height)
        columns = g.left + (np.arange(g.out_width) * 2 + 1) * g.width // (2 * g.out_width)
        if g.mirrored:
            columns = columns[::-1]
        cutter = views._MaskCutter(g, height, width)
        for density in (0, 0.02, 0.5, 0.98, 1):
            rle = _instance(rng.random((height, width)) < density)["rle"]
            whole = mask_utils.decode({"size": [height, width], "counts": rle}).astype(bool)
            found = np.zeros((g.out_height, g.out_width), dtype=bool)
            place, strip = cutter.cut(rle)
            found[:, place] = strip
            np.testing.assert_array_equal(found, whole[np.ix_(rows, columns)], err_msg=f"{case} {density} {g}")


def test_training_sizes_are_relative_to_what_the_recipe_names():
    """fit: to the crop; native: to the image; [S, L]: to a short side of S, never more than L on the long one."""

    def scales(height, width, **fields):
        data = DataConfig(image_px=(64, 64), **fields)
        rng = np.random.default_rng(0)
        return np.array([views._random_scale(height, width, data, rng) for _ in range(300)])

    fitted = scales(100, 200, scale_jitter=(0.1, 2.0))
    assert 0.032 <= fitted.min() < 0.05 and 0.61 < fitted.max() <= 0.64  # .1 to 2 of 64 / 200
    native = scales(100, 200, train_resize="native", scale_jitter=(0.5, 2.0))
    assert 0.5 <= native.min() < 0.52 and 1.98 < native.max() <= 2
    short = scales(100, 200, train_resize=(50, 80), scale_jitter=(0.5, 2.0), scale_steps=4)
    np.testing.assert_allclose(np.unique(short), [0.25, 0.4])  # 25, then 50, 75 and 100 cut to 80 / 200


def test_flip_mirrors_image_and_masks():
    image, mask = _image(), _box(32, 32, 3, 5, 20, 12)
    data = STILL.model_copy(update={"flip": True})
    seen = set()
    for seed in range(12):
        sample = _sample(image, [_instance(mask)], data, seed)
        mirrored = bool(sample["masks"][0][:, 20:27].any())
        order = slice(None, None, -1 if mirrored else 1)
        np.testing.assert_array_equal(sample["weak"], image.transpose(2, 0, 1)[:, :, order])
        np.testing.assert_array_equal(sample["masks"][0], mask[:, order])
        seen.add(mirrored)
    assert seen == {True, False}


def test_seed_decides_everything_and_nothing_global_is_touched():
    image, mask = _image(40, 50), _box(40, 50, 3, 5, 20, 30)
    data = DataConfig(image_px=(32, 32))
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = (torch.get_rng_state(), np.random.get_state(legacy=True)[1].copy(), random.getstate())  # type: ignore[index]
    first = _sample(image, [_instance(mask)], data, 5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state(legacy=True)[1]).all() and before[2] == random.getstate()  # type: ignore[index]
    torch.manual_seed(99)
    second = _sample(image, [_instance(mask)], data, 5)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    other = _sample(image, [_instance(mask)], data, 6)
    assert (first["weak"] != other["weak"]).any()


def test_strong_view_differs_in_colour_only_and_can_be_left_out():
    image = _image()
    row = _row(image, [])
    with_strong = make_sample(image, row, CLASSES, STILL, 3, use_instances=True, truth=True)
    without = make_sample(image, row, CLASSES, STILL, 3, use_instances=True, truth=True, strong=False)
    np.testing.assert_array_equal(with_strong["weak"], without["weak"])
    np.testing.assert_array_equal(without["strong"], without["weak"])
    assert (with_strong["strong"] != with_strong["weak"]).mean() > 0.5
    grey = 0
    for seed in range(60):
        strong = _sample(image, [], seed=seed)["strong"]
        grey += bool((strong[0] == strong[1]).all() and (strong[1] == strong[2]).all())
    assert 4 <= grey <= 22  # p = .2


def test_strong_blur_is_torchvisions(monkeypatch):
    monkeypatch.setattr(views, "STRONG_JITTER", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(views, "STRONG_GRAYSCALE", 0.0)
    monkeypatch.setattr(views, "STRONG_BLUR_SIGMA", (1.3, 1.3))
    image = _image()
    expected = functional.gaussian_blur(torch.from_numpy(image).permute(2, 0, 1).float(), [5, 5], [1.3, 1.3])
    np.testing.assert_allclose(_sample(image, [])["strong"], expected.round(), atol=1)


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (0, functional.adjust_brightness),
        (1, functional.adjust_contrast),
        (2, functional.adjust_saturation),
        (3, functional.adjust_hue),
    ],
)
def test_each_jitter_is_torchvisions(operation, reference):
    """Within the rounding to 8 bits; a hue has 256 steps, of up to 6 levels of a colour each."""
    image = _image(40, 48)
    strength = tuple(0.4 if i == operation else 0.0 for i in range(4))
    for seed in range(20):
        changes = 0.4 * np.random.default_rng(seed).uniform(-1, 1, 4)
        factor = float(changes[operation]) + (operation != 3)
        expected = reference(torch.from_numpy(image).permute(2, 0, 1).float() / 255, factor).permute(1, 2, 0) * 255
        found = views._jitter(image, strength, np.random.default_rng(seed))
        difference = np.abs(found.astype(float) - expected.numpy())
        assert difference.mean() < (1.5 if operation == 3 else 0.6)
        assert difference.max() <= (12 if operation == 3 else 1.5)


def _ssd(image, seeds=400):
    data = STILL.model_copy(update={"color": "ssd"})
    return [_sample(image, [], data, seed)["weak"][:, 0, 0] for seed in range(seeds)]


def test_ssd_brightness_and_contrast_have_their_ranges_and_probability():
    """Grey has neither hue nor saturation: brightness +-32 (p .5), then contrast .5 to 1.5 (p .5)."""
    grey = [int(pixel[0]) for pixel in _ssd(np.full((32, 32, 3), 120, np.uint8))]
    assert 0.18 < np.mean([level == 120 for level in grey]) < 0.33
    assert 0.5 * 88 - 1 <= min(grey) < 70 and 200 < max(grey) <= 1.5 * 152 + 1


def test_ssd_saturation_and_hue_have_their_ranges_and_probability(monkeypatch):
    monkeypatch.setattr(views, "SSD_BRIGHTNESS", 0)
    red = np.full((32, 32, 3), (200, 100, 100), np.uint8)
    monkeypatch.setattr(views, "SSD_FACTOR", (1.0, 1.0))
    hues = [int(cv2.cvtColor(pixel[None, None], cv2.COLOR_RGB2HSV)[0, 0, 0]) for pixel in _ssd(red)]
    turned = [hue - 180 if hue > 90 else hue for hue in hues]
    assert -19 <= min(turned) < -14 and 14 < max(turned) <= 19  # +-18, within the rounding to 8 bits
    assert 0.42 < np.mean([turn == 0 for turn in turned]) < 0.62  # p .5, and the middle of the range
    monkeypatch.setattr(views, "SSD_HUE", 0)
    monkeypatch.setattr(views, "SSD_FACTOR", (0.5, 1.5))
    shares = [1 - min(pixel) / max(pixel) for pixel in _ssd(red) if max(pixel) < 255]  # which contrast leaves alone
    assert 0.24 <= min(shares) < 0.3 and 0.7 < max(shares) <= 0.77
    assert 0.4 < np.mean([abs(share - 0.5) < 0.006 for share in shares]) < 0.62


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_ssd_changes_happen_with_their_probability(monkeypatch, probability):
    monkeypatch.setattr(views, "SSD_PROBABILITY", probability)
    image, data = _image(), STILL.model_copy(update={"color": "ssd"})
    same = [np.array_equal(_sample(image, [], data, seed)["weak"], image.transpose(2, 0, 1)) for seed in range(20)]
    assert not any(same) if probability else all(same)


def test_weak_colour_jitter_has_its_strength():
    image = np.full((32, 32, 3), 100, dtype=np.uint8)
    data = STILL.model_copy(update={"color_jitter": 0.2})
    levels = [_sample(image, [], data, seed)["weak"].mean() for seed in range(30)]
    assert 78 <= min(levels) < 90 and 110 < max(levels) <= 122


def test_ignore_regions_of_no_class_are_for_evaluation_only():
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    void, thing = _instance(_box(32, 32, 0, 0, 8, 8), 77, is_crowd=True), _instance(_box(32, 32, 12, 12, 30, 30), 4)
    with_void, without = (_sample(image, instances, seed=2) for instances in ([void, thing], [thing]))
    for name, array in without.items():
        np.testing.assert_array_equal(with_void[name], array)


def test_crowds_are_ignored_and_slivers_unknown():
    image = _image()
    crowd, sliver = _box(32, 32, 0, 0, 8, 8), _box(32, 32, 30, 0, 31, 3)
    large, small = _box(32, 32, 10, 10, 30, 30), _box(32, 32, 12, 12, 16, 16)
    instances = [_instance(small, 9), _instance(crowd, 1, is_crowd=True), _instance(sliver, 1), _instance(large, 1)]
    sample = _sample(image, instances)
    np.testing.assert_array_equal(sample["masks"], [small, large])
    np.testing.assert_array_equal(sample["ignore"], crowd)
    assert sample["labels"].tolist() == [2, 0]
    truth, label = sample["truth_instance"], sample["truth_class"]
    assert (truth[crowd] == -1).all() and (truth[sliver] == -1).all() and (label[sliver] == -1).all()
    assert (truth[small] == 1).all() and (truth[large & ~small] == 2).all() and (label[small] == 2).all()
    assert truth[31, 31] == 0 and label[31, 31] == 3


def test_unknown_truth_and_hidden_instances():
    image, mask = _image(), _box(32, 32, 3, 5, 20, 30)
    hidden = _sample(image, [_instance(mask)], use_instances=False, truth=False)
    assert len(hidden["labels"]) == 0 and hidden["masks"].shape == (0, 32, 32)
    assert (hidden["truth_instance"] == -1).all() and (hidden["truth_class"] == -1).all()
    oracle = _sample(image, [_instance(mask)], use_instances=False, truth=True)
    assert len(oracle["labels"]) == 0 and (oracle["truth_instance"][mask] == 1).all()
    pseudo = _box(32, 32, 0, 0, 9, 9)
    both = _sample(image, [_instance(pseudo, 1, score=0.5)], truth_instances=[_instance(mask, 9)])
    np.testing.assert_array_equal(both["masks"], pseudo[None])
    np.testing.assert_array_equal(both["truth_class"], np.where(mask, 2, 3))


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(image_px=(24, 32), scale_jitter=(0.3, 2.5)),
        DataConfig(image_px=(24, 32), scale_jitter=(0.5, 1.5), train_resize="native"),
        DataConfig(image_px=(24, 32), scale_jitter=(0.5, 2.0), train_resize=(20, 60), color="ssd"),
        DataConfig(image_px=(24, 32), whole_images=True),
    ],
    ids=["fit", "native", "sides", "whole"],
)
def test_a_sample_of_the_window_is_that_of_the_image(data):
    image = _image(40, 56)
    row = _row(image, [_instance(_box(40, 56, 3, 5, 30, 50)), _instance(_box(40, 56, 20, 0, 40, 20), category=9)])
    smaller = 0
    for seed in range(20):
        top, left, height, width = views.window_of(row, data, seed)
        part = image[top : top + height, left : left + width]
        smaller += part.shape != image.shape
        of_part, of_whole = (
            make_sample(pixels, row, CLASSES, data, seed, use_instances=True, truth=True) for pixels in (part, image)
        )
        for name in of_whole:
            np.testing.assert_array_equal(of_part[name], of_whole[name])
    assert smaller == (0 if data.whole_images else pytest.approx(15, abs=5))


def test_record_and_image_must_agree():
    image = _image(8, 9)
    row = _row(image, [])
    with pytest.raises(ValueError, match=r"a\.png: 9 x 8 pixels, but its record says 9 x 32"):
        make_sample(image, {**row, "height": 32}, CLASSES, STILL, 0, use_instances=True, truth=True)
    with pytest.raises(ValueError, match=r"a\.png: category 5 is not in the class list"):
        _sample(image, [_instance(_box(8, 9, 0, 0, 5, 5), 5)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (2, 3), (300, 7)])
def test_extreme_shapes(shape):
    image = _image(*shape)
    data = DataConfig(image_px=(32, 48), scale_jitter=(0.5, 2.0))
    for seed in range(6):
        sample = _sample(image, [_instance(np.ones(shape, dtype=bool))], data, seed)
        assert sample["weak"].shape == (3, 32, 48) and sample["valid"].any()
    padded, size = fit_image(image, (32, 48))
    assert padded.shape == (3, 32, 48) and 1 <= size[0] <= 32 and 1 <= size[1] <= 48


def test_records_as_arrow_hands_them_out():
    image, mask = _image(), _box(32, 32, 3, 5, 20, 30)
    instances = pa.array([[_instance(mask)]], pa.list_(INSTANCE_TYPE)).to_pylist()[0]
    np.testing.assert_array_equal(_sample(image, instances)["masks"], mask[None])


def test_fit_image_pads_bottom_and_right():
    image = _image(20, 40)
    padded, size = fit_image(image, (32, 32))
    assert size == (16, 32) and padded.dtype == np.uint8 and not padded[:, 16:].any()
    exact, size = fit_image(_image(), (32, 32))
    np.testing.assert_array_equal(exact, _image().transpose(2, 0, 1))
    assert size == (32, 32)
    enlarged, size = fit_image(np.full((8, 4, 3), 9, np.uint8), (64, 64))
    assert size == (64, 32) and (enlarged[:, :, :32] == 9).all() and not enlarged[:, :, 32:].any()
