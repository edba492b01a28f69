"""Contrastive loss against a dense all-pairs formulation: R = 200, D = 128, B = 8, C = 8, Q = 100.

    python benchmarks/contrastive_loss.py [--quick]

The dense rival is the released form written straight down: weights of all pixels of the batch against all of the
other images, Gumbel top-k for R = 200 negatives, image by image. Ours takes the same inputs, sampler, scope and R:
`ours` 256 anchors of each image and a pool of 512 candidates, `all_anchors` every pixel as anchor, `expectation` the
closed form in place of draws, `recipe` the paper column as a recipe without overrides has it (R = 64), and `released`
the released column with nothing left out, so the same law as the dense form at the memory of one piece. Forward and
backward, medians; memory is the growth of the resident size in a fresh process for each variant and size.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import clock, interleaved, memory_growth_mb, report, spread

from cast_ray.losses.contrastive.loss import contrastive_loss
from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.recipe import CONTRASTIVE_PRESETS, ContrastiveConfig

IMAGES, DIM, QUERIES, CLASSES, TEMPERATURE = 8, 128, 100, 8, 0.1
SIZES = {"19x37": (19, 37), "38x74": (38, 74), "76x148": (76, 148)}
DENSE_SIZES = ("19x37", "38x74")  # at the third the dense form has 7 billion pairs
RELEASED = {**CONTRASTIVE_PRESETS["released"], "hinge": None}
POOLED = {**RELEASED, "replacement": True, "pool_size": 512}
CONFIGS = {
    "ours": ContrastiveConfig(**{**POOLED, "num_anchors": 256}),
    "all_anchors": ContrastiveConfig(**POOLED),
    "expectation": ContrastiveConfig(**{**POOLED, "estimator": "expectation"}),
    "recipe": ContrastiveConfig(),
    "released": ContrastiveConfig(**RELEASED),
}


def make_inputs(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    height, width = size
    z = F.normalize(torch.randn(2, IMAGES, height, width, DIM, generator=g), dim=-1)
    z_weak, z_strong = (view.permute(0, 3, 1, 2).requires_grad_() for view in z)  # channels last, as the projector's
    return {
        "z_weak": z_weak,
        "z_strong": z_strong,
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


def loss_of(variant: str, inputs: dict[str, Any]) -> torch.Tensor:
    if variant == "dense":
        return dense(inputs)
    out = contrastive_loss(
        PixelViews(**inputs), config=CONFIGS[variant], temperature=TEMPERATURE, with_diagnostics=False
    )
    return out.sum / out.count


def seconds_of(variant: str, size: str, losses: dict[str, float], now: Callable[[], float]) -> float:
    """Of one forward and backward; the loss goes to `losses`."""
    inputs = make_inputs(SIZES[size])
    start = now()
    loss = loss_of(variant, inputs)
    loss.backward()
    seconds = now() - start
    losses[variant] = loss.item()
    return seconds


def print_memory(variant: str, size: str) -> None:
    loss_of(variant, make_inputs((8, 8))).backward()  # what the libraries allocate once is not the loss's
    inputs = make_inputs(SIZES[size])
    print(memory_growth_mb(lambda: loss_of(variant, inputs).backward()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first size only, one repeat")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of one thread, for a machine others use too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu else 2)
    if options.memory_of:
        print_memory(*options.memory_of)
        return

    now, repeats = clock(options.cpu), 1 if options.quick else options.repeats
    median: dict[tuple[str, str], float] = {}
    for size in ["19x37"] if options.quick else list(SIZES):
        names = [n for n in (*CONFIGS, "dense") if n not in ("dense", "released") or size in DENSE_SIZES]
        losses: dict[str, float] = {}
        variants = {name: partial(seconds_of, name, size, losses, now) for name in names}
        seconds = interleaved(variants, repeats, warm_up=size == "19x37")
        memory = {}
        for name in names:
            median[name, size] = statistics.median(seconds[name])
            command = [sys.executable, __file__, "--memory-of", name, size]
            memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{size:7s} {name:12s} {spread(seconds[name])}  +{memory[name]:.0f} MB  loss {losses[name]:.4f}")
        if size in DENSE_SIZES:
            for name in ("released", "all_anchors", "ours"):
                suffix = "" if name == "ours" else f"_{name}"
                report(f"contrastive_time_{size}{suffix}", median[name, size], median["dense", size], "s")
                report(f"contrastive_memory_{size}{suffix}", memory[name], memory["dense"], "MB")
    if not options.quick:  # pixels grow by 16: growth is linear or less when the ratio is 1/16 or more
        for name in ("all_anchors", "ours"):
            first, last = (median[name, size] for size in ("19x37", "76x148"))
            report(f"contrastive_growth_over_16x_pixels_{name}", last, first, "s")


if __name__ == "__main__":
    main()
