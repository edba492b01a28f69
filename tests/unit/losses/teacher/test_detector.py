"""The detector's set loss against transformers' own, and what that one gets wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import MMGroundingDinoConfig
from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss

from cast_ray.contracts.records import Targets
from cast_ray.losses.teacher.detector import QueryDetections, boxes_of, detection_loss, match_boxes
from cast_ray.losses.teacher.prompted_masks import prompted_mask_loss
from cast_ray.recipe import GroundedSamConfig

NUM_TOKENS, NUM_CLASSES, NUM_QUERIES = 12, 3, 8
USED = 9
"""Tokens of the prompt; the others are padding."""


def token_map() -> torch.Tensor:
    tokens = torch.zeros(NUM_CLASSES, NUM_TOKENS)
    tokens[0, 1], tokens[1, 3:5], tokens[2, 6:8] = 1, 1, 1
    return tokens


def make_target(counts: tuple[int, ...], seed: int, size: tuple[int, int] = (16, 24)) -> list[Targets]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        masks = torch.zeros(count, *size, dtype=torch.bool)
        for n in range(count):
            y, x = (int(torch.randint(0, side - 6, (), generator=generator)) for side in size)
            masks[n, y : y + 3 + n, x : x + 5] = True
        labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
        targets.append(Targets(masks, labels, torch.ones(count)))
    return targets


def make_detections(num_images: int, num_layers: int, seed: int) -> QueryDetections:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    logits = []
    for _ in range(num_layers):
        layer = draw(num_images, NUM_QUERIES, NUM_TOKENS)
        layer[..., USED:] = -torch.inf
        logits.append(layer.requires_grad_())
    boxes = [(draw(num_images, NUM_QUERIES, 4) * 0.5).sigmoid().requires_grad_() for _ in range(num_layers)]
    return QueryDetections(logits, boxes, token_map().expand(num_images, -1, -1))


def transformers_loss(found: QueryDetections, targets: list[Targets], layer: int) -> dict[str, torch.Tensor]:
    config = MMGroundingDinoConfig(two_stage=False, class_cost=2.0)
    labels = [
        {"class_labels": t.labels, "boxes": boxes_of(t.masks, (t.masks.shape[-2], t.masks.shape[-1]))} for t in targets
    ]
    mask = torch.zeros(len(targets), NUM_QUERIES, NUM_TOKENS, dtype=torch.bool)
    mask[..., :USED] = True
    _, terms, _ = GroundingDinoForObjectDetectionLoss(
        found.token_logits[layer], labels, "cpu", found.boxes[layer], config, tuple(found.token_map), mask
    )
    return terms


def test_equals_transformers_on_each_layer() -> None:
    targets = make_target((3, 1), seed=0)
    found = make_detections(2, 3, seed=1)
    terms = detection_loss(found, targets, GroundedSamConfig())
    wanted = [transformers_loss(found, targets, layer) for layer in range(3)]
    for name, theirs in (("class", "loss_ce"), ("box", "loss_bbox"), ("giou", "loss_giou")):
        sums, counts = terms[name]
        assert counts.tolist() == [3, 1]
        torch.testing.assert_close(sums.sum() / 4, sum(w[theirs] for w in wanted), rtol=1e-5, atol=1e-6)


def test_gradients_equal_transformers() -> None:
    targets = make_target((3, 2), seed=2)
    mine, theirs = make_detections(2, 1, seed=3), make_detections(2, 1, seed=3)
    sums = [sums.sum() / 5 for sums, _ in detection_loss(mine, targets, GroundedSamConfig()).values()]
    sum(sums).backward()
    terms = transformers_loss(theirs, targets, 0)
    (terms["loss_ce"] + terms["loss_bbox"] + terms["loss_giou"]).backward()
    for a, b in ((mine.token_logits[0].grad, theirs.token_logits[0].grad), (mine.boxes[0].grad, theirs.boxes[0].grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert mine.token_logits[0].grad is not None and mine.token_logits[0].grad[..., USED:].abs().sum() == 0


def test_an_image_without_instances_teaches_its_queries_nothing_is_there() -> None:
    found = make_detections(1, 2, seed=4)
    terms = detection_loss(found, make_target((0,), seed=0), GroundedSamConfig())
    assert terms["class"][0] > 0 and terms["class"][1].tolist() == [1]
    assert terms["box"][0].tolist() == [0] and terms["giou"][0].tolist() == [0]
    terms["class"][0].sum().backward()
    grad = found.token_logits[0].grad
    assert grad is not None and (grad[..., :USED] > 0).all()


def test_instances_of_classes_that_were_not_asked_for_are_left_out() -> None:
    targets = make_target((4,), seed=5)
    targets[0].labels[:] = torch.tensor([0, 2, 2, 1])
    found = make_detections(1, 1, seed=6)
    found.token_map = found.token_map.clone()
    found.token_map[:, 2] = 0
    kept = Targets(targets[0].masks[[0, 3]], targets[0].labels[[0, 3]], torch.ones(2))
    for name, (sums, counts) in detection_loss(found, targets, GroundedSamConfig()).items():
        other = detection_loss(found, [kept], GroundedSamConfig())[name]
        assert torch.equal(sums, other[0]) and torch.equal(counts, other[1])


def test_a_pseudo_label_counts_by_its_weight() -> None:
    targets = make_target((2,), seed=7)
    found = make_detections(1, 1, seed=8)
    whole = detection_loss(found, targets, GroundedSamConfig())
    targets[0].weights[:] = 0.5
    half = detection_loss(found, targets, GroundedSamConfig())
    torch.testing.assert_close(half["box"][0], whole["box"][0] / 2)
    assert half["box"][1].tolist() == whole["box"][1].tolist() == [2]


def test_a_prompted_mask_counts_by_its_weight() -> None:
    g = torch.Generator().manual_seed(3)
    logits, ious, instance = (
        torch.randn(1, 3, 8, 8, generator=g),
        torch.rand(1, 3, generator=g),
        torch.tensor([[0, 1, -1]]),
    )
    target = Targets(torch.rand(2, 32, 32, generator=g) < 0.5, torch.zeros(2, dtype=torch.int64), torch.ones(2))
    whole = prompted_mask_loss(logits, ious, instance, [target])
    target.weights = torch.full((2,), 0.5)
    for name, (sums, counts) in prompted_mask_loss(logits, ious, instance, [target]).items():
        torch.testing.assert_close(sums, whole[name][0] / 2)
        assert counts.tolist() == whole[name][1].tolist() == [2], name


def test_boxes_lie_round_the_pixels() -> None:
    masks = torch.zeros(1, 8, 10, dtype=torch.bool)
    masks[0, 2:4, 5:10] = True
    torch.testing.assert_close(boxes_of(masks, (8, 10)), torch.tensor([[0.75, 0.375, 0.5, 0.25]]))
    assert boxes_of(masks[:0], (8, 10)).shape == (0, 4)


def test_outputs_that_are_not_finite_are_refused() -> None:
    found = make_detections(1, 1, seed=9)
    with torch.no_grad():
        found.boxes[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        detection_loss(found, make_target((2,), seed=0), GroundedSamConfig())


def test_more_instances_than_queries() -> None:
    found = make_detections(1, 2, seed=10)
    targets = make_target((NUM_QUERIES + 3,), seed=11)
    query, instance = match_boxes(
        torch.stack([x[0] for x in found.token_logits]),
        torch.stack([x[0] for x in found.boxes]),
        boxes_of(targets[0].masks, (16, 24)),
        found.token_map[0, targets[0].labels],
        GroundedSamConfig(),
    )
    assert query.shape == instance.shape == (2, NUM_QUERIES)
    assert all(len(row.unique()) == NUM_QUERIES for row in instance)
