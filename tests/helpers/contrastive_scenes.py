"""Small random inputs of the contrastive loss."""

import torch
import torch.nn.functional as F


def scene(images=2, h=2, w=3, dim=4, queries=5, classes=3, seed=0, sharp=3.0):
    """Keyword arguments of `contrastive_loss` but for config; pixels of crop size are 4x the feature map's."""
    g = torch.Generator().manual_seed(seed)
    high, wide = 4 * h, 4 * w
    return {
        "z_weak": F.normalize(torch.randn(images, dim, h, w, generator=g), dim=1).requires_grad_(),
        "z_strong": F.normalize(torch.randn(images, dim, h, w, generator=g), dim=1).requires_grad_(),
        "mask_logits": sharp * torch.randn(images, queries, high // 2, wide // 2, generator=g),
        "class_logits": sharp * torch.randn(images, queries, classes + 1, generator=g),
        "valid": torch.ones(images, high, wide, dtype=torch.bool),
        "truth_instance": torch.randint(0, 3, (images, h, w), generator=g)
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)
        .to(torch.int16),
        "truth_class": torch.randint(0, classes + 1, (images, h, w), generator=g)
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)
        .to(torch.int16),
    }


def gradients(inputs, loss):
    return torch.autograd.grad(loss, [inputs["z_weak"], inputs["z_strong"]], allow_unused=True)
