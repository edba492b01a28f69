"""L_pxl: the instance-aware pixel-wise contrastive loss, or a rival by `config.kind`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.losses.contrastive.pixels import ContrastiveOutput, contrast, diagnose
from cast_ray.losses.contrastive.rivals import RIVALS
from cast_ray.losses.joint_step import Gather, JointStep
from cast_ray.recipe import ContrastiveConfig

__all__ = ["ContrastiveOutput", "PixelViews", "contrastive_loss", "diagnose", "temperature_at"]


def contrastive_loss(
    views: PixelViews,
    config: ContrastiveConfig,
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    gather: Gather | None = None,
    joint: JointStep | None = None,
    with_diagnostics: bool = True,
) -> ContrastiveOutput:
    """Pulls the two views of a pixel together and pushes it from R pixels that probably show another instance.

    L_pxl = -1/(B N) * sum_{b,p} log( exp(s+) / (exp(s+) + sum_r exp(s-_r)) ), s+ = <z_w[b,p], z_s[b,p]> / T,
    s-_r = <z_w[b,p], z_w[b',q_r]> / T with q_r drawn in proportion to s_deb(p, q) (see `candidate_weights`).

    Estimators. `sampled` draws R candidates (see `negative_counts`), each R w_q times in the mean, with
    w = s_deb / sum s_deb. `expectation` puts that mean in the draws' place,
    sum_r exp(s-_r) -> R sum_q w_q exp(s-_q). It has no variance and, log being concave, is an upper bound (Jensen) of
    the mean of `sampled`, which lies below it by about Var[sum_r exp(s-_r)] / (2 Z^2),
    Z = exp(s+) + R sum_q w_q exp(s-_q). With independent draws both that bias and the variance fall as 1/R; the
    systematic ones have much less of both where similarity changes slowly along the pool (the pixels of an image, row
    by row), as much in random order, and more where it repeats with the step of the draws. Without replacement (Gumbel
    top-k) the draws are no longer proportional to s_deb once R nears the number of candidates; `expectation` keeps the
    law with replacement.

    Candidates come from a random pool of `pool_size` pixels: exact when it holds all pixels, else a self-normalised
    importance approximation whose bias falls as 1/pool. Memory grows with one piece of anchors x pool, never with
    pixels squared.

    Args:
        views: of the step's images. The vectors are computed with in float32 also under autocast; no gradient flows
            through y, the mask and class logits; padding is neither anchor nor negative; the truth is read by the
            oracle, the supervised rival and diagnostics only.
        config: every difference between the published and the released form, one field each.
        temperature: T, see `temperature_at`.
        generator: source of anchors, pool and draws, on the device of z.
        gather: joins the candidate pools of all workers, pool_size in all. Needs equal batch sizes.
        joint: the step of the views' images, for which random numbers are drawn; None: all images are of one kind.
        with_diagnostics: whether to fill `statistics` (see `diagnose`).

    Returns:
        sum over the anchors of this worker that have a possible negative, and their count. An anchor without one (one
        image with `scope=cross-image`, all y equal, unknown truth for the oracle) is left out of both; if all are, sum
        is 0 with zero gradients and count 0.

    Raises:
        ValueError: kind `none`.

    Source: CAST (arXiv 2505.21904, 2604.03841), the instance-aware pixel-wise contrastive loss.
    Deviations: the papers do not say which view anchors and negatives come from; here both are of the weak one, as in
    the released code. An anchor is never its own negative. The mean is over the anchors that have a negative, not over
    all B N.
    """
    losses: dict[str, Callable[..., ContrastiveOutput]] = {"cast": contrast, **RIVALS}
    if config.kind not in losses:
        raise ValueError(f"contrastive.kind: expected one of {', '.join(losses)}, got {config.kind!r}")
    return losses[config.kind](
        views,
        config,
        temperature=temperature,
        generator=generator,
        gather=gather,
        joint=joint,
        with_diagnostics=with_diagnostics,
    )


def temperature_at(step: int, config: ContrastiveConfig) -> float:
    """T at an optimiser step: linear from `temperature` to `temperature_end` over `temperature_steps`, then constant.

    A function of the step alone, so a run resumed at a step continues with the T it would have had.
    """
    if config.temperature_end is None:
        return config.temperature
    done = min(max(step / config.temperature_steps, 0.0), 1.0)
    return config.temperature + (config.temperature_end - config.temperature) * done
