"""Memory of the set loss as an accelerator runs it: 60 masks of 512x1024 and 200 of 1024x2048, 10 decoder outputs.

    python benchmarks/set_loss_memory.py [--quick]

No accelerator is needed: the limits of the CPU, which works in pieces that fit its cache, are taken away, and torch's
profiler adds up every allocation and release (`measure.peak_tensor_mib`). What is given does not count: predictions and
masks. Our points are drawn within the call, the rival's are given. Measured are the matching alone, and the whole loss
with all that it keeps for the backward pass. The rival is transformers' `Mask2FormerLoss`, on the smaller of the two
only, since it needs several GB for the larger one. Memory does not vary between runs, so each is measured once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from measure import peak_tensor_mib, report
from set_loss import make_problem, rival

from cast_ray.losses.set import criterion, matching
from cast_ray.losses.set.criterion import LossPoints, set_loss

CASES = {"60 masks of 512x1024": ((60,), 100, (128, 256)), "200 masks of 1024x2048": ((200,), 200, (256, 512))}
"""Instances of each image, queries, size of the predicted masks (a quarter of the targets' height and width)."""
TARGET_MIB = {"60 masks of 512x1024": 150, "200 masks of 1024x2048": 1024}


def forward_of(case: str, variant: str) -> Callable[[], object]:
    instances, queries, size = CASES[case]
    predictions, targets, config, points = make_problem(True, instances, queries, size, scale=4)
    generator = torch.Generator().manual_seed(1)
    logits = predictions.class_logits, predictions.mask_logits
    if variant == "matching":
        return lambda: matching.match_layers(*logits, targets, config, points.match)
    if variant == "loss":
        return lambda: set_loss(predictions, targets, config, generator=generator)
    in_unit = LossPoints(*((t + 1) / 2 for t in (points.match, points.candidates, points.uniform)))
    return lambda: rival(predictions, targets, config, in_unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller case only, without the rival")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found: dict[tuple[str, str], float] = {}
    with (
        mock.patch.dict(matching._SAMPLES_AT_A_TIME, clear=True),
        mock.patch.dict(criterion._SAMPLES_AT_A_TIME, clear=True),
    ):
        for case in list(CASES)[: 1 if quick else 2]:
            for variant in ("matching", "loss"):
                found[case, variant] = peak_tensor_mib(forward_of(case, variant))
                print(f"{case}, {variant:8} {found[case, variant]:6.0f} MiB (target: {TARGET_MIB[case]})")
    smaller, larger = CASES
    if not quick:
        theirs = peak_tensor_mib(forward_of(smaller, "theirs"))
        report(
            f"memory of the set loss, {larger}, against the target", found[larger, "loss"], TARGET_MIB[larger], "MiB"
        )
        report(f"memory of the set loss, {smaller}", found[smaller, "loss"], theirs, "MiB")


if __name__ == "__main__":
    main()
