"""Mask2Former's set loss over all decoder layers, on ground truth and on pseudo-labels."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cast_ray.contracts.records import Predictions, Targets
from cast_ray.contracts.soft_targets import mask_targets
from cast_ray.losses.mask_terms import mask_terms
from cast_ray.losses.set.matching import QueryMatches, kept_pixels, match_layers, sample_kept, sample_maps
from cast_ray.recipe import LossConfig

_SAMPLES_AT_A_TIME = {"cpu": 2**18}  # pairs x candidate points: what stays in cache (else 2**22, to bound memory)


@dataclass(frozen=True)
class LossPoints:
    """Where masks are compared, (x, y) in [-1, 1] from edge to edge; K as in `QueryMatches`, in its order.

    match: float32 [L or 1, B, P, 2], the matcher's points.
    candidates: float32 [L, K, S, 2], S = int(P * oversample_ratio), of which the int(importance_ratio * P) most
    uncertain are taken.
    uniform: float32 [L, K, P - int(importance_ratio * P), 2], taken as they are.
    """

    match: Tensor
    candidates: Tensor
    uniform: Tensor


def set_loss(
    predictions: Predictions,
    targets: Sequence[Targets],
    config: LossConfig,
    *,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    points: LossPoints | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """L_sup or L_semi: class, mask and dice terms of the matched queries, summed over all decoder layers.

    With m matched to g, N targets, w_n the target's weight (1 for an unmatched query), and u_k = 1 for matched queries,
    no_object_weight for the others:
    class = sum_l [ sum_k u_k w_k CE_k ] / [ sum_k u_k ],  mask = sum_l [ sum_n w_n mean_p BCE ] / N,
    dice = sum_l [ sum_n w_n (1 - (2 sum_p m g + 1) / (sum_p m + sum_p g + 1)) ] / N.
    The denominators count targets and do not contain their weights: a weight below 1 makes the loss smaller, also where
    it is the only target of a step. Each term is returned as numerator and denominator of every image, so that one
    matching serves D_l and D_u and the caller can add up either part and the denominators of all workers. The count of
    the mask terms is a whole number; 0 comes with a sum of 0, so that Mask2Former's `count.sum().clamp(min=1)` gives
    the same as a division by the count where there is one.

    Args:
        predictions: L layers; class_logits [B, Q, C+1], mask_logits [B, Q, h, w], any float dtype (float32 inside).
        targets: B targets, bool masks [N, H, W]; weights count if `config.pseudo_weighting` is "score", else all are 1.
        config: weights of the matching costs, how points are drawn, and whether matched queries learn the soft targets
            of images that have them: CE against the teacher's distribution, BCE and dice against its mask
            probabilities. Matching takes labels and masks as they are.
        generator: source of the random points, on the predictions' device.
        valid: bool [B, H, W], False on padding; None: no padding. Padding and `Targets.ignore` enter no mask term.
        points: fixed points instead of drawn ones (tests, benchmarks).

    Returns:
        {"class", "mask", "dice"} -> (sum, count), float32 [B], before the term's own weight; sum has gradients, count
        none. count is that of one layer. An image without instances has mask and dice (0, 0), still attached to the
        graph.

    Raises:
        ValueError: another number of targets than images, a label outside 0..C-1, an empty mask, non-finite logits.

    Source: Mask2Former (arXiv 2112.01527), `SetCriterion`; equal in value and gradient to transformers'
    `Mask2FormerLoss` for the same points and weights 1. Its known fault: older releases hard-code the matcher's class
    cost to 1.0, newer ones (5.23) tie it to the loss weight; here it is a field, `LossConfig.cost_class`, 2 by default.
    It also trains silently on empty masks and on label C (no-object); both are refused here.
    Deviations: with `config.exact` False the matcher uses one quarter of the points, shared by the layers, and the mask
    terms use uniform points only.
    """
    class_logits, mask_logits = predictions.class_logits, predictions.mask_logits
    num_images = class_logits[0].shape[0]
    if len(targets) != num_images:
        raise ValueError(f"set_loss: expected one Targets per image ({num_images}), got {len(targets)}")
    keep = kept_pixels(targets, valid)
    if points is None:
        points = draw_points(predictions, targets, config, generator)
    matches = match_layers(class_logits, mask_logits, targets, config, points.match, keep)

    weights = target_weights(targets, config)
    class_sum, class_count = _class_term(class_logits, targets, matches, torch.cat(weights), config)
    mask_sum = dice_sum = class_sum.new_zeros(num_images)
    if matches.query.shape[1] == 0:
        # Zero, but attached: every mask head gets a gradient on every worker, which DDP needs.
        mask_sum = dice_sum = sum((logits.flatten()[:1].float().sum() * 0 for logits in mask_logits), mask_sum)
    else:
        masks = torch.cat([t.masks if config.soft_targets in ("off", "class") else mask_targets(t) for t in targets])
        for layer, logits in enumerate(mask_logits):
            mask, dice = _mask_sums(logits, masks, torch.cat(weights), matches, layer, points, keep, config)
            mask_sum, dice_sum = mask_sum + mask, dice_sum + dice
    count = class_count.new_tensor([len(w) for w in weights])
    return {"class": (class_sum, class_count), "mask": (mask_sum, count), "dice": (dice_sum, count)}


def target_weights(targets: Sequence[Targets], config: LossConfig) -> list[Tensor]:
    """Weight of each instance, float32 [N] of each image: the target's own if `pseudo_weighting` is "score", else 1."""
    return [t.weights.float() if config.pseudo_weighting == "score" else torch.ones_like(t.weights) for t in targets]


def draw_points(
    predictions: Predictions, targets: Sequence[Targets], config: LossConfig, generator: torch.Generator | None
) -> LossPoints:
    """Random points for `set_loss`, fresh for each layer and image (matcher) and each layer and pair (mask terms)."""
    num_layers, (num_images, num_queries) = len(predictions.class_logits), predictions.class_logits[0].shape[:2]
    num_pairs = sum(min(num_queries, t.labels.shape[0]) for t in targets)
    num_candidates, num_uncertain = _point_counts(config)
    device = predictions.class_logits[0].device

    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, 2, device=device).uniform_(-1, 1, generator=generator)

    if config.exact:
        match = draw(num_layers, num_images, config.num_points)
    else:
        match = draw(1, num_images, max(1, config.num_points // 4))
    return LossPoints(
        match=match,
        candidates=draw(num_layers, num_pairs, num_candidates),
        uniform=draw(num_layers, num_pairs, config.num_points - num_uncertain),
    )


def _point_counts(config: LossConfig) -> tuple[int, int]:
    """(candidates, uncertain points taken from them)."""
    if not config.exact:
        return 0, 0
    return int(config.num_points * config.oversample_ratio), int(config.num_points * config.importance_ratio)


def _class_term(
    class_logits: Sequence[Tensor],
    targets: Sequence[Targets],
    matches: QueryMatches,
    weights: Tensor,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropies, and what they are divided by: u_k of `set_loss`, without the targets' own weights."""
    logits = torch.stack([layer.float() for layer in class_logits]).flatten(1, 2)  # [L, B * Q, C+1]
    num_classes = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], num_classes, dtype=torch.int64, device=logits.device)
    importance = torch.full(logits.shape[:2], config.no_object_weight, device=logits.device)
    weighted = importance
    if matches.query.shape[1]:
        labels = torch.cat([t.labels for t in targets])
        wanted.scatter_(1, matches.query, labels[matches.target])
        importance = importance.scatter(1, matches.query, 1.0)
        weighted = weighted.scatter(1, matches.query, weights[matches.target])
    losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    if matches.query.shape[1] and config.soft_targets in ("class", "both"):
        hard = F.one_hot(labels, num_classes + 1).float().split([len(t.labels) for t in targets])
        probs = torch.cat([h if t.class_probs is None else t.class_probs for h, t in zip(hard, targets)])
        matched = logits.gather(1, matches.query[..., None].expand(-1, -1, num_classes + 1))  # [L, K, C+1]
        soft = -(probs[matches.target] * matched.log_softmax(-1)).sum(-1)
        losses = losses.scatter(1, matches.query, soft)
    by_image = (-1, len(targets), class_logits[0].shape[1])
    # Every layer matches every target once, so layers share one count (their mean, if N > Q leaves some out).
    return (losses * weighted).view(by_image).sum((0, 2)), importance.view(by_image).sum(2).mean(0)


def _mask_sums(
    logits: Tensor,
    masks: Tensor,
    weights: Tensor,
    matches: QueryMatches,
    layer: int,
    points: LossPoints,
    keep: Tensor | None,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Weighted point-sampled BCE and dice of one layer's pairs, added up by image: [B] each."""
    num_images = logits.shape[0]
    chosen = _TakeRows.apply(logits.flatten(0, 1), matches.query[layer])
    limit = _SAMPLES_AT_A_TIME.get(logits.device.type, 2**22)
    at_a_time = max(1, limit // max(points.candidates.shape[2], points.uniform.shape[2]))
    losses: list[Tensor] = []
    for values, target, image, candidates, uniform in zip(
        *(
            t.split(at_a_time)
            for t in (chosen, matches.target[layer], matches.image, points.candidates[layer], points.uniform[layer])
        )
    ):
        where = torch.cat([_uncertain_points(values, image, candidates, keep, config), uniform], dim=1)
        kept = None if keep is None else sample_kept(keep, image, where).float()
        losses.append(torch.stack(mask_terms(sample_maps(values, where), sample_maps(masks[target], where), kept)))
    by_pair = torch.cat(losses, dim=1) * weights[matches.target[layer]]
    mask_sum, dice_sum = by_pair.new_zeros(2, num_images).index_add(1, matches.image, by_pair)
    return mask_sum, dice_sum


class _TakeRows(torch.autograd.Function):
    """`rows[index]` for distinct indices; the gradient of the rows not taken is memory that is never touched."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _untouched_zeros(ctx.shape, grad).index_copy_(0, ctx.saved_tensors[0], grad), None


def _untouched_zeros(shape: torch.Size, like: Tensor) -> Tensor:
    """Zeros of the type and device of `like`.

    On the CPU they are pages that the system zeroes when they are first written: torch.zeros writes every byte, which
    for the unmatched nine tenths of the queries would cost as much as the rest of the backward pass.
    """
    if like.device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, shape.numel() * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


@torch.no_grad()
def _uncertain_points(
    logits: Tensor, image: Tensor, candidates: Tensor, keep: Tensor | None, config: LossConfig
) -> Tensor:
    """Returns the candidates whose logits are nearest 0, [K, int(importance_ratio * P), 2]; excluded pixels come
    last."""
    num_uncertain = _point_counts(config)[1]
    if num_uncertain == 0:
        return candidates[:, :0]
    certainty = sample_maps(logits, candidates).abs_()
    if keep is not None:
        certainty.masked_fill_(~sample_kept(keep, image, candidates), torch.inf)
    if certainty.device.type == "cpu" and num_uncertain < certainty.shape[1]:
        # A partition without order, several times as fast as topk; floats >= 0 sort like the integers of their bits.
        bits = certainty.view(torch.int32).numpy()
        nearest = torch.from_numpy(np.argpartition(bits, num_uncertain, axis=1)[:, :num_uncertain])
    else:
        nearest = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    pairs = torch.view_as_complex(candidates)  # moves x and y together
    return torch.view_as_real(pairs.gather(1, nearest))
