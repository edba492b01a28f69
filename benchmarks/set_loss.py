"""Set loss against transformers' Mask2FormerLoss: B = 4, Q = 100, 10 decoder outputs, masks 128x256, 12,544 points.

    python benchmarks/set_loss.py [--quick]

Both get the same predictions, targets and point coordinates (drawn beforehand, so neither pays for random numbers), and
must agree in value and gradient before anything is timed. Forward and backward, medians; memory is the growth of the
peak resident size of a fresh process for each variant.
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
from unittest import mock

import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from cast_ray.losses.set_criterion import LossPoints, draw_points, set_loss
from cast_ray.recipe import LossConfig
from cast_ray.records import Predictions, Targets

IMAGES, QUERIES, CLASSES, LAYERS, SIZE, INSTANCES = 4, 100, 8, 10, (128, 256), (12, 8, 15, 5)


def make_problem(exact: bool = True) -> tuple[Predictions, list[Targets], LossConfig, LossPoints]:
    g = torch.Generator().manual_seed(0)
    predictions = Predictions(
        [torch.randn(IMAGES, QUERIES, CLASSES + 1, generator=g).requires_grad_() for _ in range(LAYERS)],
        [torch.randn(IMAGES, QUERIES, *SIZE, generator=g).requires_grad_() for _ in range(LAYERS)],
        {},
        {},
    )
    targets = []
    for count in INSTANCES:
        masks = torch.zeros(count, *SIZE, dtype=torch.bool)
        for i in range(count):
            top, left = (int(torch.randint(0, n - 40, (), generator=g)) for n in SIZE)
            masks[i, top : top + 40, left : left + 40] = True
        targets.append(Targets(masks, torch.randint(0, CLASSES, (count,), generator=g), torch.ones(count)))
    config = LossConfig(exact=exact, cost_class=2.0)
    drawn = draw_points(predictions, targets, config, g)
    # Rounded to what both conventions hold exactly, [0, 1] there and [-1, 1] here.
    points = LossPoints(*(((t + 1) / 2) * 2 - 1 for t in (drawn.match, drawn.candidates, drawn.uniform)))
    return predictions, targets, config, points


def ours(predictions, targets, config, points) -> torch.Tensor:
    weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
    return sum(weights[k] * s / n for k, (s, n) in set_loss(predictions, targets, config, points=points).items())


def rival(predictions, targets, config, points) -> torch.Tensor:
    """`points` in [0, 1], as transformers draws them."""
    criterion = theirs.Mask2FormerLoss(
        Mask2FormerConfig(
            num_labels=CLASSES,
            class_weight=config.cost_class,
            mask_weight=config.cost_mask,
            dice_weight=config.cost_dice,
            no_object_weight=config.no_object_weight,
            train_num_points=config.num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_ratio,
        ),
        {},
    )
    drawn = []  # in the order in which it asks for random numbers: the final layer first
    for layer in [LAYERS - 1, *range(LAYERS - 1)]:
        drawn += [points.match[layer, image][None] for image in range(IMAGES)]
        drawn += [points.candidates[layer], points.uniform[layer]]
    numbers = iter(drawn)
    masks = [t.masks.float() for t in targets]  # the type its image processor delivers
    others = [
        {"masks_queries_logits": m, "class_queries_logits": c}
        for m, c in zip(predictions.mask_logits[:-1], predictions.class_logits[:-1])
    ]
    with mock.patch.object(theirs.torch, "rand", lambda *_, **__: next(numbers)):
        losses = criterion(
            predictions.mask_logits[-1], predictions.class_logits[-1], masks, [t.labels for t in targets], others
        )
    weight = {"loss_cr": config.class_weight, "loss_ma": config.mask_weight, "loss_di": config.dice_weight}
    return sum(weight[name[:7]] * value for name, value in losses.items())


VARIANTS = {"ours": (ours, True), "fast": (ours, False), "theirs": (rival, True)}


def run(
    variant: str, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, torch.Tensor, list[torch.Tensor], float]:
    """Seconds, value, gradients and growth of the peak memory in MB of one forward and backward."""
    loss_of, exact = VARIANTS[variant]
    predictions, targets, config, points = make_problem(exact)
    if loss_of is rival:
        points = LossPoints(*((t + 1) / 2 for t in (points.match, points.candidates, points.uniform)))
    before = peak_mb()
    start = clock()
    value = loss_of(predictions, targets, config, points)
    value.backward()
    seconds = clock() - start
    grown = peak_mb() - before
    gradients = [t.grad for t in predictions.class_logits + predictions.mask_logits if t.grad is not None]
    return seconds, value.detach(), gradients, grown


def peak_mb() -> float:
    """Peak resident size; VmHWM, for a child's ru_maxrss starts at its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one repeat instead of five, for a look")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of one thread, for a machine others use too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu else 2)
    clock = time.process_time if options.cpu else time.perf_counter
    if options.memory_of:
        print(run(options.memory_of)[3])
        return

    (_, value, grads, _), (_, wanted, wanted_grads, _) = run("ours"), run("theirs")
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, wanted_grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    print(f"equal: value {value:.6f} and {wanted:.6f}, all gradients within 1e-5")
    del grads, wanted_grads, a, b

    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(1 if options.quick else options.repeats):
        for name in VARIANTS:  # interleaved, so that a busy machine slows all alike
            seconds[name].append(run(name, clock)[0])
    median = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        spread = f"{min(seconds[name]):.3f}-{max(seconds[name]):.3f}"
        print(f"{name:7s} {median[name]:7.3f} s (n={len(seconds[name])}, {spread})   +{memory[name]:.0f} MB")
    for name in ("fast", "ours"):
        print(
            json.dumps(
                {
                    "name": "set_loss" if name == "ours" else "set_loss_fast",
                    "ours": round(median[name], 4),
                    "theirs": round(median["theirs"], 4),
                    "ratio": round(median["theirs"] / median[name], 2),
                    "unit": "s",
                }
            )
        )


if __name__ == "__main__":
    main()
