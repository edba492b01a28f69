"""Binary cross-entropy and dice of masks against masks, value and gradient in a few passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mask_terms(logits: Tensor, truth: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and dice loss of each row, over the points that are kept.

    With m = sigmoid(x): BCE = mean_p( softplus(x) - x g ), dice = 1 - (2 sum_p m g + 1) / (sum_p m + sum_p g + 1).

    Args:
        logits: x, float32 [K, P]. truth: g, float32 [K, P] in 0..1, no gradient.
        kept: float32 [K or 1, P], weight of each point in both terms; None: all 1.

    Returns:
        Two float32 [K]; a row that keeps no point has a cross-entropy of 0.

    Source: Mask2Former (arXiv 2112.01527); transformers' `sigmoid_cross_entropy_loss` and `dice_loss`.
    """
    return _MaskTerms.apply(logits, truth, kept)


class _MaskTerms(torch.autograd.Function):
    """Written out because autograd would keep and walk ten matrices where m and g are enough."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, truth: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        probs = logits.sigmoid()
        # softplus(x) = max(x, 0) - log sigmoid(|x|), with the sigmoid that is there already; torch's own is slow.
        cross_entropy = torch.maximum(probs, 1 - probs).log_().neg_().add_(logits.clamp(min=0)).sub_(logits * truth)
        if kept is None:
            weight, total = None, torch.full_like(logits[:, :1], logits.shape[1])
        else:
            weight = kept.expand_as(logits)
            total = weight.sum(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
            cross_entropy *= weight
        counted = truth if weight is None else truth * weight
        overlap = 2 * (probs * counted).sum(1, keepdim=True) + 1
        area = (probs if weight is None else probs * weight).sum(1, keepdim=True) + counted.sum(1, keepdim=True) + 1
        ctx.save_for_backward(probs, truth, weight, total, overlap, area)
        return cross_entropy.sum(1) / total[:, 0], 1 - (overlap / area)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_bce: Tensor, grad_dice: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        probs, truth, weight, total, overlap, area = ctx.saved_tensors
        grad_dice = grad_dice[:, None] / area
        # d dice / d m = overlap / area^2 - 2 g / area, and d m / d x = m (1 - m)
        grad = (truth * (-2 * grad_dice)).add_(grad_dice * overlap / area).mul_(probs * (1 - probs))
        grad += (probs - truth).mul_(grad_bce[:, None] / total)
        return grad if weight is None else grad.mul_(weight), None, None
