"""Hungarian matching of every decoder layer at once, with one device-to-host copy per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cast_ray.contracts.records import Targets
from cast_ray.recipe import LossConfig

_LARGEST_LOG = 87.0
_PIXELS_IN_CACHE = 4096
_SAMPLES_AT_A_TIME = {"cpu": 2**18}  # queries x points of the layers that are compared together (else 2**24)
_PIXELS_AT_A_TIME = 2**22  # of masks that exist as floats together: 8 masks of 512x1024


@dataclass(frozen=True)
class QueryMatches:
    """Matched pairs of L layers; K = sum over images of min(Q, N_b) pairs in each.

    query: int64 [L, K], index into the flattened [B * Q] queries; rows run image by image, queries rising.
    target: int64 [L, K], index into all targets of the batch, concatenated in image order.
    image: int64 [K], image of each pair (the same for every layer).
    """

    query: Tensor
    target: Tensor
    image: Tensor


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps at points.

    Args:
        maps: float or bool [K, h, w]; read as float32 (half-precision coordinates would miss pixels).
        points: float32 [K or 1, P, 2], (x, y) in [-1, 1] from edge to edge; one row serves every map.

    Returns:
        float32 [K, P]; zero outside the map, as in `align_corners=False` sampling of Mask2Former.

    Source: PointRend's `point_sample`, whose points lie in [0, 1] and are moved to [-1, 1] at each call.
    """
    together = 1
    if len(points) == 1 and maps.device.type == "cpu" and len(maps):
        # As channels of one image, so that a point's place is found once for several maps that fit the cache.
        together = max(n for n in range(1, 11) if len(maps) % n == 0)
    grid = points.unsqueeze(2).expand(len(maps) // together, -1, -1, -1)
    return F.grid_sample(maps.float().unflatten(0, (-1, together)), grid, align_corners=False)[..., 0].flatten(0, 1)


def sample_masks(masks: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of `masks[index]` at points, see `sample_maps`.

    Only a few masks at a time are copied and turned into floats, which takes four bytes a pixel.

    Args:
        masks: bool or float [N, H, W].
        index: int64 [K].
        points: float32 [K, P, 2].

    Returns:
        float32 [K, P].
    """
    at_a_time = _masks_at_a_time(masks)
    pieces = [sample_maps(masks[i], p) for i, p in zip(index.split(at_a_time), points.split(at_a_time))]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def mask_parts(masks: Tensor) -> tuple[Tensor, ...]:
    """Masks [N, H, W] in parts of few enough pixels to exist as floats; views, one part at least."""
    return masks.split(_masks_at_a_time(masks))


def _masks_at_a_time(masks: Tensor) -> int:
    return max(1, _PIXELS_AT_A_TIME // max(1, math.prod(masks.shape[-2:])))


def sample_kept(keep: Tensor, image: Tensor, points: Tensor) -> Tensor:
    """Whether the pixel under each point takes part in the mask losses.

    Args:
        keep: bool [B, H, W].
        image: int64 [K], row of `keep` for each point set.
        points: float32 [K, P, 2], (x, y) in [-1, 1] from edge to edge.

    Returns:
        bool [K, P].
    """
    height, width = keep.shape[-2:]
    column = ((points[..., 0] + 1) * (width / 2)).long().clamp_(0, width - 1)
    row = ((points[..., 1] + 1) * (height / 2)).long().clamp_(0, height - 1)
    return keep.flatten()[(image[:, None] * height + row) * width + column]


def kept_pixels(targets: Sequence[Targets], valid: Tensor | None) -> Tensor | None:
    """Pixels inside the image and outside ignore regions, bool [B, H, W]; None when that is known to be all."""
    if valid is None and all(t.ignore is None for t in targets):
        return None
    keep = []
    for i, target in enumerate(targets):
        inside = torch.ones_like(target.ignore) if valid is None and target.ignore is not None else None
        inside = valid[i] if valid is not None else inside
        if inside is None:
            shape = next(t.ignore.shape for t in targets if t.ignore is not None)
            inside = torch.ones(shape, dtype=torch.bool, device=target.labels.device)
        keep.append(inside if target.ignore is None else inside & ~target.ignore)
    return torch.stack(keep)


@torch.no_grad()
def match_layers(
    class_logits: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    targets: Sequence[Targets],
    config: LossConfig,
    points: Tensor,
    keep: Tensor | None = None,
) -> QueryMatches:
    """Assigns queries to targets in every decoder layer, minimising the matching cost.

    cost[k, n] = -cost_class * P_c[k, label_n] + cost_mask * BCE(m_k, g_n) + cost_dice * dice(m_k, g_n), the mask
    terms at P sampled points. With BCE(x, t) = softplus(x) - x t, both mask terms are matrix products, for each image
    batched over as many layers as fit the cache. All costs, the labels and the emptiness of the masks reach the host in
    a single copy.

    Args:
        class_logits: L tensors [B, Q, C+1].
        mask_logits: L tensors [B, Q, h, w].
        targets: B targets; an image without instances takes no query.
        config: the costs' weights.
        points: float32 [L or 1, B, P, 2], (x, y) in [-1, 1]; one row serves every layer.
        keep: bool [B, H, W], False where masks are not compared; None: everywhere.

    Raises:
        ValueError: a label outside 0..C-1, a mask without a pixel, or a cost that is not finite (with layer and image).

    Source: Mask2Former (arXiv 2112.01527), `HungarianMatcher`; transformers `Mask2FormerHungarianMatcher`.
    Deviations: transformers replaces costs that are not finite by the largest float and trains on; here they are an
    error.
    """
    num_layers, (num_queries, num_outputs) = len(class_logits), class_logits[0].shape[1:]
    if points.device.type == "cpu":
        points = _in_reading_order(points, mask_logits[0].shape[-2:])
    kept = None
    if keep is not None:
        images = torch.arange(len(targets), device=points.device).repeat(len(points))
        kept = sample_kept(keep, images, points.flatten(0, 1)).float().view(points.shape[:-1])
    limit = _SAMPLES_AT_A_TIME.get(points.device.type, 2**24)
    together = max(1, limit // (num_queries * points.shape[2]))
    blocks: list[tuple[int, int, int]] = []  # (image, layer, N_b)
    pieces: list[Tensor] = []
    for image, target in enumerate(targets):
        count = target.labels.shape[0]
        if count == 0:
            continue
        labels = target.labels.clamp(0, num_outputs - 1)
        where = points[:, image]
        truth = _counted_masks(target.masks, where, None if kept is None else kept[:, image])
        truth, where = (t.expand(num_layers, -1, -1) for t in (truth, where))
        for start in range(0, num_layers, together):
            layers = range(start, min(start + together, num_layers))
            logits = where.new_empty(len(layers), num_queries, where.shape[1])
            for sampled, layer in zip(logits, layers):
                sampled.copy_(sample_maps(mask_logits[layer][image], where[layer][None]))
            probs = torch.stack([class_logits[layer][image] for layer in layers]).float().softmax(-1)
            cost = _pairwise_mask_cost(logits, truth[start : start + together], config)
            pieces.append((cost - config.cost_class * probs[..., labels]).flatten())
            blocks += [(image, layer, count) for layer in layers]
    device = class_logits[0].device
    if not blocks:
        none = torch.zeros((num_layers, 0), dtype=torch.int64, device=device)
        return QueryMatches(none, none, none[0])

    sizes = [num_queries * count for _, _, count in blocks]
    pieces += [torch.cat([t.labels for t in targets]).float()]
    pieces += [t.masks.flatten(1).any(1).float() for t in targets]
    host = torch.cat(pieces).cpu().numpy()  # the step's only device-to-host copy
    _refuse_bad_targets(host[sum(sizes) :], targets, num_outputs - 1)
    return _assign(
        np.split(host[: sum(sizes)], np.cumsum(sizes)[:-1]), blocks, targets, num_layers, num_queries, device
    )


def _in_reading_order(points: Tensor, size: Sequence[int]) -> Tensor:
    """Each set of points row by row of a map: costs are sums over them, and neighbours share the cache (half the time).

    Maps that fit the first cache as a whole are left alone.
    """
    height, width = size
    if height * width <= _PIXELS_IN_CACHE:
        return points
    column, row = (((points[..., i] + 1) * (side / 2)).to(torch.int32) for i, side in enumerate((width, height)))
    order = torch.from_numpy(np.argsort((row * width + column).numpy(), axis=-1))
    return points.gather(-2, order[..., None].expand(*order.shape, 2))


def _counted_masks(masks: Tensor, points: Tensor, kept: Tensor | None) -> Tensor:
    """Masks of one image at the points of every layer, and as their last row whether a point counts.

    Every mask is read once for all layers, because its copy in floats is what costs memory.

    Args:
        masks: bool [N, H, W].
        points: [l, P, 2], l rows of points.
        kept: float32 [l, P], 1 where a point counts; None: everywhere.

    Returns:
        float32 [l, N + 1, P]; the masks are 0 at points that do not count.
    """
    num_sets, num_points = points.shape[:2]
    rows = points.new_empty(len(masks) + 1, num_sets, num_points)
    torch.cat([sample_maps(part, points.flatten(0, 1)[None]) for part in mask_parts(masks)], out=rows[:-1].flatten(1))
    if kept is None:
        rows[-1] = 1
    else:
        rows[:-1].mul_(kept)
        rows[-1] = kept
    return rows.transpose(0, 1)


def _pairwise_mask_cost(logits: Tensor, rows: Tensor, config: LossConfig) -> Tensor:
    """cost_mask * BCE + cost_dice * dice of [l, Q, P] logits, which are overwritten, against N masks: [l, Q, N].

    One pass over the logits: with n = sigmoid(-x), softplus(x) = -log n (capped at 87, where float32 ends) and
    sigmoid(x) = 1 - n, which only enters sums.

    Args:
        rows: float32 [l, N + 1, P], see `_counted_masks`.
    """
    truth, weight = rows[:, :-1], rows[:, -1:]
    num_points = weight.sum(-1, keepdim=True)
    overlap = (truth @ logits.mT).mT  # this way round the few rows cost half
    complement = logits.neg_().sigmoid_()
    missed = (rows @ complement.mT).mT
    area = truth.sum(-1)[:, None]
    dice = 1 - (2 * (area - missed[..., :-1]) + 1) / (num_points - missed[..., -1:] + area + 1)
    negative = (weight @ complement.log_().clamp_(min=-_LARGEST_LOG).mT).mT
    cross_entropy = -(negative + overlap) / (num_points + (num_points == 0))
    return config.cost_mask * cross_entropy + config.cost_dice * dice


def _refuse_bad_targets(flat: np.ndarray, targets: Sequence[Targets], num_classes: int) -> None:
    """Raises for a label out of range or an empty mask; flat: all labels, then whether each mask has a pixel."""
    counts = [t.labels.shape[0] for t in targets]
    by_image = (np.split(part, np.cumsum(counts)[:-1]) for part in np.split(flat, 2))
    for image, (labels, filled) in enumerate(zip(*by_image)):
        if bad := [int(v) for v in labels if not 0 <= v < num_classes]:
            raise ValueError(
                f"targets of image {image}: expected labels in 0..{num_classes - 1} "
                f"({num_classes} is no-object), got {bad[0]}"
            )
        if not filled.all():
            raise ValueError(
                f"targets of image {image}: expected masks with at least one pixel, got an empty mask at instance "
                f"{int(np.flatnonzero(filled == 0)[0])} (drop instances that a crop removes)"
            )


def _assign(
    costs: list[np.ndarray],
    blocks: list[tuple[int, int, int]],
    targets: Sequence[Targets],
    num_layers: int,
    num_queries: int,
    device: torch.device,
) -> QueryMatches:
    first_target = np.cumsum([0] + [t.labels.shape[0] for t in targets])
    query: list[list[np.ndarray]] = [[] for _ in range(num_layers)]
    target: list[list[np.ndarray]] = [[] for _ in range(num_layers)]
    image_of: list[np.ndarray] = []
    for cost, (image, layer, count) in zip(costs, blocks):
        if not np.isfinite(cost).all():
            raise ValueError(
                f"predictions of decoder layer {layer}, image {image}: expected finite logits, got a matching "
                "cost that is NaN or infinite (training has diverged: lower the learning rate or check the input)"
            )
        rows, columns = linear_sum_assignment(cost.reshape(num_queries, count))
        query[layer].append(image * num_queries + rows)
        target[layer].append(first_target[image] + columns)
        if layer == 0:
            image_of.append(np.full(len(rows), image))
    stacked = np.stack(
        [*(np.concatenate(q) for q in query), *(np.concatenate(t) for t in target), np.concatenate(image_of)]
    ).astype(np.int64)
    moved = torch.from_numpy(stacked).to(device, non_blocking=True)
    return QueryMatches(moved[:num_layers], moved[num_layers:-1], moved[-1])
