"""Contrastive loss against a dense all-pairs formulation: R = 200, D = 128, B = 8, C = 8, Q = 100.

    python benchmarks/contrastive_loss.py [--quick]

The dense rival is the released form written straight down: weights of all pixels of the batch against all of the
other images, Gumbel top-k for R = 200 negatives, image by image. Ours takes the same inputs, sampler, scope and R, with
a pool of 512 candidates and 256 anchors of each image (`ours`) or all pixels as anchors (`all_anchors`, `gumbel`,
`expectation`); all estimate the same mean. Forward and backward, medians; memory is the growth of the peak resident
size of a fresh process for each variant and size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cast_ray.losses.contrastive import contrastive_loss
from cast_ray.recipe import CONTRASTIVE_PRESETS, ContrastiveConfig

IMAGES, DIM, QUERIES, CLASSES, TEMPERATURE = 8, 128, 100, 8, 0.1
SIZES = {"19x37": (19, 37), "38x74": (38, 74), "76x148": (76, 148)}
DENSE_SIZES = ("19x37", "38x74")  # at the third the dense form has 7 billion pairs
SHARED = {**CONTRASTIVE_PRESETS["released"], "hinge": None, "num_anchors": 10**6, "pool_size": 512}
CONFIGS = {
    "ours": ContrastiveConfig(**{**SHARED, "replacement": True, "num_anchors": 256}),
    "all_anchors": ContrastiveConfig(**{**SHARED, "replacement": True}),
    "gumbel": ContrastiveConfig(**SHARED),
    "expectation": ContrastiveConfig(**{**SHARED, "estimator": "expectation"}),
    "recipe": ContrastiveConfig(),  # the paper preset's own caps on anchors and pool, both parts of y, R = 64
}


def make_inputs(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    height, width = size
    return {
        "z_weak": F.normalize(torch.randn(IMAGES, DIM, height, width, generator=g), dim=1).requires_grad_(),
        "z_strong": F.normalize(torch.randn(IMAGES, DIM, height, width, generator=g), dim=1).requires_grad_(),
        "mask_logits": torch.randn(IMAGES, QUERIES, height, width, generator=g),
        "class_logits": torch.randn(IMAGES, QUERIES, CLASSES + 1, generator=g),
        "valid": torch.ones(IMAGES, height, width, dtype=torch.bool),
        "truth_instance": torch.full((IMAGES, height, width), -1, dtype=torch.int16),
        "truth_class": torch.full((IMAGES, height, width), -1, dtype=torch.int16),
    }


def dense(inputs: dict[str, torch.Tensor], r: int = 200) -> torch.Tensor:
    """Every pixel of the other images is a candidate of every pixel; the rows of one image at a time."""
    z, z_strong = inputs["z_weak"].flatten(2), inputs["z_strong"].flatten(2)
    with torch.no_grad():
        probs_m = inputs["mask_logits"].flatten(2).softmax(1)
        y = torch.einsum("bkp,bkc->bpc", probs_m, inputs["class_logits"].softmax(-1))
        y = y / y.sum(-1, keepdim=True)
    losses = []
    for b in range(IMAGES):
        others = [c for c in range(IMAGES) if c != b]
        anchors = z[b].T
        candidates = torch.cat([z[c] for c in others], dim=1)
        with torch.no_grad():
            weights = (1 - y[b] @ torch.cat([y[c] for c in others]).T).clamp(min=0)
            gumbel = -torch.empty_like(weights).exponential_().log()
            chosen = (weights.clamp(min=1e-12).log() + gumbel).topk(r, dim=1).indices
        similarity = (anchors @ candidates).gather(1, chosen) / TEMPERATURE
        positive = (z[b] * z_strong[b]).sum(0)[:, None] / TEMPERATURE
        losses.append(torch.cat([positive, similarity], dim=1).logsumexp(1) - positive[:, 0])
    return torch.cat(losses).mean()


def ours(name: str, inputs: dict[str, Any]) -> torch.Tensor:
    out = contrastive_loss(**inputs, config=CONFIGS[name], temperature=TEMPERATURE, with_diagnostics=False)
    return out.sum / out.count


def run(
    variant: str, size: tuple[int, int], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float, float]:
    """Seconds and growth of the peak memory in MB of one forward and backward, and the loss."""
    inputs = make_inputs(size)
    before, start = peak_mb(), clock()
    loss = dense(inputs) if variant == "dense" else ours(variant, inputs)
    loss.backward()
    return clock() - start, peak_mb() - before, loss.item()


def peak_mb() -> float:
    """Peak resident size; VmHWM, for a child's ru_maxrss starts at its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first size only, one repeat of the dense form")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of one thread, for a machine others use too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu else 2)
    clock = time.process_time if options.cpu else time.perf_counter
    if options.memory_of:
        variant, size = options.memory_of
        run(variant, (8, 8))  # what the libraries allocate once is not the loss's
        print(run(variant, SIZES[size])[1])
        return

    sizes = ["19x37"] if options.quick else list(SIZES)
    seconds: dict[tuple[str, str], float] = {}
    memory: dict[tuple[str, str], float] = {}
    for size in sizes:
        variants = [*CONFIGS, *(["dense"] if size in DENSE_SIZES else [])]
        for variant in variants:
            if variant != "dense":
                run(variant, SIZES[size])  # warms the allocator and the thread pool
            repeats = 1 if options.quick and variant == "dense" else options.repeats
            times = [run(variant, SIZES[size], clock) for _ in range(repeats)]
            seconds[variant, size] = statistics.median(t[0] for t in times)
            command = [sys.executable, __file__, "--memory-of", variant, size]
            memory[variant, size] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{size:7s} {variant:12s} {seconds[variant, size]:8.3f} s (n={repeats}, {min(times)[0]:.3f}-"
                f"{max(times)[0]:.3f})  +{memory[variant, size]:.0f} MB  loss {times[-1][2]:.4f}",
                flush=True,
            )
    for size in sizes:
        if size not in DENSE_SIZES:
            continue
        for measure, values, unit in (("time", seconds, "s"), ("memory", memory, "MB")):
            for variant in ("all_anchors", "ours"):
                name = f"contrastive_{measure}_{size}" + ("_all_anchors" if variant == "all_anchors" else "")
                report(name, values[variant, size], values["dense", size], unit)
    if len(sizes) == 3:  # pixels grow by 16: growth is linear or less when the ratio is 1/16 or more
        for variant in ("all_anchors", "ours"):
            first, last = seconds[variant, sizes[0]], seconds[variant, sizes[-1]]
            report(f"contrastive_growth_over_16x_pixels_{variant}", last, first, "s")


def report(name: str, mine: float, theirs: float, unit: str) -> None:
    ratio = round(theirs / max(mine, 1e-9), 3)
    print(json.dumps({"name": name, "ours": round(mine, 4), "theirs": round(theirs, 4), "ratio": ratio, "unit": unit}))


if __name__ == "__main__":
    main()
