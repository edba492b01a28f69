"""What a model costs: parameters, operations, latency, throughput and memory of its forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

WARM_UPS = 2


def count_parameters(module: nn.Module) -> int:
    """All parameters, trainable or not."""
    return sum(p.numel() for p in module.parameters())


def count_gmacs(outline: nn.Module, images: torch.Tensor) -> float:
    """Multiply-adds of a forward pass, in 10^9: half of what torch's FlopCounterMode counts.

    Convolutions, matrix products and attention are counted, as fvcore does, whose "GFLOPs" are multiply-adds too;
    bilinear sampling (of deformable attention) is not.

    Args:
        outline: on the meta device.
        images: its input, on the meta device.
    """
    outline = outline.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outline(images)
    return counter.get_total_flops() / 2e9


def measure_seconds(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Median seconds of a call after two to warm up, the device's queue included."""
    seconds = []
    for _ in range(WARM_UPS + repeats):
        began = time.perf_counter()
        with torch.inference_mode(), autocast():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_UPS:])


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call without gradients holds at a time, above what was there before.

    On a GPU what torch allocated. Elsewhere what the operations returned: resident memory would tell of the allocator
    and of all that the process did before.
    """
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            return torch.cuda.max_memory_allocated(device) - before
        with _LiveTensors() as live:
            run()
        return live.most


class _LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still in use, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):  # not made by an operation here: it was there before
                self.known.add(given.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self._forget, storage.nbytes())
        return out

    def _forget(self, num_bytes: int) -> None:
        self.now -= num_bytes
