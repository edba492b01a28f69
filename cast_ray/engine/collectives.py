"""What losses need from the other workers, kept out of `losses/` so that those stay free of torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class WorkerGather:
    """Concatenates equal-sized tensors of all workers along dim 0 in rank order.

    Gradients return to the worker a row came from, summed over the workers that used it: with each worker's loss scaled
    as for DDP (its sum times the number of workers over the global count) they equal those of the joint batch.

    Args:
        rank: this worker's.
        size: number of workers; with 1 tensors pass unchanged.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def __call__(self, tensor: Tensor) -> Tensor:
        """[n, ...] on each of W workers -> [W * n, ...] on all."""
        return tensor if self.size == 1 else _AllGather.apply(tensor, self.rank, self.size)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rank: int, size: int) -> Tensor:  # type: ignore[override]
        ctx.rows = slice(rank * len(tensor), (rank + 1) * len(tensor))
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # Reduce-scatter would move less, but gloo lacks it.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rows], None, None
