"""Anchors, positives and the candidates for negatives: which pixels a step contrasts, drawn and gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cast_ray.losses.contrastive.negatives import PixelSet, describe_pixels, draw_pixels, stand_for_all
from cast_ray.losses.joint_step import JointStep
from cast_ray.recipe import ContrastiveConfig


@dataclass(frozen=True, eq=False)
class PixelViews:
    """The two views of a batch and what is known about its pixels: the input of every contrastive loss.

    z_weak, z_strong: float [B, D, h, w] of unit length along D. mask_logits: [B, Q, H/4, W/4] and class_logits:
    [B, Q, C+1], the final layer's. valid: bool [B, H, W], False on padding. truth_instance, truth_class: int16
    [B, H, W] as in `Batch`.

    Raises:
        ValueError: the views differ in shape, or the batch size differs between the fields.
    """

    z_weak: Tensor
    z_strong: Tensor
    mask_logits: Tensor
    class_logits: Tensor
    valid: Tensor
    truth_instance: Tensor
    truth_class: Tensor

    def __post_init__(self) -> None:
        if self.z_weak.shape != self.z_strong.shape or self.z_weak.dim() != 4:
            raise ValueError(
                f"contrastive loss: expected two views [B, D, h, w] of one shape, got {tuple(self.z_weak.shape)} and "
                f"{tuple(self.z_strong.shape)}"
            )
        known = (self.mask_logits, self.class_logits, self.valid, self.truth_instance, self.truth_class)
        batch_sizes = {tensor.shape[0] for tensor in known}
        if batch_sizes != {len(self.z_weak)}:
            raise ValueError(f"contrastive loss: expected batches of {len(self.z_weak)}, got {sorted(batch_sizes)}")

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Height and width of the feature map: h, w."""
        return self.z_weak.shape[2], self.z_weak.shape[3]


@dataclass(frozen=True)
class PixelProblem:
    """Anchors and positives [B, N, D], candidates [M, D] and what is known about each pixel.

    joint: the step of the anchors' images; places: of each of these images among those that gave candidates; per_image:
    candidates that each image gave, image by image.
    """

    anchors: Tensor
    positives: Tensor
    candidates: Tensor
    anchor_pixels: PixelSet
    pool: PixelSet
    joint: JointStep
    places: list[int]
    per_image: int


def pose_problem(
    views: PixelViews,
    config: ContrastiveConfig,
    generator: torch.Generator | None,
    joint: JointStep,
    is_gathered: bool,
    negatives_from: Literal["weak", "strong"],
    with_truth: bool,
) -> PixelProblem:
    """Draws anchors and the candidate pool (stratified over images, uniform within each) and gathers the pool.

    Each image gives min(num_anchors, h w) anchors and min(pool_size // B, h w) candidates, where B images share the
    pool: those of all workers if `is_gathered`, else of this one; with `scope=same-image` min(pool_size, h w). A
    candidate carries the number of pixels it stands for, so the pool is a self-normalised importance approximation of
    all pixels of the batch, and exact when it holds them all.
    """
    truth = (views.truth_instance, views.truth_class) if with_truth else None
    pixels = describe_pixels(views.mask_logits, views.class_logits, views.valid, truth, views.grid_hw, joint, config)
    inside = pixels.share > 0
    anchor_at = draw_pixels(inside, config.num_anchors, generator, joint)
    per_image = config.pool_size
    if per_image is not None and config.scope != "same-image":
        per_image = max(1, per_image // (joint.num_joint if is_gathered else joint.num_images))
    pool_at = draw_pixels(inside, per_image, generator, joint)
    pool = stand_for_all(pixels.at(pool_at), pixels).flat()
    anchors, positives, candidates = _take_all(views.z_weak, views.z_strong, anchor_at, pool_at, negatives_from)
    places = list(range(joint.num_images))
    if is_gathered and config.scope != "same-image":
        places = joint.rows
        candidates, pool = joint.join(candidates), _gather_pixels(pool, joint)
    return PixelProblem(
        anchors=anchors,
        positives=positives,
        candidates=candidates,
        anchor_pixels=pixels.at(anchor_at),
        pool=pool,
        joint=joint,
        places=places,
        per_image=pool_at.shape[1],
    )


def _take_all(
    z_weak: Tensor, z_strong: Tensor, anchor_at: Tensor, pool_at: Tensor, negatives_from: Literal["weak", "strong"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and positives [B, N, D] and candidates [B m, D]; one selection of each view, so one gradient of its size.

    Whole vectors are read and written, not D distant numbers: views that are channels last in memory are not copied.
    """
    weak, strong = (z.float().permute(0, 2, 3, 1).flatten(1, 2) for z in (z_weak, z_strong))
    num_anchors = anchor_at.shape[1]
    both = torch.cat([anchor_at, pool_at], dim=1)
    first = _take(weak, both if negatives_from == "weak" else anchor_at)
    second = _take(strong, anchor_at if negatives_from == "weak" else both)
    candidates = (first if negatives_from == "weak" else second)[:, num_anchors:]
    return first[:, :num_anchors], second[:, :num_anchors], candidates.flatten(0, 1)


def _take(rows: Tensor, location: Tensor) -> Tensor:
    """The vectors [B, n, D] of [B, h w, D] at locations int64 [B, n]."""
    num_images, num_pixels, dim = rows.shape
    first = torch.arange(num_images, device=rows.device)[:, None] * num_pixels
    return rows.reshape(-1, dim).index_select(0, (first + location).flatten()).view(num_images, -1, dim)


def _gather_pixels(pool: PixelSet, joint: JointStep) -> PixelSet:
    """The pool of all workers. P_m stays here, zeros elsewhere: other images' slots are not compared."""
    numbers = joint.join(torch.stack([pool.pixel, pool.instance, pool.category], dim=1))
    values = joint.join(torch.cat([pool.share[:, None], pool.class_part], dim=1))
    mask_part = pool.mask_part.new_zeros((len(numbers), pool.mask_part.shape[1]))
    mask_part.unflatten(0, (joint.num_joint, -1))[joint.rows] = pool.mask_part.unflatten(0, (joint.num_images, -1))
    return PixelSet(numbers[:, 0], values[:, 0], mask_part, values[:, 1:], numbers[:, 1], numbers[:, 2])
