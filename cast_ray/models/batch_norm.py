"""Batch norm whose statistics are those of a step's images on all workers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class JointBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all workers, so that N workers compute what one would.

    Each worker's mean m_w, variance v_w and number of values n_w are gathered and combined:
    m = sum_w n_w m_w / n,  v = sum_w n_w (v_w + (m_w - m)^2) / n,  n = sum_w n_w. Gradients flow through them to the
    worker that they came from.

    `gather` concatenates tensors of all workers along dim 0 (`engine.collectives.WorkerGather`); the engine sets it.
    None: there is one worker. In evaluation the running statistics are used, as in torch.

    Source: torch's SyncBatchNorm, which runs on GPUs only; Chan et al. 1979 for the combined variance.
    """

    gather: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        if self.gather is None or not self.training:
            return super().forward(x_BDHW)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        values = x_BDHW.float()
        own_var_D, own_mean_D = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        own_count_D = torch.full_like(own_mean_D, values.numel() / values.shape[1])
        mean_WD, var_WD, count_WD = self.gather(torch.stack([own_mean_D, own_var_D, own_count_D])[None]).unbind(1)
        count_D = count_WD.sum(0)
        mean_D = (count_WD * mean_WD).sum(0) / count_D
        var_D = (count_WD * (var_WD + (mean_WD - mean_D).square())).sum(0) / count_D
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean_D, momentum)
            self.running_var.lerp_(var_D * count_D / (count_D - 1), momentum)
        scale_D = self.weight * torch.rsqrt(var_D + self.eps)
        shift_D = self.bias - mean_D * scale_D
        return torch.addcmul(shift_D[:, None, None], values, scale_D[:, None, None]).to(x_BDHW.dtype)


def share_statistics(module: nn.Module, gather: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Lets every joint batch norm in a module see all workers; None: this worker alone."""
    for part in module.modules():
        if isinstance(part, JointBatchNorm):
            part.gather = gather
