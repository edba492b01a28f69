"""Set loss against transformers' Mask2FormerLoss: B = 4, Q = 100, 10 decoder outputs, masks 128x256, 12,544 points.

    python benchmarks/set_loss.py [--quick]

Both get the same predictions, targets and point coordinates (drawn beforehand, so neither pays for random numbers), and
must agree in value and gradient before anything is timed. `fast` is ours with `loss.exact=false`, which gives equality
up; what that costs in AP on `shapes`: `python sweeps/ablate.py points --preset shapes`. Forward and backward, medians;
memory is the growth of the resident size in a fresh process for each variant.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from measure import clock, interleaved, memory_growth_mb, report, spread
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from cast_ray.contracts.records import Predictions, Targets
from cast_ray.losses.set.criterion import LossPoints, set_loss
from cast_ray.recipe import LossConfig

IMAGES, QUERIES, CLASSES, LAYERS, SIZE, INSTANCES = 4, 100, 8, 10, (128, 256), (12, 8, 15, 5)


def make_problem(
    exact: bool = True,
    instances: tuple[int, ...] = INSTANCES,
    queries: int = QUERIES,
    size: tuple[int, int] = SIZE,
    scale: int = 1,
) -> tuple[Predictions, list[Targets], LossConfig, LossPoints]:
    """Random predictions, rectangles as targets, and points.

    Args:
        exact: `loss.exact`.
        instances: how many each image has.
        size: height and width of the predicted masks.
        scale: how many times as high and wide the targets are.
    """
    g, images = torch.Generator().manual_seed(0), len(instances)
    predictions = Predictions(
        [torch.randn(images, queries, CLASSES + 1, generator=g).requires_grad_() for _ in range(LAYERS)],
        [torch.randn(images, queries, *size, generator=g).requires_grad_() for _ in range(LAYERS)],
        {},
        {},
    )
    masks = torch.zeros(sum(instances), *(scale * n for n in size), dtype=torch.bool)
    for mask in masks:
        top, left = (int(torch.randint(0, scale * (n - 40), (), generator=g)) for n in size)
        mask[top : top + 40 * scale, left : left + 40 * scale] = True
    labels = torch.randint(0, CLASSES, (len(masks),), generator=g)
    # Parts of one tensor, as in a batch.
    targets = [Targets(m, lab, torch.ones(len(lab))) for m, lab in zip(masks.split(instances), labels.split(instances))]
    config = LossConfig(exact=exact, cost_class=2.0)
    uncertain = int(config.num_points * config.importance_ratio) if exact else 0
    shapes = [
        (LAYERS, images, config.num_points) if exact else (1, images, config.num_points // 4),
        (LAYERS, len(masks), int(config.num_points * config.oversample_ratio) if exact else 0),
        (LAYERS, len(masks), config.num_points - uncertain),
    ]
    # Rounded to what both conventions hold exactly, [0, 1] there and [-1, 1] here.
    points = LossPoints(*(torch.rand(*shape, 2, generator=g) * 2 - 1 for shape in shapes))
    return predictions, targets, config, points


def ours(predictions: Predictions, targets: list[Targets], config: LossConfig, points: LossPoints) -> torch.Tensor:
    weights = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
    terms = set_loss(predictions, targets, config, points=points)
    means = [weights[name] * total.sum() / count.sum() for name, (total, count) in terms.items()]
    return sum(means, torch.zeros(()))


def rival(predictions: Predictions, targets: list[Targets], config: LossConfig, points: LossPoints) -> torch.Tensor:
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
        drawn += [points.match[layer, image][None] for image in range(len(targets))]
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


def pose(variant: str) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
    """The leaves of a variant's problem, and its loss."""
    loss_of, exact = VARIANTS[variant]
    predictions, targets, config, points = make_problem(exact)
    if loss_of is rival:
        points = LossPoints(*((t + 1) / 2 for t in (points.match, points.candidates, points.uniform)))
    leaves = predictions.class_logits + predictions.mask_logits
    return leaves, lambda: loss_of(predictions, targets, config, points)


def seconds_of(variant: str, now: Callable[[], float]) -> float:
    """Of one forward and backward."""
    _, loss = pose(variant)
    start = now()
    loss().backward()
    return now() - start


def check() -> None:
    """Equal value and gradients."""
    found = []
    for variant in ("ours", "theirs"):
        leaves, loss = pose(variant)
        value = loss()
        found.append((value, torch.autograd.grad(value, leaves)))
    (value, grads), (wanted, wanted_grads) = found
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, wanted_grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    print(f"equal: value {value:.6f} and {wanted:.6f}, all gradients within 1e-5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one repeat instead of five, for a look")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of one thread, for a machine others use too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu else 2)
    if options.memory_of:
        _, loss = pose(options.memory_of)
        print(memory_growth_mb(lambda: loss().backward()))
        return

    check()
    now = clock(options.cpu)
    variants = {name: partial(seconds_of, name, now) for name in VARIANTS}
    seconds = interleaved(variants, 1 if options.quick else options.repeats, warm_up=False)  # `check` was it
    memory = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:7s} {spread(seconds[name])}   +{memory[name]:.0f} MB")
    for name, title in (("fast", "set_loss_fast"), ("ours", "set_loss")):
        report(f"{title}_memory", memory[name], memory["theirs"], "MB")
        report(title, statistics.median(seconds[name]), statistics.median(seconds["theirs"]), "s")


if __name__ == "__main__":
    main()
