"""One anchor against one positive and R negatives, summed over anchors in pieces that bound the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cast_ray.losses.negatives import (
    TINY,
    PixelSet,
    candidate_weights,
    describe_pixels,
    draw_pixels,
    negative_counts,
    stand_for_all,
)
from cast_ray.recipe import ContrastiveConfig

_PAIRS_AT_A_TIME = {"cpu": 2**19, "cuda": 2**24}  # anchors x candidates: a cache-sized piece, a launch-bound one
NUM_STATS = 9


class Gather(Protocol):
    """Concatenates equal-sized tensors of all workers along dim 0 in rank order; gradients flow back to each."""

    rank: int

    def __call__(self, tensor: Tensor) -> Tensor: ...


@dataclass
class ContrastiveOutput:
    """sum over this worker's anchors and their count (0-d float32), and diagnostics (0-d, no gradients)."""

    sum: Tensor
    count: Tensor
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PixelProblem:
    """Anchors [B, D, N], positives [B, D, N], candidate vectors [M, D] and what is known about each pixel.

    own: columns of the candidates that image b contributed.
    """

    anchors: Tensor
    positives: Tensor
    candidates: Tensor
    anchor_pixels: PixelSet
    pool: PixelSet
    own: tuple[slice, ...]


def pose_problem(
    z_weak: Tensor,
    z_strong: Tensor,
    mask_logits: Tensor,
    class_logits: Tensor,
    valid: Tensor,
    truth_instance: Tensor,
    truth_class: Tensor,
    config: ContrastiveConfig,
    generator: torch.Generator | None,
    gather: Gather | None,
    negatives_from: Tensor,
) -> PixelProblem:
    """Draws anchors and the candidate pool (stratified over images, uniform within each) and gathers the pool.

    Each image gives min(num_anchors, h w) anchors and min(pool_size // B, h w) candidates, with `scope=same-image`
    min(pool_size, h w). A candidate carries the number of pixels it stands for, so the pool is a self-normalised
    importance approximation of all pixels of the batch, and exact when it holds them all.

    Raises:
        ValueError: views of different shape or a batch size that differs between the arguments.
    """
    if z_weak.shape != z_strong.shape or z_weak.dim() != 4:
        raise ValueError(
            f"contrastive loss: expected two views [B, D, h, w] of one shape, got {tuple(z_weak.shape)} and "
            f"{tuple(z_strong.shape)}"
        )
    num_images, dim, height, width = z_weak.shape
    batch_sizes = {t.shape[0] for t in (mask_logits, class_logits, valid, truth_instance, truth_class)}
    if batch_sizes != {num_images}:
        raise ValueError(f"contrastive loss: expected batches of {num_images}, got {sorted(batch_sizes)}")
    rank = 0 if gather is None else gather.rank
    pixels = describe_pixels(
        mask_logits, class_logits, valid, truth_instance, truth_class, (height, width), rank * num_images, config
    )
    inside = pixels.share > 0
    anchor_at = draw_pixels(inside, config.num_anchors, generator)
    per_image = config.pool_size if config.scope == "same-image" else max(1, config.pool_size // num_images)
    pool_at = draw_pixels(inside, per_image, generator)
    per_image = pool_at.shape[1]
    pool = stand_for_all(pixels.at(pool_at), pixels).flat()
    candidates = _take(negatives_from, pool_at).transpose(1, 2).reshape(-1, dim)
    if gather is not None:
        candidates, pool = gather(candidates), _gather_pixels(pool, gather)
    first = rank * num_images * per_image
    own = tuple(slice(first + b * per_image, first + (b + 1) * per_image) for b in range(num_images))
    all_of_them = anchor_at.shape[1] == height * width
    return PixelProblem(
        anchors=z_weak.float().flatten(2) if all_of_them else _take(z_weak, anchor_at),
        positives=z_strong.float().flatten(2) if all_of_them else _take(z_strong, anchor_at),
        candidates=candidates,
        anchor_pixels=pixels if all_of_them else pixels.at(anchor_at),
        pool=pool,
        own=own,
    )


def _take(z: Tensor, location: Tensor) -> Tensor:
    """[B, D, n] float32 columns of [B, D, h, w] at int64 [B, n]."""
    return z.float().flatten(2).gather(2, location[:, None].expand(-1, z.shape[1], -1))


def _gather_pixels(pool: PixelSet, gather: Gather) -> PixelSet:
    """The pool of all workers. P_m stays here, zeros elsewhere: other images' slots are not compared."""
    numbers = gather(torch.stack([pool.pixel, pool.instance, pool.category], dim=1))
    values = gather(torch.cat([pool.share[:, None], pool.class_part], dim=1))
    mask_part = pool.mask_part.new_zeros((len(numbers), pool.mask_part.shape[1]))
    first = gather.rank * len(pool.pixel)
    mask_part[first : first + len(pool.pixel)] = pool.mask_part
    return PixelSet(numbers[:, 0], values[:, 0], mask_part, values[:, 1:], numbers[:, 1], numbers[:, 2])


PieceLoss = Callable[[Tensor, Tensor, Tensor, PixelSet, PixelSet, slice], tuple[Tensor, Tensor, Tensor]]
"""(anchors [D, n], positives [D, n], candidates [M, D], pixels of both, own) -> sum, count, statistics of n anchors."""


def sum_over_anchors(problem: PixelProblem, piece_loss: PieceLoss, only_own: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Adds `piece_loss` over all anchors, keeping gradients instead of the anchors x candidates graph.

    Each piece is differentiated as soon as it is computed, so memory is one piece plus the gradients of the inputs.

    Args:
        only_own: whether anchors only meet candidates of their own image.

    Returns:
        sum (differentiable once in the three vector inputs), count, statistics [NUM_STATS].
    """
    return _PieceSum.apply(problem.anchors, problem.positives, problem.candidates, problem, piece_loss, only_own)


class _PieceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors, positives, candidates, problem, piece_loss, only_own):  # type: ignore[override]
        inputs = (anchors, positives, candidates)
        wanted = ctx.needs_input_grad[:3]
        grads = [torch.zeros_like(t) for t in inputs]
        total, count = anchors.new_zeros(()), anchors.new_zeros(())
        stats = anchors.new_zeros(NUM_STATS)
        for image, own in enumerate(problem.own):
            columns = own if only_own else slice(0, candidates.shape[0])
            own_here = slice(own.start - columns.start, own.stop - columns.start)
            pool = problem.pool[columns]
            limit = _PAIRS_AT_A_TIME.get(anchors.device.type, 2**22)
            step = max(1, limit // (columns.stop - columns.start))
            for start in range(0, anchors.shape[2], step):
                rows = slice(start, start + step)
                parts = (anchors[image, :, rows], positives[image, :, rows], candidates[columns])
                leaves = [t.detach().requires_grad_(want) for t, want in zip(parts, wanted)]
                with torch.set_grad_enabled(any(wanted)):
                    loss, active, seen = piece_loss(*leaves, problem.anchor_pixels[image, rows], pool, own_here)
                total += loss.detach()
                count += active
                stats += seen
                if loss.requires_grad:
                    needed = [leaf for leaf in leaves if leaf.requires_grad]
                    found = iter(torch.autograd.grad(loss, needed, allow_unused=True))
                    for grad, leaf, place in zip(
                        grads, leaves, ((image, slice(None), rows), (image, slice(None), rows), columns)
                    ):
                        if leaf.requires_grad and (value := next(found)) is not None:
                            grad[place] += value
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(count, stats)
        return total, count, stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total, *_):  # type: ignore[override]
        scaled = [g * grad_total if want else None for g, want in zip(ctx.saved_tensors, ctx.needs_input_grad)]
        return *scaled, None, None, None


def instance_contrast(
    config: ContrastiveConfig, temperature: float | Tensor, generator: torch.Generator | None, with_diagnostics: bool
) -> PieceLoss:
    """The piece loss of L_pxl: -log( exp(s+) / (exp(s+) + sum_r exp(s-_r)) ) of each anchor that has a negative."""

    def piece_loss(anchors, positives, candidates, pixels, pool, own):
        counts = negative_counts(candidate_weights(pixels, pool, own, config), config, generator)
        active = (counts.amax(1) > 0) & (pixels.share > 0)
        scaled = anchors / temperature
        positive, negatives = (scaled * positives).sum(0), scaled.T @ candidates.T
        seen = anchors.new_zeros(NUM_STATS)
        if with_diagnostics:
            seen = negative_statistics(positive, negatives, counts, active, temperature, pixels, pool, own)
        if config.hinge is not None:
            negatives = (negatives - config.hinge).clamp(min=0)
        return (_LogRatio.apply(positive, negatives, counts) * active).sum(), active.sum(), seen

    return piece_loss


class _LogRatio(torch.autograd.Function):
    """log( exp(s+) + sum_q c_q exp(s-_q) ) - s+ for s+ [n], s- [n, M], c [n, M] >= 0; finite for any temperature.

    Written out because autograd would keep four matrices where the posterior is enough.
    """

    @staticmethod
    def forward(ctx: Any, positive: Tensor, negatives: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
        # The peak is over drawn candidates only, as terms far below an undrawn one would underflow. In arithmetic, for
        # log(counts) is slow at 0 and where() at random masks: ten times the cost of these passes.
        terms = counts.sign().sub_(1).mul_(1e30).add_(negatives)
        peak = torch.maximum(terms.amax(1), positive)
        terms = torch.sub(negatives, peak[:, None], out=terms).clamp_(max=0).exp_().mul_(counts)
        first = (positive - peak).exp()
        total = terms.sum(1) + first
        ctx.save_for_backward(first / total, terms.div_(total[:, None]))
        return total.log() + peak - positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        first, terms = ctx.saved_tensors
        return grad * (first - 1), terms * grad[:, None], None


@torch.no_grad()
def negative_statistics(
    positive: Tensor,
    negatives: Tensor,
    counts: Tensor,
    active: Tensor,
    temperature: float | Tensor,
    pixels: PixelSet,
    pool: PixelSet,
    own: slice,
) -> Tensor:
    """Sums behind `diagnose`, each over active anchors or over their negatives."""
    counts = counts * active[:, None]
    instance, mine = pool.instance[None], pixels.instance[:, None]
    known = counts * ((mine >= 0) & (instance >= 0))
    same_instance = (mine == instance) & (mine > 0)
    class_known = counts * ((pixels.category >= 0)[:, None] & (pool.category >= 0))
    return torch.stack(
        [
            active.sum().float(),
            (positive * active).sum() * temperature,
            counts.sum(),
            (negatives * counts).sum() * temperature,
            counts[:, own].sum(),
            known.sum(),
            (known * same_instance)[:, own].sum(),
            class_known.sum(),
            (class_known * (pixels.category[:, None] == pool.category)).sum(),
        ]
    )


def diagnose(total: Tensor, count: Tensor, stats: Tensor, temperature: float | Tensor) -> dict[str, Tensor]:
    """The paper's Fig. 3 quantities from the sums of one batch, each 0-d float32 without gradients.

    raw_loss: mean over anchors, before lambda_pxl. margin: mean positive minus mean negative cosine (larger: better).
    fnr: share of the drawn negatives that lie in the anchor's own instance, over pairs whose truth is known (NaN
    without any). same_image, same_class: shares of the drawn negatives; same_class over pairs of known class,
    background being one (NaN without any). temperature: T.
    """
    anchors, positive, draws, negative, same_image, known, false, class_known, same_class = stats.detach().unbind()
    return {
        "raw_loss": total.detach() / count.clamp(min=1),
        "margin": positive / anchors.clamp(min=1) - negative / draws.clamp(min=TINY),
        "fnr": false / known,
        "same_image": same_image / draws.clamp(min=TINY),
        "same_class": same_class / class_known,
        "temperature": torch.as_tensor(temperature, dtype=torch.float32, device=stats.device).detach(),
    }


def contrast(
    z_weak: Tensor,
    z_strong: Tensor,
    mask_logits: Tensor,
    class_logits: Tensor,
    valid: Tensor,
    truth_instance: Tensor,
    truth_class: Tensor,
    config: ContrastiveConfig,
    *,
    temperature: float | Tensor,
    generator: torch.Generator | None = None,
    gather: Gather | None = None,
    with_diagnostics: bool = True,
    negatives_from: Literal["weak", "strong"] = "weak",
    make_piece: Callable[..., PieceLoss] = instance_contrast,
) -> ContrastiveOutput:
    """What CAST's loss and its rivals share: poses the problem in float32, sums the pieces, diagnoses.

    Args: as `contrastive_loss`; negatives_from: the view of the candidates; make_piece: builds the loss of a piece.
    """
    with torch.autocast(z_weak.device.type, enabled=False):
        problem = pose_problem(
            z_weak,
            z_strong,
            mask_logits,
            class_logits,
            valid,
            truth_instance,
            truth_class,
            config,
            generator,
            gather,
            z_weak if negatives_from == "weak" else z_strong,
        )
        piece = make_piece(config, temperature, generator, with_diagnostics)
        total, count, stats = sum_over_anchors(problem, piece, only_own=config.scope == "same-image")
    return ContrastiveOutput(total, count, diagnose(total, count, stats, temperature) if with_diagnostics else {})
