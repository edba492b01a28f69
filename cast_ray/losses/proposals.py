"""Auxiliary loss of the dense, location-assigned proposals that initialise the queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cast_ray.losses.mask_terms import mask_terms
from cast_ray.losses.matching import kept_pixels
from cast_ray.losses.set_criterion import target_weights
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


def proposal_loss(
    auxiliary: dict[str, torch.Tensor],
    targets: list[Targets],
    config: LossConfig,
    valid: torch.Tensor | None = None,
) -> dict[str, Term]:
    """Class and mask losses of tokens assigned to instances by location.

    A token in the central region of an instance (see `assign_tokens`) is assigned to it: its class logits are trained
    by cross-entropy on the instance's label, its mask by binary cross-entropy and dice on the instance's mask. Tokens
    that lie in no instance are trained to no-object with weight `no_object_weight`; tokens inside an instance but
    outside its central region, and tokens mostly on ignored pixels or padding, have no class target.

    Args:
        auxiliary: `Predictions.auxiliary` of B images: proposal_class_logits [B, C+1, h, w],
            proposal_mask_embeddings [B, D, h, w], mask_features [B, D, H', W'].
        targets: B targets at crop size.
        config: the weights.
        valid: bool [B, H, W], False on padding; None: no padding.

    Returns:
        Of each image, float32 [B]: proposal_class (sum of weighted cross-entropies, sum of their weights);
        proposal_mask and proposal_dice (sum over assigned tokens, sum of their weights). A count of 0 comes with a sum
        of 0 that still has a gradient.

    Source: FCOS's centre sampling (Tian et al. 2019) for the assignment, Mask2Former's terms. Deviations: masks are
    compared at the mask features' own size, not at sampled points: there are few assigned tokens.
    """
    class_logits = auxiliary["proposal_class_logits"].float()
    embeddings, features = auxiliary["proposal_mask_embeddings"], auxiliary["mask_features"]
    grid = (class_logits.shape[2], class_logits.shape[3])
    num_classes = class_logits.shape[1] - 1
    keep = kept_pixels(targets, valid)
    weights = target_weights(targets, config)
    assigned_BT = torch.stack([assign_tokens(t, grid, None if keep is None else keep[i]) for i, t in enumerate(targets)])

    labels_BT = torch.full_like(assigned_BT, num_classes)
    weights_BT = class_logits.new_full(assigned_BT.shape, config.no_object_weight)
    for b, target in enumerate(targets):
        if len(target.labels):
            inside_T, index_T = assigned_BT[b] >= 0, assigned_BT[b].clamp(min=0)
            labels_BT[b] = torch.where(inside_T, target.labels[index_T], num_classes)
            weights_BT[b] = torch.where(inside_T, weights[b][index_T], config.no_object_weight)
    weights_BT.masked_fill_(assigned_BT == UNASSIGNED, 0)
    cross_entropy_BT = F.cross_entropy(class_logits.flatten(2), labels_BT, reduction="none")
    class_term = ((cross_entropy_BT * weights_BT).sum(1), weights_BT.sum(1))

    sums: list[torch.Tensor] = []
    attached = (embeddings.flatten()[:1].sum() * 0 + features.flatten()[:1].sum() * 0).float()
    # The only copy to the host: how many tokens are assigned decides the shapes.
    for b, assigned_T in enumerate(assigned_BT.cpu()):
        token_P = (assigned_T >= 0).nonzero()[:, 0]
        if len(token_P) == 0:
            sums.append(torch.stack([attached, attached, attached.detach()]))
            continue
        instance_P, token_P = (x.to(class_logits.device, non_blocking=True) for x in (assigned_T[token_P], token_P))
        logits_PHW = torch.einsum("dp,dhw->phw", embeddings[b].flatten(1)[:, token_P], features[b])
        mask_P, dice_P = _mask_losses(logits_PHW.float(), targets[b], None if keep is None else keep[b], instance_P)
        weight_P = weights[b][instance_P]
        sums.append(torch.stack([mask_P @ weight_P, dice_P @ weight_P, weight_P.sum()]))
    mask_sum_B, dice_sum_B, mask_count_B = torch.stack(sums, dim=1)
    return {
        "proposal_class": class_term,
        "proposal_mask": (mask_sum_B, mask_count_B),
        "proposal_dice": (dice_sum_B, mask_count_B),
    }


BACKGROUND = -1
UNASSIGNED = -2


@torch.no_grad()
def assign_tokens(target: Targets, grid: tuple[int, int], keep: torch.Tensor | None = None) -> torch.Tensor:
    """The instance that each cell of a token grid is assigned to.

    A cell scores for an instance `covered * exp(-pi d^2 / (2 area))`: the share of the cell that the instance covers,
    falling with the distance d of the cell from the instance's centre of mass. Its central region are the cells of at
    least half its best score, nine at most; a cell claimed by several goes to the highest score.

    Args:
        target: masks bool [N, H, W] of one image.
        grid: h, w of the tokens.
        keep: bool [H, W], False on padding and in ignore regions; None: True everywhere.

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
        assigned_T.masked_fill_(covered_NT.amax(0) > CENTRAL_SHARE, UNASSIGNED)
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
        assigned_T = torch.where(top_T > 0, owner_T, assigned_T)
    if keep is not None:
        ignored_T = F.adaptive_avg_pool2d(keep[None].float(), grid).flatten() < 1 - CENTRAL_SHARE
        assigned_T.masked_fill_(ignored_T & (assigned_T == BACKGROUND), UNASSIGNED)
    return assigned_T


def _mask_losses(
    logits_PHW: torch.Tensor, target: Targets, keep: torch.Tensor | None, instance_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean binary cross-entropy and dice per assigned token, over the pixels that are kept."""
    size = (logits_PHW.shape[1], logits_PHW.shape[2])
    masks_NX = F.adaptive_avg_pool2d(target.masks.float(), size).flatten(1)
    counted_1X = None if keep is None else F.adaptive_avg_pool2d(keep[None].float(), size).flatten(1)
    return mask_terms(logits_PHW.flatten(1), masks_NX[instance_P], counted_1X)
