"""The rivals against loops over their own formulas."""

import math

import pytest
import torch
from contrastive_reference import all_weights, centres, dense_loss, pseudo_labels, similarity
from contrastive_scenes import gradients, scene

from cast_ray.losses.contrastive.loss import contrastive_loss
from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.losses.contrastive.pixels import diagnose
from cast_ray.recipe import ContrastiveConfig

SIZE, T, R = (2, 3), 0.3, 4


def loops(inputs, **changes):
    config = ContrastiveConfig(num_negatives=R, **changes)
    labels = (inputs[k] for k in ("mask_logits", "class_logits", "valid", "truth_instance"))
    return all_weights(*labels, SIZE, config), config


def check(inputs, kind, wanted, count, **changes):
    config = ContrastiveConfig(kind=kind, estimator="expectation", num_negatives=R, **changes)
    found = contrastive_loss(PixelViews(**inputs), config=config, temperature=T)
    torch.testing.assert_close(found.sum, wanted)
    assert found.count == count > 0
    for a, b in zip(gradients(inputs, found.sum), gradients(inputs, wanted)):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)
    sampled = config.model_copy(update={"estimator": "sampled", "num_negatives": 512})
    expected = config.model_copy(update={"num_negatives": 512})
    many = contrastive_loss(PixelViews(**inputs), config=sampled, temperature=T).sum
    mean = contrastive_loss(PixelViews(**inputs), config=expected, temperature=T).sum
    torch.testing.assert_close(many, mean, rtol=0.01, atol=0)


def test_infonce_takes_negatives_from_the_strong_views():
    inputs = scene()
    rows, _ = loops(inputs, sampler="uniform")
    zw, zs = inputs["z_weak"].flatten(2), inputs["z_strong"].flatten(2)
    total = 0
    for a, row in rows.items():
        positive = similarity(zw, zs, a, a, T).exp()
        negative = sum(similarity(zw, zs, a, q, T).exp() for q in row) * R / len(row)
        total = total - (positive / (positive + negative)).log()
    check(inputs, "infonce", total, 12, sampler="fusion", hinge=0.5)


def test_pc2seg_draws_other_classes_of_other_images():
    inputs = scene(images=3)
    rows, config = loops(inputs, sampler="class", scope="cross-image", normalise="sum")
    wanted, count = dense_loss(inputs["z_weak"], inputs["z_strong"], rows, config, T, "expectation")
    check(inputs, "pc2seg", wanted, count)


@pytest.mark.parametrize("scope", ["batch", "cross-image"])
def test_supervised_pulls_its_class_and_pushes_the_others(scope):
    inputs = scene(images=2)
    inputs["truth_class"][1] = -1  # unlabelled: the class is the most probable one
    rows, _ = loops(inputs, sampler="uniform", scope=scope)
    y = pseudo_labels(inputs["mask_logits"], inputs["class_logits"], SIZE, ContrastiveConfig(sampler="class"))
    truth = centres(inputs["truth_class"], SIZE)
    category = [[t if t >= 0 else int(y[b][p][1].argmax()) for p, t in enumerate(row)] for b, row in enumerate(truth)]
    zw, total, count = inputs["z_weak"].flatten(2), 0, 0
    for a, row in rows.items():
        alike = [q for q in row if category[q[0]][q[1]] == category[a[0]][a[1]]]
        other = [q for q in row if q not in alike]
        if not alike or not other:
            continue
        count += 1
        against = sum(similarity(zw, zw, a, q, T).exp() for q in other) * R / len(other)
        for q in alike:
            positive = similarity(zw, zw, a, q, T).exp()
            total = total - (positive / (positive + against)).log() / len(alike)
    check(inputs, "supervised", total, count, scope=scope)


@pytest.mark.parametrize("kind", ["infonce", "pc2seg", "supervised"])
@pytest.mark.parametrize("estimator", ["sampled", "expectation"])
def test_one_image_of_one_class_is_harmless(kind, estimator):
    inputs = scene(images=1)
    inputs["truth_class"][:] = 0
    config = ContrastiveConfig(kind=kind, estimator=estimator, scope="cross-image")
    out = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.07)
    assert out.sum == 0 and out.count == 0
    assert all(g.isfinite().all() and not g.any() for g in gradients(inputs, out.sum))


@pytest.mark.parametrize("kind", ["infonce", "pc2seg", "supervised"])
def test_rivals_have_diagnostics_and_no_oracle(kind):
    out = contrastive_loss(PixelViews(**scene()), config=ContrastiveConfig(kind=kind), temperature=0.1)
    assert out.statistics is not None
    facts = diagnose(out.statistics, 0.1)
    assert all(map(math.isfinite, facts.values())) and facts["raw_loss"] == pytest.approx((out.sum / out.count).item())
    with pytest.raises(ValueError, match="expected kind cast"):
        ContrastiveConfig(kind=kind, sampler="oracle")
