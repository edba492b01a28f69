"""Which pixels are drawn: laws of the samplers, scopes, pools."""

import pytest
import torch
from contrastive_reference import all_weights
from contrastive_scenes import scene

from cast_ray.losses.contrastive.negatives import (
    candidate_weights,
    describe_pixels,
    draw_pixels,
    negative_counts,
    pseudo_probabilities,
    stand_for_all,
)
from cast_ray.losses.joint_step import JointStep
from cast_ray.recipe import ContrastiveConfig

SIZE = (2, 3)


def describe(config, inputs):
    truth = inputs["truth_instance"], inputs["truth_class"]
    return describe_pixels(
        inputs["mask_logits"],
        inputs["class_logits"],
        inputs["valid"],
        truth,
        SIZE,
        JointStep(0, len(inputs["valid"])),
        config,
    )


def weights_of(config, inputs):
    """[B * h w, B * h w] weights with every pixel anchor and candidate."""
    pixels = describe(config, inputs)
    images, count = pixels.pixel.shape
    if config.scope != "same-image":
        return candidate_weights(pixels, pixels.flat(), slice(0, images * count), config).flatten(0, 1)
    return torch.block_diag(*candidate_weights(pixels, pixels, None, config))


@pytest.mark.parametrize("scope", ["batch", "same-image", "cross-image"])
@pytest.mark.parametrize("normalise", ["l2", "sum"])
@pytest.mark.parametrize("sampler", ["uniform", "mask", "class", "fusion", "oracle"])
def test_weights_equal_the_loops(sampler, normalise, scope):
    config, inputs = ContrastiveConfig(sampler=sampler, normalise=normalise, scope=scope), scene(images=3)
    inputs["valid"][1, :, 4:8] = False
    found = weights_of(config, inputs)
    wanted = all_weights(*(inputs[k] for k in ("mask_logits", "class_logits", "valid", "truth_instance")), SIZE, config)
    count = SIZE[0] * SIZE[1]
    for (b, p), row in wanted.items():
        for c in range(3):
            for q in range(count):
                value = found[b * count + p, c * count + q].item()
                assert value == pytest.approx(row.get((c, q), 0.0), abs=2e-6)
    assert sum(map(len, wanted.values())) > 0


def test_masks_say_nothing_across_images():
    """Slots of different images differ: there `mask` is uniform and `fusion` takes one class for two instances."""
    inputs = scene()
    inputs["mask_logits"][1] = inputs["mask_logits"][0]
    inputs["class_logits"][:] = 0
    inputs["class_logits"][..., 1] = 40.0  # one class everywhere
    count = SIZE[0] * SIZE[1]
    by_mask = weights_of(ContrastiveConfig(sampler="mask"), inputs)
    assert torch.equal(by_mask[:count, count:], torch.ones(count, count))
    assert by_mask[:count, :count].max() < 1
    inputs["mask_logits"] *= 30  # each pixel surely in one query: |P_m| = |F_c| = 1
    across = weights_of(ContrastiveConfig(sampler="fusion"), inputs)
    queries = pseudo_probabilities(inputs["mask_logits"], inputs["class_logits"], SIZE)[0][0].argmax(-1)
    other = queries[:, None] != queries[None]
    assert other.any() and not other.all()
    torch.testing.assert_close(across[:count, count:], torch.full((count, count), 0.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(across[:count, :count], 0.5 * other.float(), rtol=0, atol=1e-3)


def test_class_probabilities_are_the_formula():
    inputs = scene()
    probs_m, probs_f = pseudo_probabilities(inputs["mask_logits"], inputs["class_logits"], (4, 6))
    p_c = inputs["class_logits"].softmax(-1)
    p_m = inputs["mask_logits"].softmax(1).flatten(2)  # the logits' own size: no resizing
    torch.testing.assert_close(probs_m, p_m.transpose(1, 2))
    torch.testing.assert_close(probs_f, torch.einsum("bkp,bkc->bpc", p_m, p_c))
    torch.testing.assert_close(probs_f.sum(-1), torch.ones(2, 24))


def rows_of(weights, generator=None):
    """Uniform random numbers for each row of weights, for `negative_counts`."""
    return lambda count: torch.rand(*weights.shape[:-1], count, generator=generator)


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_follow_the_weights(replacement):
    weights = torch.tensor([[1.0, 0.0, 2.0, 5.0, 0.0]]).expand(20_000, -1)
    config = ContrastiveConfig(num_negatives=1, replacement=replacement)
    counts = negative_counts(weights, config, rows_of(weights, torch.Generator().manual_seed(0)))
    assert counts.sum(1).eq(1).all()
    torch.testing.assert_close(counts.mean(0), weights[0] / 8, rtol=0, atol=0.015)


def test_systematic_draws_stay_within_one_of_their_mean():
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(500, 37, generator=g) * (torch.rand(500, 37, generator=g) < 0.6)
    config = ContrastiveConfig(num_negatives=64)
    counts = negative_counts(weights, config, rows_of(weights, g))
    mean = negative_counts(weights, config.model_copy(update={"estimator": "expectation"}), rows_of(weights, g))
    torch.testing.assert_close(mean, 64 * weights / weights.sum(1, keepdim=True))
    assert counts.sum(1).eq(64).all() and counts.frac().eq(0).all()
    assert ((counts - mean).abs() < 1 + 1e-4).all()
    assert not counts[weights == 0].any()
    again = torch.stack([negative_counts(weights[:1], config, rows_of(weights[:1], g))[0] for _ in range(3000)]).mean(0)
    torch.testing.assert_close(again, mean[0], rtol=0, atol=0.05)


def test_without_replacement_draws_differ_and_stop_at_the_candidates():
    weights = torch.tensor([[1.0, 0.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    counts = negative_counts(weights, ContrastiveConfig(num_negatives=9, replacement=False), rows_of(weights))
    assert counts.tolist() == [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
    counts = negative_counts(weights, ContrastiveConfig(num_negatives=2, replacement=False), rows_of(weights))
    assert counts.sum(1).tolist() == [2, 0, 2] and counts[0, 1] == 0


@pytest.mark.parametrize("estimator", ["sampled", "expectation"])
def test_nothing_is_drawn_from_a_row_without_weight(estimator):
    weights = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    counts = negative_counts(weights, ContrastiveConfig(num_negatives=5, estimator=estimator), rows_of(weights))
    assert counts.tolist() == [[0, 0], [0, 5]]


def test_pixels_are_drawn_uniformly_from_the_valid_ones():
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[0, :5] = False
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_pixels(valid, 3, g) for _ in range(3000)])
    assert all(len(set(row.tolist())) == 3 for row in draws[:50].flatten(0, 1))
    for image, present in ((0, 5), (1, 10)):
        share = torch.bincount(draws[:, image].flatten(), minlength=10) / 3000
        torch.testing.assert_close(share, valid[image] * 3 / present, rtol=0, atol=0.04)
    few = draw_pixels(valid, 7, g)
    assert set(few[0].tolist()) >= set(range(5, 10))
    assert torch.equal(draw_pixels(valid, 10, g), torch.arange(10).expand(2, -1))


def test_a_pool_stands_for_all_valid_pixels():
    inputs = scene()
    inputs["valid"][0, :, 8:] = False
    pixels = describe(ContrastiveConfig(), inputs)
    pool = stand_for_all(pixels.at(draw_pixels(pixels.share > 0, 2, None)), pixels)
    assert pool.share.tolist() == [[2.0, 2.0], [3.0, 3.0]]
    whole = stand_for_all(pixels.at(draw_pixels(pixels.share > 0, 6, None)), pixels)
    assert torch.equal(whole.share, pixels.share)
