"""Cross-entropy and dice against torch's own operations, differentiated by autograd."""

import pytest
import torch
import torch.nn.functional as F

from cast_ray.losses.mask_terms import mask_terms

G = torch.Generator().manual_seed(0)
LOGITS = 4 * torch.randn(5, 33, generator=G)
TRUTH = torch.rand(5, 33, generator=G)
KEPT = (torch.rand(5, 33, generator=G) < 0.6).float()
KEPT[3] = 0


def slow(logits, truth, kept):
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probs = logits.sigmoid() * kept
    overlap = (probs * truth).sum(1)
    dice = 1 - (2 * overlap + 1) / (probs.sum(1) + (truth * kept).sum(1) + 1)
    return (entropy * kept).sum(1) / kept.expand_as(entropy).sum(1).clamp(min=1e-30), dice


@pytest.mark.parametrize("kept", [None, KEPT, KEPT[:1]], ids=["all", "by row", "shared"])
def test_value_and_gradient_equal_autograd(kept):
    ours, theirs = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    weight = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    found = mask_terms(ours, TRUTH, kept)
    wanted = slow(theirs, TRUTH, torch.ones_like(LOGITS) if kept is None else kept)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)
    (torch.stack(found) * weight).sum().backward()
    (torch.stack(wanted) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_extreme_logits_are_exact():
    logits = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]])
    for truth in (torch.zeros_like(logits), torch.ones_like(logits)):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        found, wanted = mask_terms(x, truth)[0], slow(y, truth, torch.ones_like(logits))[0]
        torch.testing.assert_close(found, wanted)
        found.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
