"""Dense proposals: which token belongs to which instance, and the auxiliary loss."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cast_ray.contracts.records import Targets
from cast_ray.losses.set.proposals import BACKGROUND, UNASSIGNED, assign_tokens, proposal_loss
from cast_ray.recipe import LossConfig


def square(height: int, width: int, top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def targets(masks: list[torch.Tensor], labels: list[int], ignore: torch.Tensor | None = None) -> Targets:
    size = masks[0].shape if masks else (32, 48)
    stacked = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
    return Targets(stacked, torch.tensor(labels, dtype=torch.int64), torch.ones(len(labels)), ignore)


def assign(target: Targets, grid: tuple[int, int], keep: torch.Tensor | None = None) -> torch.Tensor:
    """Of one image, between an empty one and a crowded one."""
    others = torch.zeros(0, *target.masks.shape[1:]), torch.rand(9, *target.masks.shape[1:])
    counted = None if keep is None else keep.float().expand(3, *keep.shape)
    return assign_tokens([others[0], target.masks.float(), others[1]], grid, counted)[1]


def test_tokens_are_assigned_by_location() -> None:
    target = targets([square(32, 48, 0, 0, 16), square(32, 48, 24, 40, 8)], [0, 1])
    assigned = assign(target, (4, 6)).unflatten(0, (4, 6))
    assert assigned[:2, :2].tolist() == [[0, 0], [0, 0]]
    assert assigned[3, 5] == 1
    assert (assigned == BACKGROUND).sum() == 19


def test_cells_of_a_large_instance_off_its_centre_have_no_class_target() -> None:
    assigned = assign(targets([square(64, 64, 0, 0, 64)], [0]), (8, 8)).unflatten(0, (8, 8))
    assert assigned[0, 0] == UNASSIGNED
    assert 0 < (assigned == 0).sum() <= 12
    assert assigned[3:5, 3:5].eq(0).all()


def test_an_instance_smaller_than_a_cell_still_gets_one() -> None:
    assigned = assign(targets([square(32, 48, 10, 10, 2)], [0]), (4, 6))
    assert assigned.eq(0).sum() == 1


def test_ignored_background_has_no_class_target() -> None:
    ignore = square(32, 48, 16, 16, 16)
    assigned = assign(targets([square(32, 48, 0, 0, 8)], [0]), (4, 6), ~ignore).unflatten(0, (4, 6))
    assert assigned[2:4, 2:4].eq(UNASSIGNED).all()
    assert assigned[0, 0] == 0


def test_proposal_loss_falls_to_zero_for_the_right_answer_and_counts_add_up() -> None:
    target = targets([square(32, 48, 0, 0, 16)], [2])
    assigned = assign(target, (4, 6))
    logits = torch.full((1, 4, 24), -20.0)
    logits[0, 3, assigned == BACKGROUND] = 20.0
    logits[0, 2, assigned == 0] = 20.0
    mask_features = torch.where(target.masks[:, ::4, ::4], 20.0, -20.0)[None]
    auxiliary = {
        "proposal_class_logits": logits.unflatten(2, (4, 6)),
        "proposal_mask_embeddings": torch.ones(1, 1, 4, 6),
        "mask_features": mask_features,
    }
    config = LossConfig(no_object_weight=0.1)
    terms = proposal_loss(auxiliary, [target], config)
    assert all(total < 1e-4 for total, _ in terms.values())
    positives = int((assigned == 0).sum())
    assert terms["proposal_mask"][1] == positives
    assert terms["proposal_class"][1].item() == pytest.approx(positives + 0.1 * (24 - positives))
    wrong = proposal_loss({**auxiliary, "mask_features": -mask_features}, [target], config)
    assert wrong["proposal_mask"][0] > 10 and wrong["proposal_dice"][0] > 0.5


def test_the_window_of_a_proposal_is_a_part_of_its_mask() -> None:
    """Two equal objects have equal features: without windows the mask of a token of the one holds the other too."""
    masks = [square(64, 64, 8, 8, 8), square(64, 64, 48, 48, 8)]
    target = targets(masks, [0, 0])
    assigned = assign(target, (8, 8))
    auxiliary = {
        "proposal_class_logits": torch.zeros(1, 2, 8, 8),
        "proposal_mask_embeddings": torch.ones(1, 1, 8, 8),
        "mask_features": torch.where(target.masks.any(0)[::4, ::4], 20.0, -20.0)[None, None],
    }
    assert assigned.ge(0).sum() == 2
    windows = torch.zeros(1, 4, 8, 8)
    windows[:, 2:] = 1.5  # of a standard deviation of .94 cells: 5 cells away the logit is below -20
    windows.requires_grad_()
    without = proposal_loss(auxiliary, [target], LossConfig())
    local = proposal_loss({**auxiliary, "proposal_windows": windows}, [target], LossConfig())
    for term in ("proposal_mask", "proposal_dice"):
        assert local[term][0] < 0.01 * without[term][0] and local[term][1] == without[term][1] == 2
    local["proposal_mask"][0].sum().backward()
    assert windows.grad is not None
    assert (windows.grad.flatten(2).abs().sum((0, 1)) > 0).tolist() == assigned.ge(0).tolist()


def random_auxiliary(images: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "proposal_class_logits": (images, 4, 4, 6),
        "proposal_mask_embeddings": (images, 5, 4, 6),
        "mask_features": (images, 5, 8, 12),
    }
    return {name: torch.randn(*shape, generator=g).requires_grad_() for name, shape in shapes.items()}


def test_images_have_terms_of_their_own_and_gradients_without_objects() -> None:
    auxiliary = random_auxiliary()
    target = [targets([square(32, 48, 4, 4, 12)], [1]), targets([], [])]
    both = proposal_loss(auxiliary, target, LossConfig())
    for b in range(2):
        alone = proposal_loss({k: v[b : b + 1] for k, v in auxiliary.items()}, target[b : b + 1], LossConfig())
        for term, (total, count) in both.items():
            torch.testing.assert_close(total[b], alone[term][0][0])
            torch.testing.assert_close(count[b], alone[term][1][0])
    assert both["proposal_mask"][0][1] == both["proposal_mask"][1][1] == 0
    sum(total[1] for total, _ in both.values()).backward()
    gradients = {name: value.grad for name, value in auxiliary.items()}
    assert gradients.pop("proposal_class_logits").any()
    assert all(not grad.any() for grad in gradients.values())


def test_scores_weigh_tokens_where_the_recipe_says_so() -> None:
    target = targets([square(32, 48, 0, 0, 16), square(32, 48, 16, 16, 8)], [2, 0])
    target.weights = torch.tensor([0.25, 1.0])
    hard, score = (
        proposal_loss(random_auxiliary(1), [target], LossConfig(pseudo_weighting=weighting))
        for weighting in ("hard", "score")
    )
    for term in hard:  # the number of tokens, whatever they weigh: the weight of a single label must not cancel
        assert hard[term][1].item() == score[term][1].item() > 0
        assert 0 < score[term][0] < hard[term][0]
    target.weights = torch.tensor([0.25, 0.25])
    quarter = proposal_loss(random_auxiliary(1), [target], LossConfig(pseudo_weighting="score"))
    for term in ("proposal_mask", "proposal_dice"):
        torch.testing.assert_close(quarter[term][0], 0.25 * hard[term][0])


def test_padding_and_ignore_regions_have_no_influence() -> None:
    outside = torch.zeros(1, 32, 48, dtype=torch.bool)
    outside[:, :, 24:] = True
    target = targets([square(32, 48, 0, 0, 16)], [2])
    plain = random_auxiliary(1)
    changed = {name: value.detach().clone() for name, value in plain.items()}
    changed["proposal_class_logits"][..., 3:] += 5
    changed["mask_features"][..., 6:] -= 5
    ignoring = targets([square(32, 48, 0, 0, 16)], [2], outside[0])
    terms = [
        proposal_loss(plain, [target], LossConfig(), valid=~outside),
        proposal_loss(changed, [target], LossConfig(), valid=~outside),
        proposal_loss(plain, [ignoring], LossConfig()),
    ]
    for other in terms[1:]:
        for name, (total, count) in terms[0].items():
            torch.testing.assert_close(total, other[name][0])
            assert count == other[name][1]
    assert terms[0]["proposal_class"][1] < proposal_loss(plain, [target], LossConfig())["proposal_class"][1]


def test_one_copy_to_the_host() -> None:
    copies = []
    real = torch.Tensor.cpu
    with mock.patch.object(torch.Tensor, "cpu", lambda self: copies.append(1) or real(self)):
        proposal_loss(random_auxiliary(), [targets([square(32, 48, 4, 4, 12)], [1])] * 2, LossConfig())
    assert len(copies) == 1
