"""Other contrastive losses over the same pixels, anchors, pool and temperature, for comparison with CAST's.

Each takes the arguments of `contrastive_loss` and returns the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cast_ray.losses.contrastive.negatives import (
    TINY,
    PixelSet,
    at_centres,
    candidate_weights,
    negative_counts,
    pseudo_probabilities,
)
from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.losses.contrastive.pixels import (
    ContrastiveOutput,
    PieceLoss,
    contrast,
    negative_statistics,
)
from cast_ray.recipe import ContrastiveConfig


def infonce_loss(views: PixelViews, config: ContrastiveConfig, **options: Any) -> ContrastiveOutput:
    """Plain cross-view InfoNCE: any other pixel of the strong views is a negative, drawn uniformly.

    L = -1/(B N) * sum log( exp(<z_w, z_s>/T) / (exp(<z_w, z_s>/T) + sum_r exp(<z_w, z_s[r]>/T)) ).

    Args, Returns, Raises: as `contrastive_loss`; of `config`, sampler and hinge are not used.

    Source: InfoNCE (arXiv 1807.03748) with in-batch negatives of the other view as in SimCLR (arXiv 2002.05709).
    Deviations: R drawn negatives in place of all pixels, so that the rows of a table share R.
    """
    config = config.model_copy(update={"sampler": "uniform", "hinge": None})
    return contrast(views, config, negatives_from="strong", **options)


def pc2seg_loss(views: PixelViews, config: ContrastiveConfig, **options: Any) -> ContrastiveOutput:
    """Pseudo-label-debiased pixel contrast: negatives from other images, by the probability of another class.

    Weight of candidate q for anchor p: 1 - sum_c F_c[p,c] F_c[q,c], 0 within the image; InfoNCE over R draws.

    Args, Returns, Raises: as `contrastive_loss`; of `config`, sampler, scope, normalise and hinge are not used.

    Source: Zhong et al., Pixel Contrastive-Consistent Semi-Supervised Semantic Segmentation (PC2Seg), ICCV 2021: its
    sampling from different images, debiased by pseudo-labels.
    Deviations: class probabilities are F_c of the mask-classification head, as there is no per-pixel softmax; its
    consistency loss is left out (only the contrastive term is compared).
    """
    config = config.model_copy(update={"sampler": "class", "scope": "cross-image", "normalise": "sum", "hinge": None})
    return contrast(views, config, **options)


def supervised_loss(views: PixelViews, config: ContrastiveConfig, **options: Any) -> ContrastiveOutput:
    """Class-supervised pixel contrast: pixels of the anchor's class are positives, of other classes negatives.

    L_p = 1/|P_p| * sum_{p+ in P_p} -log( exp(<z_p, z_p+>/T) / (exp(<z_p, z_p+>/T) + sum_r exp(<z_p, z_r>/T)) ).

    Args, Returns, Raises: as `contrastive_loss`; of `config`, sampler and hinge are not used; scope limits positives
    and negatives alike. All vectors are the weak view's; z_strong enters only the margin.

    Source: Wang et al., Exploring Cross-Image Pixel Contrast for Semantic Segmentation (arXiv 2101.11939).
    Deviations: where the truth is unknown the class is argmax_c F_c (the original sees labelled images only); uniform
    in place of semi-hard sampling; no memory bank, the positives are all those of the pool.
    """
    config = config.model_copy(update={"sampler": "uniform", "hinge": None})
    guess = pseudo_probabilities(views.mask_logits, views.class_logits, views.grid_hw)[1].argmax(-1)
    category = at_centres(views.truth_class, views.grid_hw).long()
    category = torch.where(category < 0, guess, category).unflatten(1, views.grid_hw)
    return contrast(replace(views, truth_class=category), config, make_piece=_supervised_piece, **options)


RIVALS = {"supervised": supervised_loss, "pc2seg": pc2seg_loss, "infonce": infonce_loss}


def _supervised_piece(config: ContrastiveConfig, temperature: float, with_diagnostics: bool) -> PieceLoss:
    def piece_loss(
        anchors: Tensor,
        positives: Tensor,
        candidates: Tensor,
        pixels: PixelSet,
        pool: PixelSet,
        own: slice | None,
        rand: Callable[[int], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        allowed = candidate_weights(pixels, pool, own, config)
        alike = pixels.category[..., None] == pool.category.unsqueeze(-2)
        attract = allowed * alike
        attract /= attract.sum(-1, keepdim=True).clamp(min=TINY)
        counts = negative_counts(allowed * ~alike, config, rand)
        active = (counts.amax(-1) > 0) & (attract.amax(-1) > 0) & (pixels.share > 0)
        scaled = anchors / temperature
        similarities = scaled @ candidates.mT
        # Rows that are left out get some weight, for logsumexp over nothing has no gradient.
        against = (similarities + torch.where(active[..., None], counts, 1.0).log()).logsumexp(-1, keepdim=True)
        loss = (attract * F.softplus(against - similarities)).sum(-1)
        seen = None
        if with_diagnostics:
            positive = (scaled * positives).sum(-1)
            seen = negative_statistics(positive, similarities, counts, active, temperature, pixels, pool, own)
        return (loss * active).sum(), active.sum(), seen

    return piece_loss
