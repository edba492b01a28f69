"""Anchors against one positive and R negatives each, summed in pieces that bound the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cast_ray.losses.contrastive.negatives import PixelSet, candidate_weights, negative_counts, own_columns
from cast_ray.losses.contrastive.pixel_problem import PixelProblem, PixelViews, pose_problem
from cast_ray.losses.joint_step import AnchorDraws, Gather, JointStep
from cast_ray.recipe import ContrastiveConfig

_PAIRS_AT_A_TIME = {"cpu": 2**19, "cuda": 2**24}  # anchors x candidates: a cache-sized piece, a launch-bound one
_LARGEST_EXPONENT = 80.0  # exp(-80) is still a normal float32
NUM_STATISTICS = 9


@dataclass(frozen=True)
class ContrastiveOutput:
    """sum over this worker's anchors and their count (0-d float32); what `diagnose` reads, to be summed over workers.

    statistics: float32 [2 + NUM_STATISTICS] without gradients; None where none were asked for.
    """

    sum: Tensor
    count: Tensor
    statistics: Tensor | None = None


PieceLoss = Callable[
    [Tensor, Tensor, Tensor, PixelSet, PixelSet, slice | None, Callable[[int], Tensor]],
    tuple[Tensor, Tensor, Tensor | None],
]
"""(anchors [g, n, D], positives [g, n, D], candidates [M, D] or [g, m, D], pixels of both, own columns, source of
random numbers [g, n, count]) -> sum, count and statistics of g n anchors."""


def sum_over_anchors(
    problem: PixelProblem, piece_loss: PieceLoss, only_own: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds `piece_loss` over all anchors, keeping gradients instead of the anchors x candidates graph.

    Each piece is differentiated as soon as it is computed, so memory is one piece plus the gradients of the inputs.

    Args:
        only_own: whether anchors only meet candidates of their own image.
        generator: source of the negatives.

    Returns:
        sum (differentiable once in the three vector inputs), count, statistics [NUM_STATISTICS] (zeros without any).
    """
    return _PieceSum.apply(
        problem.anchors, problem.positives, problem.candidates, problem, piece_loss, only_own, generator
    )


def _piece_size(num_anchors: int, num_candidates: int, limit: int) -> tuple[int, int]:
    """Images and rows of a piece: whole images while they fit `limit` pairs, else rows of one image."""
    together = max(1, limit // max(1, num_anchors * num_candidates))
    return together, num_anchors if together > 1 else max(1, limit // num_candidates)


def _pieces(runs: Sequence[slice], num_anchors: int, together: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """(images, rows) of each piece; the images of a piece follow each other in the joint step."""
    for run in runs:
        for image in range(run.start, run.stop, together):
            for row in range(0, num_anchors, rows):
                yield slice(image, min(image + together, run.stop)), slice(row, row + rows)


class _PieceSum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        anchors: Tensor,
        positives: Tensor,
        candidates: Tensor,
        problem: PixelProblem,
        piece_loss: PieceLoss,
        only_own: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_images, num_anchors = anchors.shape[:2]
        per_image, pool = problem.per_image, problem.pool
        wanted = ctx.needs_input_grad[:3]
        grads = [torch.zeros_like(t) for t in (anchors, positives, candidates)]
        candidates_grad = grads[2]
        if only_own:
            pool = pool.unflatten(num_images)
            candidates, candidates_grad = (t.unflatten(0, (num_images, -1)) for t in (candidates, candidates_grad))
        total, count = anchors.new_zeros(()), anchors.new_zeros(())
        statistics = anchors.new_zeros(NUM_STATISTICS)
        limit = _PAIRS_AT_A_TIME.get(anchors.device.type, 2**22)
        together, rows_at_a_time = _piece_size(num_anchors, candidates.shape[-2], limit)
        draws = AnchorDraws(problem.joint, num_anchors, rows_at_a_time, generator)
        for images, rows in _pieces(problem.joint.runs, num_anchors, together, rows_at_a_time):
            columns = images if only_own else slice(None)
            standing = problem.places[images]
            own = None if only_own else slice(per_image * standing[0], per_image * (standing[-1] + 1))
            parts = (anchors[images, rows], positives[images, rows], candidates[columns])
            leaves = [t.detach().requires_grad_(want) for t, want in zip(parts, wanted)]
            with torch.set_grad_enabled(any(wanted)):
                ours, theirs, others = leaves
                pixels = problem.anchor_pixels[images, rows]
                rand = partial(draws.rand, images, rows, device=anchors.device)
                loss, active, seen = piece_loss(ours, theirs, others, pixels, pool[columns], own, rand)
            total += loss.detach()
            count += active
            if seen is not None:
                statistics += seen
            if loss.requires_grad:
                places = (grads[0][images, rows], grads[1][images, rows], candidates_grad[columns])
                needed = [(leaf, place) for leaf, place in zip(leaves, places) if leaf.requires_grad]
                found = torch.autograd.grad(loss, [leaf for leaf, _ in needed], allow_unused=True)
                for (_, place), value in zip(needed, found):
                    if value is not None:
                        place += value
        ctx.grads = grads
        ctx.mark_non_differentiable(count, statistics)
        return total, count, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the contrastive loss can be differentiated once: its gradients were handed on")
        # Scaled in place and let go: as large as the views, they would otherwise be held twice.
        scaled = [g.mul_(grad_total) if want else None for g, want in zip(ctx.grads, ctx.needs_input_grad)]
        ctx.grads = None
        return *scaled, None, None, None, None


def instance_contrast(config: ContrastiveConfig, temperature: float, with_diagnostics: bool) -> PieceLoss:
    """The piece loss of L_pxl: -log( exp(s+) / (exp(s+) + sum_r exp(s-_r)) ) of each anchor that has a negative."""
    # Of unit vectors -1/T <= s <= 1/T: unless that spans float32's exponents, the largest s need not be looked for.
    peak = 1 / temperature if 2 / temperature < _LARGEST_EXPONENT else None

    def piece_loss(
        anchors: Tensor,
        positives: Tensor,
        candidates: Tensor,
        pixels: PixelSet,
        pool: PixelSet,
        own: slice | None,
        rand: Callable[[int], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        counts = negative_counts(candidate_weights(pixels, pool, own, config), config, rand)
        active = (counts.amax(-1) > 0) & (pixels.share > 0)
        scaled = anchors / temperature
        positive, negatives = (scaled * positives).sum(-1), scaled @ candidates.mT
        seen = None
        if with_diagnostics:
            seen = negative_statistics(positive, negatives, counts, active, temperature, pixels, pool, own)
        if config.hinge is not None:
            negatives = (negatives - config.hinge).clamp(min=0)
        return (_LogRatio.apply(positive, negatives, counts, peak) * active).sum(), active.sum(), seen

    return piece_loss


class _LogRatio(torch.autograd.Function):
    """log( exp(s+) + sum_q c_q exp(s-_q) ) - s+ for s+ [...], s- [..., M], c [..., M] >= 0; finite for any temperature.

    Written out because autograd would keep four matrices where the posterior is enough. `peak`: an upper bound of s
    that no s lies far below; None: found for each anchor.
    """

    @staticmethod
    def forward(ctx: Any, positive: Tensor, negatives: Tensor, counts: Tensor, peak: float | None) -> Tensor:  # type: ignore[override]
        if peak is None:
            # Over drawn candidates only, as terms far below an undrawn one would underflow. In arithmetic, for
            # where() at random masks costs five times these passes, and log(counts), slow at 0, thirty times.
            drawn = counts.sign().sub_(1).mul_(1e30).add_(negatives)
            highest = torch.maximum(drawn.amax(-1), positive)
            terms = torch.sub(negatives, highest[..., None], out=drawn).clamp_(max=0).exp_().mul_(counts)
        else:
            highest = torch.full_like(positive, peak)
            terms = (negatives - peak).exp_().mul_(counts)
        first = (positive - highest).exp()
        total = terms.sum(-1) + first
        ctx.save_for_backward(first / total, terms.div_(total[..., None]))
        return total.log() + highest - positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        first, terms = ctx.saved_tensors
        return grad * (first - 1), terms * grad[..., None], None, None


@torch.no_grad()
def negative_statistics(
    positive: Tensor,
    negatives: Tensor,
    counts: Tensor,
    active: Tensor,
    temperature: float,
    pixels: PixelSet,
    pool: PixelSet,
    own: slice | None,
) -> Tensor:
    """Sums behind `diagnose`, each over active anchors or over their negatives."""
    counts = counts * active[..., None]
    instance, mine = pool.instance.unsqueeze(-2), pixels.instance[..., None]
    known = counts * ((mine >= 0) & (instance >= 0))
    same_instance = (mine == instance) & (mine > 0)
    category, my_category = pool.category.unsqueeze(-2), pixels.category[..., None]
    class_known = counts * ((my_category >= 0) & (category >= 0))
    return torch.stack(
        [
            active.sum().float(),
            (positive * active).sum() * temperature,
            counts.sum(),
            (negatives * counts).sum() * temperature,
            own_columns(counts, own).sum(),
            known.sum(),
            own_columns(known * same_instance, own).sum(),
            class_known.sum(),
            (class_known * (my_category == category)).sum(),
        ]
    )


def diagnose(statistics: Tensor, temperature: float) -> dict[str, float]:
    """The paper's Fig. 3 quantities from `ContrastiveOutput.statistics`, summed over workers; one copy to the host.

    raw_loss: mean over anchors, before lambda_pxl. margin: mean positive minus mean negative cosine (larger: better).
    fnr: share of the drawn negatives that lie in the anchor's own instance, over pairs whose truth is known (NaN
    without any): pixels of D_l, unless the sampler is the oracle. same_image, same_class: shares of the drawn
    negatives; same_class over pairs of known class, background being one (NaN without any). temperature: T.
    """
    total, count, anchors, positive, draws, negative, same_image, known, false, class_known, same_class = (
        statistics.tolist()
    )

    def share(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    return {
        "raw_loss": total / max(count, 1),
        "margin": share(positive, anchors) - share(negative, draws),
        "fnr": share(false, known),
        "same_image": share(same_image, draws),
        "same_class": share(same_class, class_known),
        "temperature": temperature,
    }


def contrast(
    views: PixelViews,
    config: ContrastiveConfig,
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    gather: Gather | None = None,
    joint: JointStep | None = None,
    with_diagnostics: bool = True,
    negatives_from: Literal["weak", "strong"] = "weak",
    make_piece: Callable[..., PieceLoss] = instance_contrast,
) -> ContrastiveOutput:
    """What CAST's loss and its rivals share: poses the problem in float32, sums the pieces.

    Args: as `contrastive_loss`; negatives_from: the view of the candidates; make_piece: builds the loss of a piece.
    """
    joint = joint or JointStep(0, len(views.z_weak), gather)
    with torch.autocast(views.z_weak.device.type, enabled=False):
        problem = pose_problem(
            views,
            config,
            generator,
            joint,
            gather is not None,
            negatives_from,
            with_truth=with_diagnostics or config.sampler == "oracle" or make_piece is not instance_contrast,
        )
        piece = make_piece(config, temperature, with_diagnostics)
        total, count, seen = sum_over_anchors(
            problem, piece, only_own=config.scope == "same-image", generator=generator
        )
    statistics = torch.cat([torch.stack([total.detach(), count]), seen]) if with_diagnostics else None
    return ContrastiveOutput(total, count, statistics)
