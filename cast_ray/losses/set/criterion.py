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
from cast_ray.losses.joint_step import JointStep
from cast_ray.losses.mask_terms import mask_terms
from cast_ray.losses.set.matching import QueryMatches, kept_pixels, match_layers, sample_kept, sample_maps, sample_masks
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
    joint: JointStep | None = None,
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
        joint: the step of the targets' images, for which points are drawn; None: there is one worker.

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
    joint = joint or JointStep(num_images, num_images)
    match = points.match if points else _draw_match_points(predictions, config, joint, generator)
    matches = match_layers(class_logits, mask_logits, targets, config, match, keep)

    weights = target_weights(targets, config)
    class_sum, class_count = _class_term(class_logits, targets, matches, torch.cat(weights), config)
    mask_sum = dice_sum = class_sum.new_zeros(num_images)
    num_queries = class_logits[0].shape[1]
    own = _own_pairs([min(num_queries, len(w)) for w in weights], joint, points is not None, class_sum.device)
    # Also for a worker without pairs: later draws of the step follow these.
    where = _pair_points(mask_logits, matches, points, keep, config, own, generator)
    if matches.query.shape[1] == 0:
        # Zero, but attached: every mask head gets a gradient on every worker, which DDP needs.
        mask_sum = dice_sum = sum((logits.flatten()[:1].float().sum() * 0 for logits in mask_logits), mask_sum)
    else:
        masks = _in_one([t.masks if config.soft_targets in ("off", "class") else mask_targets(t) for t in targets])
        for layer, logits in enumerate(mask_logits):
            mask, dice = _mask_sums(logits, masks, torch.cat(weights), matches, layer, where[layer], keep)
            mask_sum, dice_sum = mask_sum + mask, dice_sum + dice
    count = class_count.new_tensor([len(w) for w in weights])
    return {"class": (class_sum, class_count), "mask": (mask_sum, count), "dice": (dice_sum, count)}


def target_weights(targets: Sequence[Targets], config: LossConfig) -> list[Tensor]:
    """Weight of each instance, float32 [N] of each image: the target's own if `pseudo_weighting` is "score", else 1."""
    return [t.weights.float() if config.pseudo_weighting == "score" else torch.ones_like(t.weights) for t in targets]


def _in_one(masks: Sequence[Tensor]) -> Tensor:
    """Masks of all images as one tensor, without a copy where they are parts of one, as `to_batch` makes them."""
    parts = [part for part in masks if len(part)]
    first = parts[0]
    offset = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != offset or not part.is_contiguous() or part.dtype != first.dtype:
            return torch.cat(parts)
        offset += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _uniform(*shape: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Points in [-1, 1], float32 [*shape, 2]."""
    return torch.empty(*shape, 2, device=like.device).uniform_(-1, 1, generator=generator)


def _draw_match_points(
    predictions: Predictions, config: LossConfig, joint: JointStep, generator: torch.Generator | None
) -> Tensor:
    """The matcher's random points, fresh for each layer and image; see `LossPoints.match`."""
    logits = predictions.class_logits
    shape = (len(logits), config.num_points) if config.exact else (1, max(1, config.num_points // 4))
    drawn = _uniform(shape[0], joint.num_joint, shape[1], like=logits[0], generator=generator)
    return drawn if joint.size == 1 else drawn[:, joint.rows]


@dataclass(frozen=True)
class _OwnPairs:
    """places: int64 [K], of this worker's pairs among those of all workers, rising; num_joint: how many all have."""

    places: np.ndarray
    num_joint: int

    def of(self, drawn: Tensor, pairs: slice, start: int = 0) -> Tensor:
        """What was drawn for some of this worker's pairs, of draws for all workers' pairs from `start` on."""
        places = self.places[pairs] - start
        return drawn if len(places) == len(drawn) else drawn[torch.from_numpy(places).to(drawn.device)]


def _own_pairs(counts: Sequence[int], joint: JointStep, are_alone: bool, device: torch.device) -> _OwnPairs:
    """Where the pairs of this worker's images, so many of each, stand among those of all workers.

    Args:
        are_alone: nothing is drawn, so that the other workers need not be asked.
    """
    if are_alone or joint.size == 1 or not counts:
        return _OwnPairs(np.arange(sum(counts)), sum(counts))
    of_all = joint.joint_counts(counts, device)
    is_own = np.isin(np.arange(len(of_all)), joint.rows)
    return _OwnPairs(np.flatnonzero(np.repeat(is_own, of_all)), int(of_all.sum()))


def _pair_points(
    mask_logits: Sequence[Tensor],
    matches: QueryMatches,
    points: LossPoints | None,
    keep: Tensor | None,
    config: LossConfig,
    own: _OwnPairs,
    generator: torch.Generator | None,
) -> Tensor:
    """Where each layer compares the masks of its pairs, float32 [L, K, P, 2]: uncertain points, then uniform ones.

    The candidates of a few pairs exist at a time: those of all layers would take more memory than all the rest. They
    are drawn in the same order as if they were drawn together, for the pairs of all workers.
    """
    num_candidates, num_uncertain = _point_counts(config)
    num_layers, num_pairs = matches.query.shape
    where = torch.empty(num_layers, num_pairs, config.num_points, 2, device=mask_logits[0].device)
    at_a_time = _pairs_at_a_time(where, num_candidates)
    for layer, logits in enumerate(mask_logits if num_uncertain else ()):
        for start in range(0, own.num_joint, at_a_time):
            stop = min(start + at_a_time, own.num_joint)
            pairs = slice(*np.searchsorted(own.places, (start, stop)).tolist())
            if points is None:
                drawn = _uniform(stop - start, num_candidates, like=where, generator=generator)
                candidates = own.of(drawn, pairs, start)
            else:
                candidates = points.candidates[layer, pairs]
            if pairs.start == pairs.stop:
                continue
            query, image = matches.query[layer, pairs], matches.image[pairs]
            values = logits.detach().flatten(0, 1).index_select(0, query)
            where[layer, pairs, :num_uncertain] = _uncertain_points(values, image, candidates, keep, num_uncertain)
    for layer in range(num_layers):
        uniform = where[layer, :, num_uncertain:]
        if points is None:
            drawn = _uniform(own.num_joint, uniform.shape[1], like=where, generator=generator)
            uniform.copy_(own.of(drawn, slice(None)))
        else:
            uniform.copy_(points.uniform[layer])
    return where


def _pairs_at_a_time(on: Tensor, num_points: int) -> int:
    return max(1, _SAMPLES_AT_A_TIME.get(on.device.type, 2**22) // max(1, num_points))


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
    where: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted point-sampled BCE and dice of one layer's pairs, added up by image: [B] each."""
    num_images = logits.shape[0]
    at_a_time = _pairs_at_a_time(where, where.shape[1])
    sampled = _SampleRows.apply(logits.flatten(0, 1), matches.query[layer], where, at_a_time)
    losses: list[Tensor] = []
    for values, target, image, points in zip(
        *(t.split(at_a_time) for t in (sampled, matches.target[layer], matches.image, where))
    ):
        kept = None if keep is None else sample_kept(keep, image, points).float()
        losses.append(torch.stack(mask_terms(values, sample_masks(masks, target, points), kept)))
    by_pair = torch.cat(losses, dim=1) * weights[matches.target[layer]]
    mask_sum, dice_sum = by_pair.new_zeros(2, num_images).index_add(1, matches.image, by_pair)
    return mask_sum, dice_sum


class _SampleRows(torch.autograd.Function):
    """`sample_maps(rows[index], points)` for distinct indices, a few rows at a time.

    Autograd would keep the rows that were taken, of every layer, until the backward pass: here they are taken again.
    The gradient of the rows that were not taken is memory that is never touched.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, points: Tensor, at_a_time: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, index, points)
        ctx.at_a_time = at_a_time
        pieces = zip(index.split(at_a_time), points.split(at_a_time))
        return torch.cat([sample_maps(rows.index_select(0, i), p) for i, p in pieces])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        rows, index, points = ctx.saved_tensors
        grad_rows = _untouched_zeros(rows.shape, rows)
        for i, p, g in zip(*(t.split(ctx.at_a_time) for t in (index, points, grad))):
            taken = rows.index_select(0, i).float()
            # What autograd calls for the `grid_sample` of `sample_maps`: bilinear, zeros outside, corners not aligned.
            grad_maps, _ = torch.ops.aten.grid_sampler_2d_backward(
                g[:, None, :, None], taken[:, None], p[:, :, None], 0, 0, False, [True, False]
            )
            grad_rows.index_copy_(0, i, grad_maps[:, 0].to(rows.dtype))
        return grad_rows, None, None, None


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
    logits: Tensor, image: Tensor, candidates: Tensor, keep: Tensor | None, num_uncertain: int
) -> Tensor:
    """Returns the candidates whose logits are nearest 0, [K, num_uncertain, 2]; excluded pixels come last."""
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
