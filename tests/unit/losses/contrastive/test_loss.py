"""L_pxl against the loops of contrastive_reference, and its edges."""

import math
from unittest import mock

import pytest
import torch
from contrastive_reference import all_weights, centres, dense_loss
from contrastive_scenes import gradients, scene

from cast_ray.losses.contrastive import pixels as pixel_contrast
from cast_ray.losses.contrastive.loss import contrastive_loss, temperature_at
from cast_ray.losses.contrastive.pixel_problem import PixelViews, pose_problem
from cast_ray.losses.contrastive.pixels import diagnose
from cast_ray.losses.joint_step import JointStep
from cast_ray.recipe import CONTRASTIVE_PRESETS, ContrastiveConfig

SIZE = (2, 3)


def facts_of(inputs, config, temperature=0.1):
    out = contrastive_loss(PixelViews(**inputs), config=config, temperature=temperature)
    assert out.statistics is not None and not out.statistics.requires_grad
    return diagnose(out.statistics, temperature)


def column(name, **changes):
    return ContrastiveConfig(**CONTRASTIVE_PRESETS[name] | changes)


def reference(inputs, config, temperature, how="expectation"):
    weights = all_weights(
        inputs["mask_logits"], inputs["class_logits"], inputs["valid"], inputs["truth_instance"], SIZE, config
    )
    return dense_loss(inputs["z_weak"], inputs["z_strong"], weights, config, temperature, how)


def assert_equal_to_reference(inputs, config, temperature, how="expectation"):
    found = contrastive_loss(PixelViews(**inputs), config=config, temperature=temperature)
    wanted, count = reference(inputs, config, temperature, how)
    torch.testing.assert_close(found.sum, wanted, rtol=1e-5, atol=1e-5)
    assert found.count == count > 0
    for a, b in zip(gradients(inputs, found.sum), gradients(inputs, wanted)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["batch", "same-image", "cross-image"])
@pytest.mark.parametrize("sampler", ["uniform", "mask", "class", "fusion", "oracle"])
@pytest.mark.parametrize("normalise", ["l2", "sum"])
def test_expectation_equals_the_loops(sampler, scope, normalise):
    config = ContrastiveConfig(
        sampler=sampler, scope=scope, normalise=normalise, estimator="expectation", num_negatives=4
    )
    assert_equal_to_reference(scene(), config, 0.2)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_presets_equal_the_loops(preset):
    config = column(preset, estimator="expectation")
    assert_equal_to_reference(scene(images=3), config, temperature_at(45_000, config))


def test_released_draws_every_candidate_when_there_are_fewer_than_r():
    config = column("released")
    assert_equal_to_reference(scene(images=3), config, 0.3, how="all")


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_padding_is_neither_anchor_nor_negative(preset):
    inputs = scene()
    inputs["valid"][0, :, 8:] = False
    config = column(preset, estimator="expectation")
    assert_equal_to_reference(inputs, config, 0.2)
    loss = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.2)
    assert loss.count == 10
    for grad in gradients(inputs, loss.sum):
        assert not grad[0, :, :, 2].any() and grad[0, :, :, :2].any()


def mean_of_draws(inputs, config, temperature, draws):
    g = torch.Generator().manual_seed(0)
    values, grads = [], 0
    for _ in range(draws):
        out = contrastive_loss(
            PixelViews(**inputs), config=config, temperature=temperature, generator=g, with_diagnostics=False
        )
        values.append(out.sum.detach())
        grads = grads + torch.cat([t.flatten() for t in gradients(inputs, out.sum)]) / draws
    drawn = torch.stack(values)
    return drawn.mean(), drawn.std() / draws**0.5, drawn.var(), grads


@pytest.mark.parametrize(("replacement", "how"), [(True, "every draw"), (False, "every Gumbel draw")])
def test_sampled_is_unbiased_for_the_mean_over_every_draw_and_below_the_expectation(replacement, how):
    """R = 2: all draws are enumerated. At this T the Jensen gap is many standard errors wide."""
    inputs, temperature = scene(), 0.3
    config = ContrastiveConfig(num_negatives=2, replacement=replacement)
    mean, error, _, grad = mean_of_draws(inputs, config, temperature, 600)
    exact, _ = reference(inputs, config, temperature, how=how)
    wanted = torch.cat([t.flatten() for t in gradients(inputs, exact)])
    upper = contrastive_loss(
        PixelViews(**inputs), config=config.model_copy(update={"estimator": "expectation"}), temperature=temperature
    ).sum
    assert abs(mean - exact) < 4 * error
    assert exact < upper and mean + 4 * error < upper
    assert torch.cosine_similarity(grad, wanted, dim=0) > 0.995
    torch.testing.assert_close(grad.norm(), wanted.norm(), rtol=0.05, atol=0)


def test_gap_and_variance_fall_with_r_and_the_gradient_turns_to_the_expectations():
    inputs, temperature = scene(), 0.5
    gaps, variances, angles = [], [], []
    for r in (8, 64):
        config = ContrastiveConfig(num_negatives=r)
        exact, _ = reference(inputs, config, temperature)
        mean, _, variance, grad = mean_of_draws(inputs, config, temperature, 300)
        gaps.append((exact - mean).item())
        variances.append(variance.item())
        wanted = torch.cat([t.flatten() for t in gradients(inputs, exact)])
        angles.append(torch.cosine_similarity(grad, wanted, dim=0).item())
    assert gaps[0] > 4 * gaps[1] > 0
    assert variances[0] > 4 * variances[1]
    assert min(angles) > 0.99


def test_no_cap_is_all_pixels():
    inputs = scene()
    capped = ContrastiveConfig(estimator="expectation", num_anchors=6, pool_size=12)
    free = capped.model_copy(update={"num_anchors": None, "pool_size": None})
    some, all_of_them = (contrastive_loss(PixelViews(**inputs), config=c, temperature=0.2) for c in (capped, free))
    assert torch.equal(some.sum, all_of_them.sum) and some.count == all_of_them.count == 12
    assert_equal_to_reference(inputs, free, 0.2)


@pytest.mark.parametrize(("scope", "candidates"), [("batch", 8), ("same-image", 12)])
def test_workers_share_one_pool(scope, candidates):
    """pool_size is the pool of all images of all workers, so that their number does not change the loss's law."""

    class TwoWorkers:
        rank, size = 1, 2

        def __call__(self, tensor):
            return torch.cat([tensor, tensor])

    inputs = scene(images=2, h=4, w=4)
    config = ContrastiveConfig(scope=scope, pool_size=8 if scope == "batch" else 6, num_anchors=3)
    problem = pose_problem(
        PixelViews(**inputs),
        config=config,
        generator=None,
        joint=JointStep(0, 2, TwoWorkers()),
        is_gathered=True,
        negatives_from="weak",
        with_truth=False,
    )
    assert len(problem.candidates) == len(problem.pool.pixel) == candidates
    own = problem.pool.pixel[problem.places[0] * problem.per_image :][: 2 * problem.per_image] // 16
    assert own.tolist() == [image for image in (2, 3) for _ in range(problem.per_image)]  # of four images


def test_one_image_finds_its_negatives_in_itself():
    config = ContrastiveConfig(estimator="expectation")
    assert_equal_to_reference(scene(images=1), config, 0.2)
    alone = config.model_copy(update={"scope": "same-image"})
    batch, apart = (contrastive_loss(PixelViews(**scene(images=1)), config=c, temperature=0.2) for c in (config, alone))
    torch.testing.assert_close(batch.sum, apart.sum)


def test_fewer_candidates_than_r_are_drawn_again_with_replacement():
    inputs, config = scene(images=1), ContrastiveConfig(num_negatives=500)
    mean = contrastive_loss(
        PixelViews(**inputs), config=config.model_copy(update={"estimator": "expectation"}), temperature=0.3
    )
    drawn = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.3)
    assert drawn.count == 6
    torch.testing.assert_close(drawn.sum, mean.sum, rtol=0.01, atol=0)  # 500 draws of 5 candidates


def test_pool_of_some_pixels_approaches_the_pool_of_all():
    inputs = scene(images=2)
    config = ContrastiveConfig(estimator="expectation", num_negatives=8)
    exact = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.5).sum
    biases = []
    for pool in (4, 10):
        g = torch.Generator().manual_seed(1)
        small = config.model_copy(update={"pool_size": pool})
        draws = [contrastive_loss(PixelViews(**inputs), config=small, temperature=0.5, generator=g) for _ in range(300)]
        biases.append(abs(torch.stack([d.sum / d.count * exact.new_tensor(12) for d in draws]).mean() - exact))
    assert biases[1] < biases[0] < 0.1 * exact


def test_some_anchors_estimate_the_mean_over_all():
    inputs = scene()
    config = ContrastiveConfig(estimator="expectation", num_anchors=2)
    whole = contrastive_loss(PixelViews(**inputs), config=config.model_copy(update={"num_anchors": 6}), temperature=0.3)
    g = torch.Generator().manual_seed(0)
    some = [contrastive_loss(PixelViews(**inputs), config=config, temperature=0.3, generator=g) for _ in range(300)]
    assert all(s.count == 4 for s in some)
    means = torch.stack([s.sum / s.count for s in some])
    assert abs(means.mean() - whole.sum / whole.count) < 4 * means.std() / 300**0.5


@pytest.mark.parametrize("estimator", ["sampled", "expectation"])
def test_one_image_has_no_negatives_in_other_images(estimator):
    inputs = scene(images=1)
    config = ContrastiveConfig(scope="cross-image", estimator=estimator)
    out = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.07)
    assert out.sum == 0 and out.count == 0 and out.sum.requires_grad
    assert all(g.isfinite().all() and not g.any() for g in gradients(inputs, out.sum))
    assert facts_of(inputs, config)["raw_loss"] == 0


@pytest.mark.parametrize("estimator", ["sampled", "expectation"])
@pytest.mark.parametrize(("sampler", "scope"), [("class", "batch"), ("class", "cross-image"), ("fusion", "same-image")])
def test_equal_pseudo_labels_everywhere_give_nothing(estimator, sampler, scope):
    inputs = scene()
    inputs["mask_logits"] = torch.zeros_like(inputs["mask_logits"])
    inputs["class_logits"] = inputs["class_logits"][:1, :1].expand_as(inputs["class_logits"]).contiguous()
    config = ContrastiveConfig(sampler=sampler, scope=scope, estimator=estimator)
    out = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.07)
    assert out.sum == 0 and out.count == 0
    assert all(not g.any() for g in gradients(inputs, out.sum))


def test_image_without_confident_query_still_contrasts_by_masks():
    """Every query says no-object: F_c is one class everywhere, but P_m still tells the image's regions apart."""
    inputs = scene()
    inputs["class_logits"][0] = torch.tensor([0.0, 0.0, 0.0, 40.0])
    fusion = ContrastiveConfig(estimator="expectation", scope="same-image")
    assert_equal_to_reference(inputs, fusion, 0.2)
    by_class = fusion.model_copy(update={"sampler": "class"})
    out = contrastive_loss(PixelViews(**inputs), config=by_class, temperature=0.2)
    assert out.count == 6  # the other image's anchors
    assert not gradients(inputs, out.sum)[0][0].any()


def test_all_padding_gives_nothing():
    inputs = scene()
    inputs["valid"][:] = False
    out = contrastive_loss(PixelViews(**inputs), config=ContrastiveConfig(), temperature=0.07)
    assert out.sum == 0 and out.count == 0


def test_oracle_without_truth_gives_nothing_and_unknown_shares_are_nan():
    inputs = scene()
    inputs["truth_instance"][:] = inputs["truth_class"][:] = -1
    out = contrastive_loss(PixelViews(**inputs), config=ContrastiveConfig(sampler="oracle"), temperature=0.07)
    assert out.sum == 0 and out.count == 0
    facts = facts_of(inputs, ContrastiveConfig())
    assert math.isnan(facts["fnr"]) and math.isnan(facts["same_class"]) and facts["raw_loss"] > 0


@pytest.mark.parametrize("estimator", ["sampled", "expectation"])
def test_hinge_stops_the_gradient_of_far_negatives(estimator):
    """With s- replaced by max(0, s- - 0.5) a negative with cosine below T/2 is neither pushed nor pulled."""
    inputs, temperature = scene(images=2, dim=2), 0.3
    angle = torch.zeros(2, 1, *SIZE)
    angle[1] = 1.5  # cos 0.07 < 0.15
    z = torch.cat([angle.cos(), angle.sin()], dim=1)
    config = ContrastiveConfig(scope="cross-image", sampler="uniform", hinge=0.5, estimator=estimator)
    near = angle.clone()
    near[1] = 1.3  # cos 0.27 > 0.15
    z_near = torch.cat([near.cos(), near.sin()], dim=1)
    pushed = {}
    for name, value in (("far", z), ("near", z_near)):
        inputs["z_weak"], inputs["z_strong"] = value.clone().requires_grad_(), value.clone()
        out = contrastive_loss(PixelViews(**inputs), config=config, temperature=temperature)
        (grad,) = torch.autograd.grad(out.sum, [inputs["z_weak"]])
        # The positive's own pull is along z_strong, here (1, 0) for image 0: what is left along (0, 1) is the push.
        pushed[name] = grad[0, 1].abs().max().item()
    assert pushed["far"] == 0 and pushed["near"] > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("estimator", ["sampled", "expectation"])
def test_finite_gradients_in_half_precision_at_the_lowest_temperature(dtype, preset, estimator):
    inputs = scene(images=3, sharp=20.0)
    for name in ("z_weak", "z_strong", "mask_logits", "class_logits"):
        inputs[name] = inputs[name].detach().to(dtype)
    inputs["z_weak"].requires_grad_()
    inputs["z_strong"].requires_grad_()
    config = column(preset, estimator=estimator)
    with torch.autocast("cpu", dtype=dtype if dtype == torch.bfloat16 else torch.float16):
        out = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.07)
    assert out.sum.dtype == torch.float32 and out.sum.isfinite()
    assert all(g.isfinite().all() and g.any() for g in gradients(inputs, out.sum))


def test_extreme_temperature_and_equal_views_stay_finite():
    inputs = scene()
    inputs["z_strong"] = (-inputs["z_weak"].detach()).requires_grad_()
    for temperature in (1e-3, 0.02, 10.0):
        out = contrastive_loss(PixelViews(**inputs), config=ContrastiveConfig(), temperature=temperature)
        assert out.sum.isfinite() and all(g.isfinite().all() for g in gradients(inputs, out.sum))


def test_no_gradient_flows_through_the_pseudo_probabilities():
    inputs = scene()
    inputs["mask_logits"].requires_grad_()
    inputs["class_logits"].requires_grad_()
    out = contrastive_loss(PixelViews(**inputs), config=ContrastiveConfig(), temperature=0.1)
    grads = torch.autograd.grad(out.sum, [inputs["mask_logits"], inputs["class_logits"]], allow_unused=True)
    assert grads == (None, None)


def test_detached_strong_view_gets_no_gradient_and_changes_no_other():
    inputs = scene()
    config = ContrastiveConfig(estimator="expectation")
    both = gradients(inputs, contrastive_loss(PixelViews(**inputs), config=config, temperature=0.1).sum)[0]
    inputs["z_strong"] = inputs["z_strong"].detach()
    (one,) = torch.autograd.grad(
        contrastive_loss(PixelViews(**inputs), config=config, temperature=0.1).sum, [inputs["z_weak"]]
    )
    torch.testing.assert_close(both, one)


def test_pieces_add_up_to_the_whole():
    inputs, config = scene(), ContrastiveConfig(estimator="expectation")
    whole = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.1)
    with mock.patch.dict(pixel_contrast._PAIRS_AT_A_TIME, cpu=24):  # two anchors of twelve candidates
        pieces = contrastive_loss(PixelViews(**inputs), config=config, temperature=0.1)
    torch.testing.assert_close(whole.sum, pieces.sum)
    assert whole.count == pieces.count
    for a, b in zip(gradients(inputs, whole.sum), gradients(inputs, pieces.sum)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole.statistics, pieces.statistics)


def test_diagnostics_equal_the_loops():
    inputs, temperature = scene(), 0.3
    config = ContrastiveConfig(estimator="expectation")
    found = contrastive_loss(PixelViews(**inputs), config=config, temperature=temperature)
    weights = all_weights(
        inputs["mask_logits"], inputs["class_logits"], inputs["valid"], inputs["truth_instance"], SIZE, config
    )
    instance, category = centres(inputs["truth_instance"], SIZE), centres(inputs["truth_class"], SIZE)
    zw, zs = inputs["z_weak"].detach().flatten(2), inputs["z_strong"].detach().flatten(2)
    positive = sum(float(zw[b, :, p] @ zs[b, :, p]) for b, p in weights) / len(weights)
    negative = false = image = same_class = 0.0
    for (b, p), row in weights.items():
        for (c, q), weight in row.items():
            share = weight / sum(row.values()) / len(weights)
            negative += share * float(zw[b, :, p] @ zw[c, :, q])
            image += share * (b == c)
            false += share * (b == c and instance[b][p] == instance[c][q] > 0)
            same_class += share * (category[b][p] == category[c][q])
    wanted = {
        "raw_loss": found.sum.item() / 12,
        "margin": positive - negative,
        "fnr": false,
        "same_image": image,
        "same_class": same_class,
        "temperature": temperature,
    }
    assert facts_of(inputs, config, temperature) == pytest.approx(wanted, abs=1e-5)
    assert 0 < false < 1
    plain = contrastive_loss(PixelViews(**inputs), config=config, temperature=temperature, with_diagnostics=False)
    assert plain.statistics is None and torch.equal(plain.sum, found.sum)


def test_oracle_draws_no_false_negative_and_uniform_does():
    inputs = scene()
    fnr = {s: facts_of(inputs, ContrastiveConfig(sampler=s))["fnr"] for s in ("oracle", "uniform")}
    assert fnr["oracle"] == 0 < fnr["uniform"]


def test_generator_decides_the_draws():
    inputs, config = scene(), ContrastiveConfig(num_anchors=3, pool_size=8)
    sums = [
        contrastive_loss(
            PixelViews(**inputs), config=config, temperature=0.1, generator=torch.Generator().manual_seed(s)
        ).sum
        for s in (3, 3, 4)
    ]
    assert sums[0] == sums[1] != sums[2]


def test_it_is_differentiated_once():
    inputs = scene()
    out = contrastive_loss(PixelViews(**inputs), config=ContrastiveConfig(), temperature=0.1)
    out.sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        out.sum.backward()


def test_no_host_copy():
    with mock.patch.object(torch.Tensor, "item", side_effect=AssertionError("item() in the hot path")):
        out = contrastive_loss(PixelViews(**scene()), config=ContrastiveConfig(), temperature=0.1)
    assert out.sum > 0


def test_temperature_schedule():
    released = column("released")
    assert temperature_at(0, released) == pytest.approx(0.3)
    assert temperature_at(45_000, released) == pytest.approx(0.185)
    assert temperature_at(90_000, released) == temperature_at(10**6, released) == pytest.approx(0.07)
    assert temperature_at(5, ContrastiveConfig(temperature=0.2)) == 0.2


def test_bad_input_is_refused():
    inputs, config = scene(), ContrastiveConfig()
    with pytest.raises(ValueError, match=r"contrastive.kind: expected one of cast, .* got 'none'"):
        contrastive_loss(PixelViews(**inputs), config=ContrastiveConfig(kind="none"), temperature=0.1)
    with pytest.raises(ValueError, match=r"expected two views \[B, D, h, w\] of one shape"):
        contrastive_loss(PixelViews(**{**inputs, "z_strong": inputs["z_strong"][:1]}), config=config, temperature=0.1)
    with pytest.raises(ValueError, match=r"expected batches of 2, got \[1, 2\]"):
        contrastive_loss(PixelViews(**{**inputs, "valid": inputs["valid"][:1]}), config=config, temperature=0.1)
