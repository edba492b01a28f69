"""The workers of a stage as the engine sees them, one or many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cast_ray.engine.collectives import WorkerGather
from cast_ray.models.batch_norm import share_statistics

CPU = torch.device("cpu")


def pick_device(wanted: str) -> torch.device:
    """Chooses a device; `auto` is the GPU, if there is one.

    Raises:
        ValueError: no such device, or a GPU that is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"--device {wanted}: expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {wanted}: no GPU here")
    return device


@dataclass(frozen=True)
class World:
    """Rank, size and device of this worker."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Moves a module to the device; with several workers, averages gradients and shares batch norm's statistics."""
        module = module.to(self.device)
        share_statistics(module, WorkerGather(self.rank, self.size) if self.size > 1 else None)
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # A step without instances, or a row without some term, leaves weights without a gradient.
        return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)
