"""Auxiliary loss of the dense, location-assigned proposals that initialise the queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cast_ray.recipe import LossConfig
from cast_ray.records import Targets

MAX_TOKENS_PER_INSTANCE = 9
CENTRAL_SHARE = 0.5

Term = tuple[torch.Tensor, torch.Tensor]


def proposal_weights(config: LossConfig) -> dict[str, float]:
    """Weight of each term of `proposal_loss`, by exact key."""
    return {
        "proposal_class": config.proposal_weight * config.class_weight,
        "proposal_mask": config.proposal_weight * config.mask_weight,
        "proposal_dice": config.proposal_weight * config.dice_weight,
    }


def proposal_loss(auxiliary: dict[str, torch.Tensor], targets: list[Targets], config: LossConfig) -> dict[str, Term]:
    """Class and mask losses of tokens assigned to instances by location.

    A token in the central region of an instance (see `assign_tokens`) is assigned to it: its class logits are trained
    by cross-entropy on the instance's label, its mask by binary cross-entropy and dice on the instance's mask. Tokens
    that lie in no instance are trained to no-object with weight `no_object_weight`; tokens inside an instance but
    outside its central region, and tokens mostly on ignored pixels, have no class target.

    Args:
        auxiliary: `Predictions.auxiliary` of B images: proposal_class_logits [B, C+1, h, w],
            proposal_mask_embeddings [B, D, h, w], mask_features [B, D, H', W'].
        targets: B targets at crop size.
        config: the weights.

    Returns:
        proposal_class: (sum of weighted cross-entropies, sum of their weights); proposal_mask and proposal_dice:
        (sum over assigned tokens, sum of their weights). A count of 0 comes with a sum of 0 that still has a gradient.

    Source: FCOS's centre sampling (Tian et al. 2019) for the assignment, Mask2Former's terms. Deviations: masks are
    compared at the mask features' own size, not at sampled points: there are few assigned tokens.
    """
    class_logits = auxiliary["proposal_class_logits"].float()
    embeddings, features = auxiliary["proposal_mask_embeddings"], auxiliary["mask_features"]
    grid = (class_logits.shape[2], class_logits.shape[3])
    no_object = class_logits.shape[1] - 1
    class_sum = class_logits.sum() * 0
    mask_sum = (embeddings.sum() * 0 + features.sum() * 0).float()
    dice_sum = mask_sum
    class_count, mask_count = class_sum.detach(), class_sum.detach()
    for b, target in enumerate(targets):
        assigned_T = assign_tokens(target, grid)
        weights = target.weights.to(class_logits)
        positive = assigned_T >= 0
        instance_P = assigned_T[positive]
        labels_T = torch.full_like(assigned_T, no_object)
        labels_T[positive] = target.labels[instance_P]
        weight_T = torch.full(assigned_T.shape, config.no_object_weight, device=class_logits.device)
        weight_T[positive] = weights[instance_P]
        weight_T[assigned_T == UNASSIGNED] = 0
        cross_entropy_T = F.cross_entropy(class_logits[b].flatten(1).T, labels_T, reduction="none")
        class_sum = class_sum + (cross_entropy_T * weight_T).sum()
        class_count = class_count + weight_T.sum()
        if len(instance_P) == 0:
            continue
        logits_PHW = torch.einsum("pd,dhw->phw", embeddings[b].flatten(1).T[positive], features[b])
        mask_loss_P, dice_loss_P = _mask_losses(logits_PHW.float(), target, instance_P)
        weight_P = weights[instance_P]
        mask_sum = mask_sum + (mask_loss_P * weight_P).sum()
        dice_sum = dice_sum + (dice_loss_P * weight_P).sum()
        mask_count = mask_count + weight_P.sum()
    return {
        "proposal_class": (class_sum, class_count),
        "proposal_mask": (mask_sum, mask_count),
        "proposal_dice": (dice_sum, mask_count),
    }


BACKGROUND = -1
UNASSIGNED = -2


@torch.no_grad()
def assign_tokens(target: Targets, grid: tuple[int, int]) -> torch.Tensor:
    """The instance that each cell of a token grid is assigned to.

    A cell scores for an instance `covered * exp(-pi d^2 / (2 area))`: the share of the cell that the instance covers,
    falling with the distance d of the cell from the instance's centre of mass. Its central region are the cells of at
    least half its best score, nine at most; a cell claimed by several goes to the highest score.

    Args:
        target: masks bool [N, H, W] and ignore of one image.
        grid: h, w of the tokens.

    Returns:
        int64 [h*w]: instance index, -1 background, -2 without a class target.
    """
    height, width = grid
    num_tokens = height * width
    device = target.masks.device
    assigned_T = torch.full((num_tokens,), BACKGROUND, dtype=torch.int64, device=device)
    if len(target.masks):
        covered_NHW = F.adaptive_avg_pool2d(target.masks.float(), grid)
        covered_NT = covered_NHW.flatten(1)
        assigned_T[covered_NT.amax(0) > CENTRAL_SHARE] = UNASSIGNED
        area_N = covered_NT.sum(1).clamp(min=1e-6)  # in cells
        y_T = torch.arange(height, device=device).repeat_interleave(width).float()
        x_T = torch.arange(width, device=device).repeat(height).float()
        offset_y_NT = y_T - ((covered_NT @ y_T) / area_N)[:, None]
        offset_x_NT = x_T - ((covered_NT @ x_T) / area_N)[:, None]
        distance_NT = offset_y_NT.square() + offset_x_NT.square()
        score_NT = covered_NT * torch.exp(-torch.pi * distance_NT / (2 * area_N[:, None]))
        best_N = score_NT.amax(1, keepdim=True)
        kept = min(MAX_TOKENS_PER_INSTANCE, num_tokens)
        floor_N = torch.maximum(score_NT.topk(kept, dim=1).values[:, -1:], CENTRAL_SHARE * best_N)
        score_NT = torch.where((score_NT >= floor_N) & (score_NT > 0), score_NT, 0)
        top_T, owner_T = score_NT.max(0)
        assigned_T[top_T > 0] = owner_T[top_T > 0]
    if target.ignore is not None:
        ignored_T = F.adaptive_avg_pool2d(target.ignore[None].float(), grid).flatten() > CENTRAL_SHARE
        assigned_T[ignored_T & (assigned_T == BACKGROUND)] = UNASSIGNED
    return assigned_T


def _mask_losses(
    logits_PHW: torch.Tensor, target: Targets, instance_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean binary cross-entropy and dice per assigned token, over the pixels that are not ignored."""
    size = (logits_PHW.shape[1], logits_PHW.shape[2])
    logits_PX = logits_PHW.flatten(1)
    masks_NX = F.adaptive_avg_pool2d(target.masks.float(), size).flatten(1)
    truth_PX = masks_NX[instance_P]
    counted_X = torch.ones(logits_PX.shape[1], device=logits_PX.device)
    if target.ignore is not None:
        counted_X = 1 - F.adaptive_avg_pool2d(target.ignore[None].float(), size).flatten()
    bce_PX = F.binary_cross_entropy_with_logits(logits_PX, truth_PX, reduction="none")
    bce_P = (bce_PX * counted_X).sum(1) / counted_X.sum().clamp(min=1)
    prob_PX = logits_PX.sigmoid() * counted_X
    truth_PX = truth_PX * counted_X
    dice_P = 1 - (2 * (prob_PX * truth_PX).sum(1) + 1) / (prob_PX.sum(1) + truth_PX.sum(1) + 1)
    return bce_P, dice_P
