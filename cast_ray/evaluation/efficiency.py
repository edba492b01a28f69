"""What a model costs: parameters, operations, latency, throughput and memory of its forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import nn
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


class PeakMemory:
    """Highest memory inside a `with` block, above that at its start, in `num_bytes`; None where nothing can tell.

    On a GPU what torch allocated; on Linux's CPUs the growth of this process's resident memory, which the allocator
    rounds up.
    """

    num_bytes: int | None = None

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self.before = _resident("VmRSS") if _forget_peak() else None
        return self

    def __exit__(self, *_: object) -> None:
        after = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        if self.before is not None and after is not None:
            self.num_bytes = max(0, after - self.before)


def _forget_peak() -> bool:
    """Sets this process's highest resident memory back to the present one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
