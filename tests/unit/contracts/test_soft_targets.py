"""Soft pseudo-labels from a teacher's queries to the student's loss, against dense and slow computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_scenes import MODEL, NUM_CLASSES, draw_image

from cast_ray.contracts.instance import Instance
from cast_ray.contracts.records import Category, ClassMap, Predictions, Targets
from cast_ray.contracts.soft_targets import (
    grid_hw,
    mask_probabilities,
    mask_targets,
    sample_probabilities,
    with_beliefs,
)
from cast_ray.data.batches import collate, join, to_batch
from cast_ray.data.formats.segmentations import encode_mask
from cast_ray.data.views import make_sample
from cast_ray.losses.set.criterion import LossPoints, set_loss
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import DataConfig, LossConfig
from cast_ray.teachers.expert import ExpertTeacher

CATEGORIES = [Category(4 + i, str(i)) for i in range(NUM_CLASSES)]
HEIGHT, WIDTH = 60, 84


def blob(cy: float, cx: float, radius: float) -> np.ndarray:
    """Logits of a disc: 0 on its edge, falling by 1/2 a pixel outwards. float32 [HEIGHT, WIDTH]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return ((radius - np.hypot(y - cy, x - cx)) / 2).astype(np.float32)


def stored(logits: np.ndarray) -> bytes:
    whole = (HEIGHT, WIDTH)
    return mask_probabilities(torch.from_numpy(logits)[None], whole, whole, whole)[0]


def test_probabilities_are_those_of_the_logits_at_every_point_of_the_image() -> None:
    logits = blob(30, 40, 17)
    y, x = np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5
    found = sample_probabilities(stored(logits), (HEIGHT, WIDTH), y, x) / 255
    inner = (slice(3, -3), slice(3, -3))
    assert np.abs(found - 1 / (1 + np.exp(-logits)))[inner].max() < 0.08  # a value for each 4 x 4 pixels
    part = sample_probabilities(stored(logits), (HEIGHT, WIDTH), y[10:20], x[::-1]) / 255
    np.testing.assert_array_equal(part, found[10:20, ::-1])


def test_padding_of_the_teachers_image_is_cut_off() -> None:
    """An image of 60 x 84 that fills 30 x 42 of a padded 48 x 48, seen by a model of stride 4."""
    logits = torch.from_numpy(blob(30, 40, 17))[None, None]
    small = F.interpolate(logits, size=(30, 42), mode="bilinear", antialias=True)
    padded = F.pad(small, (0, 6, 0, 18), value=8.0)  # sure of the padding
    coarse = F.interpolate(padded, size=(12, 12), mode="bilinear", antialias=True)[0]
    (found,) = mask_probabilities(coarse, (HEIGHT, WIDTH), (30, 42), (48, 48))
    middle = sample_probabilities(found, (HEIGHT, WIDTH), np.array([30.0, 30.0, 58.0]), np.array([40.0, 4.0]))
    assert middle[0, 0] > 220 and middle[1, 1] < 20 and middle[2, 1] < 128


def record(*discs: tuple[float, float, float]) -> dict[str, Any]:
    """Soft pseudo-labels of discs, each with its probabilities, painted in order."""
    instances, taken = [], np.zeros((HEIGHT, WIDTH), bool)
    for k, disc in enumerate(discs):
        mask = (blob(*disc) > 0) & ~taken
        taken |= mask
        probs = [0.2] * NUM_CLASSES + [0.4 - 0.2 * (NUM_CLASSES - 2)]
        probs[k] = 0.4
        instances.append(
            {"category_id": 4 + k, "rle": encode_mask(mask), "score": 0.5, "is_crowd": False}
            | {"class_probs": probs, "mask_probs": stored(blob(*disc))}
        )
    return {"uri": "", "height": HEIGHT, "width": WIDTH, "instances": instances, "truth_instances": []}


def sample(row: dict[str, Any], seed: int, **data: Any) -> dict[str, np.ndarray]:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    config = DataConfig(**{"image_px": (48, 64), "scale_jitter": (0.5, 2.0), **data})
    return make_sample(image, row, ClassMap(CATEGORIES), config, seed, use_instances=True, truth=False)


@pytest.mark.parametrize("seed", range(12))
def test_a_crop_shows_the_probabilities_where_it_shows_the_masks(seed: int) -> None:
    """Whatever the window, its scale and its mirror image: more likely than not is the mask itself."""
    found = sample(record((30, 28, 16), (30, 62, 14)), seed)
    assert found["mask_probs"].shape == (len(found["masks"]), *grid_hw((48, 64)))
    assert found["class_probs"].shape == (len(found["masks"]), NUM_CLASSES + 1)
    for mask, probs in zip(found["masks"], found["mask_probs"]):
        likely = (
            F.interpolate(torch.from_numpy(probs)[None, None].float(), size=mask.shape, mode="bilinear")[0, 0] > 127
        )
        inside = likely.numpy() & found["valid"]
        assert (inside & mask).sum() > 0.75 * (inside | mask).sum()


def test_labels_without_probabilities_and_truth_stay_hard() -> None:
    row = record((30, 28, 16), (30, 62, 14))
    del row["instances"][1]["mask_probs"]
    assert "mask_probs" not in sample(row, 0, scale_jitter=(1, 1))
    assert "mask_probs" not in sample(record(), 0)


def test_a_step_carries_them_for_the_images_that_have_them() -> None:
    rows = [record((30, 28, 16)), record(), record((20, 20, 9), (30, 62, 14))]
    hard = record((30, 28, 16))
    hard["instances"] = [{k: v for k, v in i.items() if "probs" not in k} for i in hard["instances"]]
    samples = [sample(row, seed, scale_jitter=(1, 1)) for seed, row in enumerate([hard, *rows])]
    batch = to_batch(join(collate(samples, 1))).to("cpu")
    assert [t.mask_probs is not None for t in batch.targets] == [False, True, False, True]
    for target, one in zip(batch.targets, samples):
        if "mask_probs" in one:
            assert target.mask_probs is not None and target.class_probs is not None
            assert np.array_equal(target.mask_probs.numpy(), one["mask_probs"])
            assert np.array_equal(target.class_probs.numpy(), one["class_probs"])


def test_a_teacher_tells_what_its_queries_believe_where_it_is_asked() -> None:
    teacher = ExpertTeacher(build_segmenter(MODEL, NUM_CLASSES, 0), CATEGORIES, (32, 32))
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    sizes = [(64, 48), (32, 32)], [(32, 24), (32, 32)]
    hard = teacher.predict(images, *sizes, 6)
    teacher.is_soft = True
    soft = teacher.predict(images, *sizes, 6)
    with torch.no_grad():
        probs = teacher.segmenter(images).class_logits[-1].softmax(-1)
    for b, (mine, bare) in enumerate(zip(soft, hard)):
        assert bare == [{k: v for k, v in i.items() if k not in ("class_probs", "mask_probs")} for i in mine]
        for instance in mine:
            assert instance["score"] == pytest.approx(
                instance["class_probs"][instance["label"]] * instance["mask_quality"], rel=1e-5
            )
            assert any(np.allclose(instance["class_probs"], row, atol=1e-6) for row in probs[b].tolist())
            grid = sample_probabilities(instance["mask_probs"], instance["size"], np.array([0.5]), np.array([0.5]))
            assert grid.shape == (1, 1)


def test_a_teacher_without_queries_believes_its_score_and_its_mask() -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[8:20, 12:33] = True
    bare: Instance = {"label": 1, "score": 0.7, "rle": encode_mask(mask), "size": [HEIGHT, WIDTH]}
    found = with_beliefs(bare, NUM_CLASSES)
    assert found["class_probs"] == pytest.approx([0, 0.7, 0, 0.3]) and "mask_probs" not in bare
    grid = sample_probabilities(
        found["mask_probs"], (HEIGHT, WIDTH), np.arange(2, HEIGHT, 4.0), np.arange(2, WIDTH, 4.0)
    )
    np.testing.assert_allclose(grid / 255, mask.reshape(15, 4, 21, 4).mean((1, 3)), atol=0.01)
    found["score"] = 0.1
    assert with_beliefs(found, NUM_CLASSES)["class_probs"] == found["class_probs"]  # a query's stay


def soft_target(seed: int, count: int) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    target = draw_image(count, seed)[1]
    size = grid_hw(target.masks.shape[1:])
    target.mask_probs = torch.randint(0, 256, (count, *size), generator=generator).byte()
    target.class_probs = torch.rand(count, NUM_CLASSES + 1, generator=generator).softmax(-1)
    return target


def test_a_pixel_that_another_label_has_is_none_of_this_one() -> None:
    target = soft_target(0, 3)
    found = mask_targets(target)
    for k in range(3):
        others = target.masks[[i for i in range(3) if i != k]].any(0) & ~target.masks[k]
        assert not found[k][others].any() and found[k][~others].float().mean() > 0.3
    assert torch.equal(mask_targets(draw_image(2, 1)[1]), draw_image(2, 1)[1].masks)


def slow_soft_loss(predictions: Predictions, targets: list[Targets], config: LossConfig, points: LossPoints) -> Any:
    """Class, mask and dice sums of one layer in which every query has its own target: query n of image b is matched to
    instance n by a class that nothing else predicts."""
    sums = torch.zeros(3, len(targets))
    pair = 0
    for b, target in enumerate(targets):
        for q in range(predictions.class_logits[0].shape[1]):
            logp = predictions.class_logits[0][b, q].log_softmax(-1)
            if q >= len(target.labels):
                sums[0, b] -= config.no_object_weight * logp[-1]
                continue
            wanted = F.one_hot(target.labels[q], NUM_CLASSES + 1).float()
            if config.soft_targets in ("class", "both") and target.class_probs is not None:
                wanted = target.class_probs[q]
            sums[0, b] -= (wanted * logp).sum()
            dense = target.masks[q].float()
            if config.soft_targets in ("mask", "both"):
                dense = mask_targets(target)[q].float()
            where = points.uniform[0, pair][None, None]
            m = (
                F.grid_sample(predictions.mask_logits[0][b, q][None, None], where, align_corners=False)
                .flatten()
                .sigmoid()
            )
            g = F.grid_sample(dense[None, None], where, align_corners=False).flatten()
            sums[1, b] += F.binary_cross_entropy(m, g)
            sums[2, b] += 1 - (2 * (m * g).sum() + 1) / (m.sum() + g.sum() + 1)
            pair += 1
    return sums


@pytest.mark.parametrize("kind", ["off", "class", "mask", "both"])
def test_matched_queries_learn_what_the_teacher_believed(kind: Any) -> None:
    config = LossConfig(num_points=40, exact=False, cost_class=100.0, cost_mask=0.0, cost_dice=0.0, soft_targets=kind)
    targets = [soft_target(3, 3), draw_image(2, 4)[1], draw_image(0, 5)[1]]
    generator = torch.Generator().manual_seed(1)
    class_logits = torch.randn(3, 4, NUM_CLASSES + 1, generator=generator)
    for b, target in enumerate(targets):
        target.labels = torch.arange(len(target.labels))  # query n is the surest of class n
        for n in range(len(target.labels)):
            class_logits[b, n, n] += 8
    mask_logits = torch.randn(3, 4, 8, 8, generator=generator)
    class_logits.requires_grad_(), mask_logits.requires_grad_()
    predictions = Predictions([class_logits], [mask_logits], {}, {})
    points = LossPoints(
        torch.rand(1, 3, 10, 2, generator=generator) * 2 - 1,
        torch.zeros(1, 5, 0, 2),
        torch.rand(1, 5, 40, 2, generator=generator) * 2 - 1,
    )
    found = set_loss(predictions, targets, config, points=points)
    wanted = slow_soft_loss(predictions, targets, config, points)
    for (total, _), reference in zip(found.values(), wanted):
        torch.testing.assert_close(total, reference, rtol=1e-4, atol=1e-5)
    mine = torch.autograd.grad(
        torch.stack([total.sum() for total, _ in found.values()]).sum(), (class_logits, mask_logits)
    )
    theirs = torch.autograd.grad(wanted.sum(), (class_logits, mask_logits))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
