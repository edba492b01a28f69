"""The set loss against transformers' Mask2FormerLoss, and its edges."""

import json
from itertools import accumulate
from unittest import mock

import pytest
import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from cast_ray.contracts.records import Predictions, Targets
from cast_ray.losses.set import criterion as set_criterion
from cast_ray.losses.set import matching
from cast_ray.losses.set.criterion import LossPoints, set_loss
from cast_ray.recipe import LossConfig

LAYERS, IMAGES, QUERIES, CLASSES, POINTS = 3, 3, 7, 4, 48
HEIGHT, WIDTH = 12, 16


def make_predictions(seed=0, images=IMAGES, layers=LAYERS):
    g = torch.Generator().manual_seed(seed)
    return Predictions(
        class_logits=[torch.randn(images, QUERIES, CLASSES + 1, generator=g).requires_grad_() for _ in range(layers)],
        mask_logits=[
            (3 * torch.randn(images, QUERIES, HEIGHT, WIDTH, generator=g)).requires_grad_() for _ in range(layers)
        ],
        features={8: torch.randn(images, 2, 3, 4, generator=g)},
        auxiliary={"p": torch.randn(images, 2, generator=g)},
    )


def make_targets(counts=(2, 0, 3), seed=1, scale=4):
    g = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        masks = torch.rand(count, scale * HEIGHT, scale * WIDTH, generator=g) < 0.4
        labels = torch.randint(0, CLASSES, (count,), generator=g)
        targets.append(Targets(masks, labels, torch.ones(count)))
    return targets


def make_points(config, pairs, layers=LAYERS, images=IMAGES, seed=2):
    g = torch.Generator().manual_seed(seed)
    taken = int(config.importance_ratio * config.num_points)
    return LossPoints(
        2 * torch.rand(layers, images, config.num_points, 2, generator=g) - 1,
        2 * torch.rand(layers, pairs, int(config.num_points * config.oversample_ratio), 2, generator=g) - 1,
        2 * torch.rand(layers, pairs, config.num_points - taken, 2, generator=g) - 1,
    )


def total(losses, config):
    """The engine's arithmetic on one worker."""
    weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
    return sum(weights[name] * s.sum() / n.sum().clamp(min=1) for name, (s, n) in losses.items())


def reference_loss(predictions, targets, config, points):
    """transformers' loss on the given points; it draws final layer first, match points image by image."""
    criterion = theirs.Mask2FormerLoss(
        Mask2FormerConfig(
            num_labels=CLASSES,
            num_queries=QUERIES,
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            train_num_points=config.num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_ratio,
        ),
        weight_dict={},
    )
    criterion.matcher.cost_class = config.cost_class
    layers = len(predictions.class_logits)
    queue = []
    for layer in [layers - 1, *range(layers - 1)]:
        queue += [points.match[layer, image][None] for image in range(len(targets))]
        queue += [points.candidates[layer], points.uniform[layer]]
    handed_out = iter(queue)

    def rand(*shape, **_):
        drawn = next(handed_out)
        assert tuple(drawn.shape) == shape
        return (drawn + 1) / 2

    with mock.patch.object(theirs.torch, "rand", rand):
        losses = criterion(
            predictions.mask_logits[-1],
            predictions.class_logits[-1],
            [t.masks.float() for t in targets],
            [t.labels for t in targets],
            [
                {"masks_queries_logits": m, "class_queries_logits": c}
                for m, c in zip(predictions.mask_logits[:-1], predictions.class_logits[:-1])
            ],
        )
    by_term = {"class": "cross_entropy", "mask": "mask", "dice": "dice"}
    return {
        name: sum(v for k, v in losses.items() if k.startswith(f"loss_{theirs_name}"))
        for name, theirs_name in by_term.items()
    }


@pytest.mark.parametrize("cost_class", [1.0, 2.0])
@pytest.mark.parametrize("counts", [(2, 0, 3), (4, 1, 7), (9, 2, 0)])
@pytest.mark.parametrize("large", [False, True], ids=["at once", "as on large maps"])
def test_value_and_gradient_equal_transformers(cost_class, counts, large, monkeypatch):
    if large:  # layer by layer, points in reading order, few pairs at a time
        monkeypatch.setattr(matching, "_PIXELS_IN_CACHE", 0)
        monkeypatch.setitem(matching._SAMPLES_AT_A_TIME, "cpu", 1)
        monkeypatch.setitem(set_criterion._SAMPLES_AT_A_TIME, "cpu", 300)
        monkeypatch.setattr(matching, "_PIXELS_AT_A_TIME", 1)
    config = LossConfig(num_points=POINTS, cost_class=cost_class)
    targets = make_targets(counts)
    points = make_points(config, sum(min(n, QUERIES) for n in counts))
    ours, wanted = make_predictions(), make_predictions()

    losses = set_loss(ours, targets, config, points=points)
    expected = reference_loss(wanted, targets, config, points)
    for name, (s, n) in losses.items():
        torch.testing.assert_close(s.sum() / n.sum(), expected[name], rtol=1e-5, atol=1e-5)
    total(losses, config).backward()
    (2 * expected["class"] + 5 * expected["mask"] + 5 * expected["dice"]).backward()
    for a, b in zip(ours.class_logits + ours.mask_logits, wanted.class_logits + wanted.mask_logits):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_batch_without_instances_is_only_no_object_and_keeps_mask_heads_attached():
    config, predictions = LossConfig(num_points=POINTS), make_predictions()
    losses = set_loss(predictions, make_targets((0, 0, 0)), config)
    total(losses, config).backward()
    assert not any(t.any() for t in (*losses["mask"], *losses["dice"]))
    no_object = [-layer.log_softmax(-1)[..., -1].mean(1) for layer in predictions.class_logits]
    torch.testing.assert_close(losses["class"][0] / losses["class"][1], sum(no_object))
    assert all(layer.grad is not None and not layer.grad.any() for layer in predictions.mask_logits)
    assert all(layer.grad.any() for layer in predictions.class_logits)


def test_padding_and_ignored_pixels_have_no_influence():
    config = LossConfig(num_points=POINTS)
    counts, pairs = (2, 0, 3), 5
    points = make_points(config, pairs)
    valid = torch.ones(IMAGES, 4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    valid[:, :, 2 * WIDTH :] = False
    ignore = torch.zeros(4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    ignore[: 2 * HEIGHT] = True

    def run(change):
        predictions, targets = make_predictions(), make_targets(counts)
        targets[2].ignore = ignore
        if change:
            with torch.no_grad():  # one column and row of slack: bilinear sampling reads the neighbour
                for logits in predictions.mask_logits:
                    logits[:, :, :, WIDTH // 2 + 1 :] += 50.0
                    logits[2, :, : HEIGHT // 2 - 1] -= 50.0
            for t in targets:
                t.masks[:, :, 2 * WIDTH + 1 :] ^= True
            targets[2].masks[:, : 2 * HEIGHT - 1] ^= True
        losses = set_loss(predictions, targets, config, valid=valid, points=points)
        total(losses, config).backward()
        return losses, predictions

    (plain, first), (changed, second) = run(False), run(True)
    for name in plain:
        torch.testing.assert_close(plain[name], changed[name])
    for a, b in zip(first.mask_logits, second.mask_logits):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad.any()
        assert not a.grad[:, :, :, WIDTH // 2 + 1 :].any()
        assert not a.grad[2, :, : HEIGHT // 2 - 1].any()


def test_nothing_excluded_equals_no_exclusion():
    config, targets = LossConfig(num_points=POINTS), make_targets()
    points = make_points(config, 5)
    everywhere = torch.ones(IMAGES, 4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    plain = set_loss(make_predictions(), targets, config, points=points)
    masked = set_loss(make_predictions(), targets, config, valid=everywhere, points=points)
    for name in plain:
        torch.testing.assert_close(plain[name], masked[name])


def test_ignore_alone_excludes_like_padding():
    config = LossConfig(num_points=POINTS)
    points = make_points(config, 5)
    ignore = torch.zeros(4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    ignore[:, :9] = True
    by_ignore, by_valid = make_targets(), make_targets()
    by_ignore[2].ignore = ignore
    valid = torch.ones(IMAGES, 4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    valid[2] = ~ignore
    first = set_loss(make_predictions(), by_ignore, config, points=points)
    second = set_loss(make_predictions(), by_valid, config, valid=valid, points=points)
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def slow_reference(predictions, targets, config, points):
    """The formulas of `set_loss` pair by pair, with uniform points only: term -> loss of all images together."""
    sums, counts = {"class": 0.0, "mask": 0.0, "dice": 0.0}, {"class": 0.0, "mask": 0.0, "dice": 0.0}
    matches = matching.match_layers(
        predictions.class_logits, predictions.mask_logits, targets, config, points.match, None
    )
    masks = [mask for t in targets for mask in t.masks]
    labels = [int(label) for t in targets for label in t.labels]
    weights = [float(w) for t in targets for w in t.weights]
    for layer in range(LAYERS):
        pairs = dict(zip(matches.query[layer].tolist(), enumerate(matches.target[layer].tolist())))
        for query, logits in enumerate(predictions.class_logits[layer].flatten(0, 1)):
            pair, target = pairs.get(query, (None, None))
            log_probability = logits.log_softmax(0)
            if pair is None:
                sums["class"] -= config.no_object_weight * log_probability[CLASSES]
                counts["class"] += config.no_object_weight / LAYERS
                continue
            sums["class"] -= weights[target] * log_probability[labels[target]]
            counts["class"] += 1 / LAYERS
            where = points.uniform[layer][pair : pair + 1]
            found = matching.sample_maps(predictions.mask_logits[layer].flatten(0, 1)[query][None], where)[0]
            truth = matching.sample_maps(masks[target][None], where)[0]
            share = found.sigmoid()
            entropy = -(truth * share.log() + (1 - truth) * (1 - share).log()).mean()
            dice = 1 - (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)
            for name, value in (("mask", entropy), ("dice", dice)):
                sums[name] += weights[target] * value
                counts[name] += 1 / LAYERS
    return {name: sums[name] / counts[name] for name in sums}


@pytest.mark.parametrize("counts", [(1, 0, 0), (2, 0, 3)], ids=["one label", "several"])
def test_score_weights_equal_the_slow_reference(counts):
    config = LossConfig(num_points=POINTS, pseudo_weighting="score", importance_ratio=0)
    targets = make_targets(counts)
    for i, target in enumerate(targets):
        target.weights = torch.linspace(0.3, 0.9, len(target.weights)) / (i + 1)
    points = make_points(config, sum(counts))
    ours, theirs = make_predictions(), make_predictions()
    losses = {name: s.sum() / n.sum() for name, (s, n) in set_loss(ours, targets, config, points=points).items()}
    wanted = slow_reference(theirs, targets, config, points)
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(torch.stack(list(found.values())).sum(), of.class_logits + of.mask_logits)
        for found, of in ((losses, ours), (wanted, theirs))
    ]
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_a_score_does_not_cancel_where_it_is_the_only_label():
    targets = make_targets((1, 0, 0))
    config = LossConfig(num_points=POINTS, pseudo_weighting="score")
    points = make_points(config, 1)
    whole = set_loss(make_predictions(), targets, config, points=points)
    targets[0].weights = torch.tensor([0.25])
    quarter = set_loss(make_predictions(), targets, config, points=points)
    for name in ("mask", "dice"):
        torch.testing.assert_close(quarter[name][0], 0.25 * whole[name][0])
        torch.testing.assert_close(quarter[name][1], torch.tensor([1.0, 0, 0]))
    assert quarter["class"][0][0] < whole["class"][0][0]
    torch.testing.assert_close(quarter["class"][1], whole["class"][1])
    hard = set_loss(make_predictions(), targets, config.model_copy(update={"pseudo_weighting": "hard"}), points=points)
    for name in whole:
        torch.testing.assert_close(hard[name], whole[name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p, t: t[2].labels.fill_(CLASSES), r"image 2: expected labels in 0\.\.3 \(4 is no-object\), got 4"),
        (lambda p, t: t[0].labels.fill_(-1), r"image 0: expected labels in 0\.\.3 .* got -1"),
        (lambda p, t: t[2].masks[1].fill_(False), r"image 2: expected masks with at least one pixel.* instance 1"),
        (lambda p, t: p.mask_logits[1].data[2, 3].fill_(torch.nan), r"layer 1, image 2: expected finite logits"),
        (lambda p, t: p.class_logits[0].data[0, 3].fill_(torch.nan), r"layer 0, image 0: expected finite logits"),
        (lambda p, t: t.pop(), r"expected one Targets per image \(3\), got 2"),
    ],
)
def test_bad_input_is_refused_by_name(spoil, message):
    predictions, targets = make_predictions(), make_targets()
    spoil(predictions, targets)
    with pytest.raises(ValueError, match=message):
        set_loss(predictions, targets, LossConfig(num_points=POINTS))


def test_drawn_points_follow_the_generator_and_fast_option_trains():
    targets = make_targets()
    for exact in (True, False):
        config = LossConfig(num_points=POINTS, exact=exact)
        runs = [
            total(set_loss(make_predictions(), targets, config, generator=torch.Generator().manual_seed(s)), config)
            for s in (5, 5, 6)
        ]
        assert runs[0] == runs[1] and runs[0] != runs[2]


def test_points_drawn_pair_by_pair_are_those_drawn_together(monkeypatch):
    monkeypatch.setitem(set_criterion._SAMPLES_AT_A_TIME, "cpu", 1)  # one pair after the other
    config, targets = LossConfig(num_points=POINTS), make_targets()
    predictions, g = make_predictions(), torch.Generator().manual_seed(7)
    sizes = ((LAYERS, IMAGES, 48), (LAYERS, 5, 144), (LAYERS, 5, 12))
    together = LossPoints(*(torch.empty(*size, 2).uniform_(-1, 1, generator=g) for size in sizes))
    drawn = set_loss(predictions, targets, config, generator=torch.Generator().manual_seed(7))
    given = set_loss(predictions, targets, config, points=together)
    for name in given:
        torch.testing.assert_close(drawn[name], given[name], rtol=0, atol=0)


def test_masks_of_a_batch_are_not_copied():
    whole = torch.rand(7, 4, 6) < 0.5
    joined = set_criterion._in_one(whole.split((2, 0, 4, 1)))
    assert torch.equal(joined, whole) and joined.data_ptr() == whole.data_ptr()
    for parts in ((whole[:2], whole[3:]), (whole[2:4], whole[:2]), (whole[:2].clone(), whole[2:])):
        assert torch.equal(set_criterion._in_one(parts), torch.cat(parts))


def test_memory_of_an_accelerators_step_is_not_one_copy_of_the_masks_a_layer(monkeypatch, tmp_path):
    """All that torch allocates for 60 masks of 512x1024 and 10 layers stays below 150 MiB, predictions not counted."""
    monkeypatch.setattr(matching, "_SAMPLES_AT_A_TIME", {})  # the limits of a device that has no cache to fit
    monkeypatch.setattr(set_criterion, "_SAMPLES_AT_A_TIME", {})
    predictions = Predictions(
        [torch.randn(1, 100, CLASSES + 1).requires_grad_() for _ in range(10)],
        [torch.randn(1, 100, 128, 256).requires_grad_() for _ in range(10)],
        {},
        {},
    )
    masks = torch.zeros(60, 512, 1024, dtype=torch.bool)
    masks[:, 100:200, 300:500] = True
    target = Targets(masks, torch.randint(0, CLASSES, (60,)), torch.ones(60))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        losses = set_loss(predictions, [target], LossConfig(), generator=torch.Generator().manual_seed(0))
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e.get("name") == "[memory]"]
    peak = max(accumulate(sizes)) / 2**20
    assert 60 < peak < 150, peak  # the points of all pairs alone are 57 MiB
    assert float(losses["mask"][0].detach()) > 0


def test_one_device_to_host_copy_per_step():
    calls = []
    real = torch.Tensor.cpu
    with (
        mock.patch.object(torch.Tensor, "cpu", lambda self, *a: calls.append(1) or real(self, *a)),
        mock.patch.object(torch.Tensor, "item", side_effect=AssertionError("item() in the hot path")),
    ):
        set_loss(make_predictions(), make_targets(), LossConfig(num_points=POINTS))
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_finite_gradients(dtype):
    config, full = LossConfig(num_points=POINTS), make_predictions()
    half = Predictions(
        [t.detach().to(dtype).requires_grad_() for t in full.class_logits],
        [t.detach().to(dtype).requires_grad_() for t in full.mask_logits],
        {},
        {},
    )
    losses = set_loss(half, make_targets(), config)
    total(losses, config).backward()
    assert all(s.dtype == torch.float32 for s, _ in losses.values())
    assert all(t.grad.isfinite().all() for t in half.class_logits + half.mask_logits)


def test_each_image_has_the_terms_that_it_has_alone():
    config, targets = LossConfig(num_points=POINTS), make_targets()
    predictions = make_predictions()
    points = make_points(config, 5)
    whole = set_loss(predictions, targets, config, points=points)
    for start, stop, pairs in ((0, 2, slice(0, 2)), (2, 3, slice(2, 5))):
        part = predictions.part(start, stop)
        assert part.features[8].shape[0] == part.auxiliary["p"].shape[0] == stop - start
        some = LossPoints(points.match[:, start:stop], points.candidates[:, pairs], points.uniform[:, pairs])
        alone = set_loss(part, targets[start:stop], config, points=some)
        for name in whole:
            for i in range(2):
                torch.testing.assert_close(alone[name][i], whole[name][i][start:stop])


def test_masks_of_any_type_are_the_same():
    config, targets = LossConfig(num_points=POINTS), make_targets()
    points = make_points(config, 5)
    plain = set_loss(make_predictions(), targets, config, points=points)
    for dtype in (torch.uint8, torch.float32):
        other = [Targets(t.masks.to(dtype), t.labels, t.weights) for t in targets]
        for name, (total, count) in set_loss(make_predictions(), other, config, points=points).items():
            assert torch.equal(total, plain[name][0]) and torch.equal(count, plain[name][1])
