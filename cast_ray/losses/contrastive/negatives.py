"""Which pixels may be negatives of which, and how R of them are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cast_ray.losses.joint_step import JointStep
from cast_ray.recipe import ContrastiveConfig

# Inner products of unit vectors carry float32 rounding of about 1e-7: below this a dissimilarity is none.
_LEAST_WEIGHT = 1e-5
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class PixelSet:
    """Pixels of feature maps, all without gradients; leading dimensions [...] are shared by all fields.

    pixel: int64, image number (over all workers) * h w + location. share: float32, how many pixels of the batch this
    one stands for (0 on padding). mask_part: float32 [..., Q], class_part: float32 [..., C+1], the two parts of y~
    (absent: last size 0). instance, category: int64 truth, -1 unknown, as in `Batch`.
    """

    pixel: Tensor
    share: Tensor
    mask_part: Tensor
    class_part: Tensor
    instance: Tensor
    category: Tensor

    def __getitem__(self, index: Any) -> PixelSet:
        return PixelSet(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def at(self, location: Tensor) -> PixelSet:
        """The pixels [B, n] at the given locations of each image, int64 [B, n], of a set [B, h w]."""
        taken = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            index = location if value.dim() == 2 else location[..., None].expand(-1, -1, value.shape[-1])
            taken[name] = value.gather(1, index)
        return PixelSet(**taken)

    def flat(self) -> PixelSet:
        """Returns the same pixels with the first two dimensions joined."""
        return PixelSet(*(getattr(self, name).flatten(0, 1) for name in self.__dataclass_fields__))

    def unflatten(self, num_images: int) -> PixelSet:
        """The inverse of `flat`."""
        return PixelSet(*(getattr(self, name).unflatten(0, (num_images, -1)) for name in self.__dataclass_fields__))


def describe_pixels(
    mask_logits: Tensor,
    class_logits: Tensor,
    valid: Tensor,
    truth: tuple[Tensor, Tensor] | None,
    size: tuple[int, int],
    joint: JointStep,
    config: ContrastiveConfig,
) -> PixelSet:
    """Everything the samplers know about the h w feature pixels of each image.

    P_m[b,k,p] = softmax_k of the mask logits (bilinearly resized to h x w), P_c[b,k,c] = softmax_c of the class logits,
    F_c[b,p,c] = sum_k P_m[b,k,p] P_c[b,k,c]; y is P_m (`mask`), F_c (`class`) or [P_m || F_c] (`fusion`);
    y~ = y / |y|_2 (`l2`) or y / sum(y) (`sum`). Padding and truth are read at the feature pixel's centre.

    Args:
        mask_logits: [B, Q, H/4, W/4], the final layer's; class_logits: [B, Q, C+1]. Both are detached.
        valid: bool [B, H, W]; truth: instance and class, int16 [B, H, W] each; None: unknown everywhere.
        size: (h, w).
        joint: the step, which numbers this worker's images among those of all.

    Returns:
        A set with leading dimensions [B, h w].
    """
    num_images, (height, width) = mask_logits.shape[0], size
    device = mask_logits.device
    number = torch.arange(height * width, device=device)
    pixel = torch.tensor(joint.rows, device=device)[:, None] * (height * width) + number
    nothing = torch.zeros((num_images, height * width, 0), device=device)
    mask_part = class_part = nothing
    if config.sampler in ("mask", "class", "fusion"):
        probs_m, probs_f = pseudo_probabilities(mask_logits, class_logits, size)
        mask_part = probs_m if config.sampler != "class" else nothing
        class_part = probs_f if config.sampler != "mask" else nothing
        if config.normalise == "l2":
            norm = (mask_part.square().sum(-1, keepdim=True) + class_part.square().sum(-1, keepdim=True)).sqrt()
        else:
            norm = mask_part.sum(-1, keepdim=True) + class_part.sum(-1, keepdim=True)
        mask_part, class_part = mask_part / norm, class_part / norm
    unknown = torch.full_like(pixel, -1)
    instance, category = (unknown, unknown) if truth is None else (at_centres(t, size).long() for t in truth)
    return PixelSet(pixel, at_centres(valid, size).float(), mask_part, class_part, instance, category)


@torch.no_grad()
def pseudo_probabilities(mask_logits: Tensor, class_logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(P_m [B, h w, Q], F_c [B, h w, C+1]) in float32, without gradients; see `describe_pixels`."""
    resized = F.interpolate(mask_logits.detach().float(), size=size, mode="bilinear", align_corners=False)
    probs_m = resized.flatten(2).softmax(dim=1).transpose(1, 2)
    return probs_m, probs_m @ class_logits.detach().float().softmax(dim=-1)


def at_centres(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] of any type read at the centres of an h x w grid: [B, h w]."""
    rows = ((torch.arange(size[0], device=maps.device) + 0.5) * (maps.shape[1] / size[0])).long()
    columns = ((torch.arange(size[1], device=maps.device) + 0.5) * (maps.shape[2] / size[1])).long()
    return maps[:, rows][:, :, columns].flatten(1)


def draw_pixels(
    valid: Tensor, count: int | None, generator: torch.Generator | None, joint: JointStep | None = None
) -> Tensor:
    """`count` distinct locations of each image, uniform over its valid pixels; invalid ones only when those run out.

    Args:
        valid: bool [B, n]; count: at least 1; None: all; joint: the step of the images, None: they are all of it.

    Returns:
        int64 [B, min(count, n)]; all locations in order when count >= n.
    """
    if count is None or count >= valid.shape[1]:
        return torch.arange(valid.shape[1], device=valid.device).expand(valid.shape[0], -1)
    joint = joint or JointStep(0, len(valid))
    keys = joint.rand(valid.shape[1], device=valid.device, generator=generator) + (~valid)
    return keys.topk(count, dim=1, largest=False, sorted=False).indices


def stand_for_all(pool: PixelSet, all_pixels: PixelSet) -> PixelSet:
    """The pool [B, n] with `share` = (valid pixels of its image) / (valid pixels drawn there)."""
    drawn, present = pool.share.sum(1, keepdim=True), all_pixels.share.sum(1, keepdim=True)
    return replace(pool, share=pool.share * present / drawn.clamp(min=1))


def own_columns(matrix: Tensor, own: slice | None) -> Tensor:
    """The columns of each image's own candidates: a view [g, n, m] of [g, n, M].

    Args:
        own: the g m columns of the g images, image by image; None: a row has no others (m = M).
    """
    if own is None:
        return matrix
    blocks = matrix[..., own].unflatten(2, (matrix.shape[0], -1))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


@torch.no_grad()
def candidate_weights(anchors: PixelSet, pool: PixelSet, own: slice | None, config: ContrastiveConfig) -> Tensor:
    """Unnormalised probability with which each candidate is a negative of each anchor of g images.

    weight[a, q] = s_deb(a, q) * share(q), s_deb = max(0, 1 - <y~_a, y~_q>); `uniform`: s_deb = 1; `oracle`: s_deb = 1
    where both truths are known and the pixels do not lie in the same instance or both on background, else 0. An
    anchor is never its own negative; `config.scope` removes the anchor's image or all others.

    Across images query slots are not aligned, so P_m says nothing there: the slots of different images count as
    different (their inner product is 0), as if y had B * Q slots. Hence across images `mask` is uniform; `fusion` takes
    <F_c, F_c'> over the norms of the whole y, so that a pixel of the same class in another image weighs as
    much as one of the same class but another instance in the same image.

    Args:
        anchors: [g, n] pixels of g images. pool: [M] candidates of all, or [g, m] of each image. own: columns of the
            g images in a common pool, see `own_columns`.

    Returns:
        float32 [g, n, M], >= 0; weights below 1e-5 are 0.
    """
    num_images = anchors.pixel.shape[0]
    mine = pool if own is None else pool[own].unflatten(num_images)
    share = pool.share.unsqueeze(-2)
    if config.sampler == "uniform":
        weights = share.expand(*anchors.pixel.shape, -1).clone()
    elif config.sampler == "oracle":
        first, second = anchors.instance[..., None], pool.instance.unsqueeze(-2)
        different = (first >= 0) & (second >= 0) & ((first > 0) | (second > 0))
        own_columns(different, own).logical_and_(first != mine.instance[:, None])
        weights = different * share
    else:
        weights = 1 - anchors.class_part @ pool.class_part.mT  # all 1 where the class part is absent
        if config.sampler != "class" and config.scope != "cross-image":
            own_columns(weights, own).sub_(anchors.mask_part @ mine.mask_part.mT)
        weights = F.threshold(weights, _LEAST_WEIGHT, 0.0, inplace=True).mul_(share)
    if config.scope == "cross-image":
        own_columns(weights, own).zero_()
    else:
        own_columns(weights, own).masked_fill_(anchors.pixel[..., None] == mine.pixel[:, None], 0)
    return weights


@torch.no_grad()
def negative_counts(weights: Tensor, config: ContrastiveConfig, rand: Callable[[int], Tensor]) -> Tensor:
    """How often each candidate is a negative of each anchor, R times in all, in proportion to its weight.

    `expectation`: R w_q, w = weights / their sum: the mean of the draws. `sampled` with replacement: systematic draws,
    the candidates under R equally spaced points of the cumulated weights, with one random start for each anchor. Each
    is drawn R w_q times in the mean, as by R independent draws, but always less than one draw away from that. `sampled`
    without replacement: Gumbel top-k, R distinct candidates, or as many as have a weight.

    Args:
        weights: float32 [..., M], >= 0; a row of zeros has no negative.
        rand: draws uniform random numbers, so many for each row: float32 [..., count].

    Returns:
        float32 [..., M], c_q >= 0; rows sum to R (without replacement to at most R), or to 0.
    """
    r = config.num_negatives
    if config.estimator == "expectation":
        return weights / (weights.sum(-1, keepdim=True) / r).clamp(min=TINY)
    if not config.replacement:
        # The largest log(u) / w of uniform u, which has the law of the largest log w + Gumbel noise.
        keys = rand(weights.shape[-1]).log_().div_(weights)
        taken = keys.topk(min(r, weights.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(weights).scatter_(-1, taken, 1.0) * (weights > 0)
    reached = weights.cumsum(-1)
    total = reached[..., -1:].clone()
    start = rand(1)
    # Divided first: the last point is then R exactly, and candidates without weight behind it are not reached.
    reached.div_(total.clamp(min=TINY)).mul_(r).add_(start).floor_()
    counts = reached.clone()
    counts[..., 1:].sub_(reached[..., :-1])
    return counts.mul_(total > 0)
