"""The matcher against an exhaustive search over assignments."""

from itertools import permutations

import torch
import torch.nn.functional as F

from cast_ray.contracts.records import Targets
from cast_ray.losses.set.matching import match_layers, sample_kept, sample_maps
from cast_ray.recipe import LossConfig

QUERIES, CLASSES = 5, 3


def scene(counts, layers=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = len(counts)
    class_logits = [torch.randn(images, QUERIES, CLASSES + 1, generator=g) for _ in range(layers)]
    mask_logits = [2 * torch.randn(images, QUERIES, 6, 8, generator=g) for _ in range(layers)]
    targets = [
        Targets(torch.rand(n, 24, 32, generator=g) < 0.5, torch.randint(0, CLASSES, (n,), generator=g), torch.ones(n))
        for n in counts
    ]
    return class_logits, mask_logits, targets, 2 * torch.rand(layers, images, 30, 2, generator=g) - 1


def pair_cost(class_logits, mask_logits, target, n, k, points, config):
    logits = sample_maps(mask_logits[None, k], points[None])[0]
    truth = sample_maps(target.masks[None, n], points[None])[0]
    probs = logits.sigmoid()
    dice = 1 - (2 * (probs * truth).sum() + 1) / (probs.sum() + truth.sum() + 1)
    bce = F.binary_cross_entropy_with_logits(logits, truth)
    return (
        config.cost_mask * bce
        + config.cost_dice * dice
        - config.cost_class * class_logits[k].softmax(-1)[target.labels[n]]
    )


def test_assignment_is_the_cheapest_of_all():
    counts, config = (3, 0, 2), LossConfig()
    class_logits, mask_logits, targets, points = scene(counts)
    found = match_layers(class_logits, mask_logits, targets, config, points)
    assert found.image.tolist() == [0, 0, 0, 2, 2]
    first = [0, 3, 3]
    for layer in range(2):
        for image, count in enumerate(counts):
            if not count:
                continue
            cost = [
                [
                    pair_cost(
                        class_logits[layer][image],
                        mask_logits[layer][image],
                        targets[image],
                        n,
                        k,
                        points[layer, image],
                        config,
                    )
                    for k in range(QUERIES)
                ]
                for n in range(count)
            ]
            best = min(permutations(range(QUERIES), count), key=lambda ks: sum(cost[n][k] for n, k in enumerate(ks)))
            rows = found.image == image
            got = {
                int(t) - first[image]: int(q) - image * QUERIES
                for q, t in zip(found.query[layer, rows], found.target[layer, rows])
            }
            assert got == dict(enumerate(best))


def test_more_targets_than_queries_matches_every_query_once():
    class_logits, mask_logits, targets, points = scene((8,))
    found = match_layers(class_logits, mask_logits, targets, LossConfig(), points)
    assert found.query.shape == found.target.shape == (2, QUERIES)
    for layer in range(2):
        assert found.query[layer].tolist() == list(range(QUERIES))
        assert len(set(found.target[layer].tolist())) == QUERIES


def test_one_row_of_points_serves_every_layer():
    class_logits, mask_logits, targets, points = scene((3, 1))
    shared = match_layers(class_logits, mask_logits, targets, LossConfig(), points[:1])
    repeated = match_layers(class_logits, mask_logits, targets, LossConfig(), points[:1].expand(2, -1, -1, -1))
    assert torch.equal(shared.query, repeated.query) and torch.equal(shared.target, repeated.target)


def test_excluded_pixels_do_not_decide_the_match():
    g = torch.Generator().manual_seed(3)
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, :, :4] = True
    logits = torch.full((1, 2, 8, 8), -5.0)
    logits[0, 0, :, :2] = 5.0  # half right on the left
    logits[0, 1, :, :4] = 5.0  # right on the left half, wrong on the right
    logits[0, 1, :, 4:] = 5.0
    target = [Targets(masks, torch.tensor([0]), torch.ones(1))]
    keep = torch.zeros(1, 8, 8, dtype=torch.bool)
    keep[:, :, :4] = True
    points = 2 * torch.rand(1, 1, 500, 2, generator=g) - 1
    flat = [torch.zeros(1, 2, 2)]
    assert match_layers(flat, [logits], target, LossConfig(), points).query.tolist() == [[0]]
    assert match_layers(flat, [logits], target, LossConfig(), points, keep).query.tolist() == [[1]]


def test_sampling_reads_the_pixel_under_the_point():
    keep = torch.arange(12).view(1, 3, 4) % 3 == 0
    centres = torch.tensor([[(2 * x + 1) / 4 - 1, (2 * y + 1) / 3 - 1] for y in range(3) for x in range(4)])[None]
    assert torch.equal(sample_kept(keep, torch.tensor([0]), centres)[0], keep.flatten())
    torch.testing.assert_close(sample_maps(keep, centres)[0], keep.flatten().float())
    edge = torch.tensor([[[1.0, 1.0]]])
    assert sample_kept(keep, torch.tensor([0]), edge).item() == keep[0, 2, 3].item()
