"""Auxiliary loss of the dense, location-assigned proposals that initialise the queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from cast_ray.contracts.mask_windows import window_logits
from cast_ray.contracts.records import Targets
from cast_ray.losses.mask_terms import mask_terms
from cast_ray.losses.set.criterion import target_weights
from cast_ray.losses.set.matching import kept_pixels, mask_parts
from cast_ray.recipe import LossConfig

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
            proposal_mask_embeddings [B, D, h, w], mask_features [B, D, H', W'] and, of local masks, proposal_windows
            [B, 4, h, w] (see `mask_windows.window_logits`).
        targets: B targets at crop size.
        config: the weights.
        valid: bool [B, H, W], False on padding; None: no padding.

    Returns:
        Of each image, float32 [B], a weighted sum and its count as in `set_loss`, where an instance's own weight (of
        `pseudo_weighting`) is in the sum alone: proposal_class (over tokens with a class target; no-object tokens count
        `no_object_weight`); proposal_mask and proposal_dice (over assigned tokens, each counts 1). A count of 0 comes
        with a sum of 0 that still has a gradient.

    Source: FCOS's centre sampling (Tian et al. 2019) for the assignment, Mask2Former's terms. Deviations: masks are
    compared at the mask features' own size, not at sampled points: there are few assigned tokens.
    """
    class_logits = auxiliary["proposal_class_logits"].float()
    embeddings, features = auxiliary["proposal_mask_embeddings"].flatten(2), auxiliary["mask_features"].flatten(2)
    height, width = auxiliary["mask_features"].shape[2:]
    grid = (class_logits.shape[2], class_logits.shape[3])
    windows = auxiliary["proposal_windows"].flatten(2) if "proposal_windows" in auxiliary else None
    num_classes = class_logits.shape[1] - 1
    keep = kept_pixels(targets, valid)
    # Pooled once at crop size, the largest tensors here; the grid's cells are made of the mask features' pixels.
    masks = [
        torch.cat([F.adaptive_avg_pool2d(part.float(), (height, width)) for part in mask_parts(t.masks)])
        for t in targets
    ]
    counted = None if keep is None else F.adaptive_avg_pool2d(keep.float(), (height, width))
    assigned_BT = assign_tokens(masks, grid, counted)

    weights = target_weights(targets, config)
    # One more entry a row, for the tokens (index -1) that belong to no instance.
    labels_BN = pad_sequence([t.labels for t in targets], batch_first=True, padding_value=num_classes)
    weights_BN = pad_sequence(weights, batch_first=True)
    index_BT = assigned_BT.clamp(min=-1) % (labels_BN.shape[1] + 1)
    labels_BT = F.pad(labels_BN, (0, 1), value=num_classes).gather(1, index_BT)
    weights_BT = F.pad(weights_BN, (0, 1), value=config.no_object_weight).gather(1, index_BT)
    is_assigned_BT = assigned_BT >= 0
    count_BT = torch.where(is_assigned_BT, 1.0, config.no_object_weight)
    for x_BT in (weights_BT, count_BT):
        x_BT.masked_fill_(assigned_BT == UNASSIGNED, 0)
    cross_entropy_BT = F.cross_entropy(class_logits.flatten(2), labels_BT, reduction="none")

    # Attached without any token too: every head gets a gradient on every worker, which DDP needs.
    attached = (embeddings, features) if windows is None else (embeddings, features, windows)
    nothing = sum((x.flatten()[:1].float().sum() * 0 for x in attached), class_logits.new_zeros(()))
    mask_sums, dice_sums = [nothing] * len(targets), [nothing] * len(targets)
    # The only copy to the host: how many tokens are assigned decides the shapes.
    for b, assigned_T in enumerate(assigned_BT.cpu()):
        token_P = (assigned_T >= 0).nonzero()[:, 0]
        if len(token_P) == 0:
            continue
        instance_P, token_P = (x.to(class_logits.device, non_blocking=True) for x in (assigned_T[token_P], token_P))
        logits_PX = (embeddings[b][:, token_P].T @ features[b]).float()
        if windows is not None:
            window_1PHW = window_logits(windows[b, :, token_P].T[None], token_P[None], grid, (height, width))
            logits_PX = logits_PX + window_1PHW[0].flatten(1)
        counted_1X = None if counted is None else counted[b].view(1, -1)
        mask_P, dice_P = mask_terms(logits_PX, masks[b].flatten(1)[instance_P], counted_1X)
        mask_sums[b], dice_sums[b] = mask_P @ weights[b][instance_P], dice_P @ weights[b][instance_P]
    count_B = is_assigned_BT.sum(1).float()
    return {
        "proposal_class": ((cross_entropy_BT * weights_BT).sum(1), count_BT.sum(1)),
        "proposal_mask": (torch.stack(mask_sums), count_B),
        "proposal_dice": (torch.stack(dice_sums), count_B),
    }


BACKGROUND = -1
UNASSIGNED = -2


@torch.no_grad()
def assign_tokens(
    masks: Sequence[torch.Tensor], grid: Sequence[int], counted: torch.Tensor | None = None
) -> torch.Tensor:
    """The instance that each cell of a token grid is assigned to.

    A cell scores for an instance `covered * exp(-pi d^2 / (2 area))`: the share of the cell that the instance covers,
    falling with the distance d of the cell from the instance's centre of mass. Its central region are the cells of at
    least half its best score, nine at most; a cell claimed by several goes to the highest score.

    Args:
        masks: B tensors float32 [N, H, W], the share of each pixel (of any size) that an instance covers.
        grid: h, w of the tokens.
        counted: float32 [B, H, W], the share of each pixel that lies inside the image and outside ignore regions;
            None: 1 everywhere.

    Returns:
        int64 [B, h*w]: instance index, -1 background, -2 without a class target.
    """
    height, width = grid
    device = masks[0].device
    y_T = torch.arange(height, device=device).repeat_interleave(width).float()
    x_T = torch.arange(width, device=device).repeat(height).float()
    covered_BNT = pad_sequence([F.adaptive_avg_pool2d(m, (height, width)).flatten(1) for m in masks], batch_first=True)
    assigned_BT = torch.full((len(masks), height * width), BACKGROUND, device=device)
    if counted is not None:
        ignored_BT = F.adaptive_avg_pool2d(counted, (height, width)).flatten(1) < 1 - CENTRAL_SHARE
        assigned_BT.masked_fill_(ignored_BT, UNASSIGNED)
    if covered_BNT.shape[1] == 0:
        return assigned_BT
    area_BN1 = covered_BNT.sum(2, keepdim=True).clamp(min=1e-6)  # in cells
    offset_y_BNT = y_T - (covered_BNT @ y_T)[..., None] / area_BN1
    offset_x_BNT = x_T - (covered_BNT @ x_T)[..., None] / area_BN1
    distance_BNT = offset_y_BNT.square() + offset_x_BNT.square()
    score_BNT = covered_BNT * torch.exp(-torch.pi * distance_BNT / (2 * area_BN1))
    kept = min(MAX_TOKENS_PER_INSTANCE, height * width)
    best_BNK = score_BNT.topk(kept, dim=2).values
    floor_BN1 = torch.maximum(best_BNK[..., -1:], CENTRAL_SHARE * best_BNK[..., :1])
    score_BNT = score_BNT * ((score_BNT >= floor_BN1) & (score_BNT > 0))
    top_BT, owner_BT = score_BNT.max(1)
    assigned_BT.masked_fill_(covered_BNT.amax(1) > CENTRAL_SHARE, UNASSIGNED)
    return torch.where(top_BT > 0, owner_BT, assigned_BT)
