"""Where the time of one optimiser step goes, term by term, and what the contrastive term adds to it.

    python benchmarks/step_breakdown.py [--case shapes|paper] [--column paper|released]

`shapes`: the preset's student and batch on drawn scenes. `paper`: a student of the paper's size (DINOv2-S from its
config with random weights, DPT, 9 masked-attention layers, 100 queries, 12,544 points) on 2 images of 512x1024 with 10
instances each; the contrastive map has stride 8 (paper) or is the coarsest (released). One thread. A step is cut at the
network's outputs: each term is differentiated to them on its own, then the network once with their sum. On `shapes` the
gradients of the cut step are compared with the loop's before anything is timed.

The rival is the step without the contrastive term. What it adds is its own work (projection heads, loss, their
gradients) and the encoder's pass over the strong view; both are shown. Two more steps have L_semi on the strong view
of D_u: with the contrastive term, where decoder and head run on both views of D_u, and without, where one view takes
the other's place.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import clock, interleaved, report
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Backbone, Dinov2Config

from cast_ray.common import registry
from cast_ray.contracts.records import Batch, Predictions, Targets
from cast_ray.data.formats.scenes import CATEGORIES, STYLES, draw_scene
from cast_ray.engine import objective as objective_module
from cast_ray.engine.loop import step_generator
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.optim import WeightAverage, build_optimizer, set_lr
from cast_ray.engine.world import CPU, World
from cast_ray.losses.set import criterion as set_criterion
from cast_ray.models.cast_network import CastNetwork, Output
from cast_ray.models.encoders import Encoder
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import EncoderConfig, ModelConfig, Recipe, build_recipe

PAPER_PX = (512, 1024)
PAPER_STUDENT = ModelConfig(
    encoder=EncoderConfig(name="dinov2_small"),
    hidden_dim=256,
    num_queries=100,
    num_layers=9,
    num_heads=8,
    feedforward_dim=2048,
    proposals=False,
)


class Dinov2Small(Encoder):
    """DINOv2-S by its published config, random weights; DPT's reassembled maps at strides 4 to 32."""

    PATCH = 14

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.channels = {4: 96, 8: 192, 16: 384, 32: 768}
        self.backbone = Dinov2Backbone(
            Dinov2Config(
                hidden_size=384,
                num_hidden_layers=12,
                num_attention_heads=6,
                patch_size=self.PATCH,
                image_size=518,
                out_indices=[3, 6, 9, 12],
                reshape_hidden_states=True,
            )
        )
        self.reassemble = nn.ModuleList(nn.Conv2d(384, width, 1) for width in self.channels.values())

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        size = [-(-n // self.PATCH) * self.PATCH for n in pixels.shape[-2:]]
        maps = self.backbone(F.interpolate(pixels, size=size, mode="bilinear")).feature_maps
        return {
            stride: F.interpolate(project(x), size=[n // stride for n in pixels.shape[-2:]], mode="bilinear")
            for stride, project, x in zip(self.channels, self.reassemble, maps)
        }


def shapes_case(column: str | None) -> tuple[ModelConfig, Recipe, Batch, int]:
    recipe = build_recipe("shapes", overrides={"contrastive": column or "paper"})
    num_labelled = recipe.stages.distill.batch_labelled
    labels = {identifier: i for i, (identifier, _) in enumerate(CATEGORIES)}
    images, targets, truths = [], [], []
    for seed in range(num_labelled + recipe.stages.distill.batch_unlabelled):
        pixels, instances = draw_scene(STYLES["target"], np.random.SeedSequence(seed))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        masks = torch.from_numpy(np.stack([mask for _, mask in instances]))
        targets.append(Targets(masks, torch.tensor([labels[c] for c, _ in instances]), torch.ones(len(masks))))
        truths.append(((masks.cumsum(0) * masks).amax(0)).to(torch.int16))
    return recipe.student, recipe, as_batch(torch.stack(images), targets, num_labelled), len(CATEGORIES)


def paper_case(column: str | None) -> tuple[ModelConfig, Recipe, Batch, int]:
    overrides = {
        "contrastive": column or "paper",
        "contrastive.feature_stride": 8 if column == "paper" else None,
        "stages.distill.batch_labelled": 1,
        "stages.distill.batch_unlabelled": 1,
    }
    g = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(2):
        masks = torch.zeros(10, *PAPER_PX, dtype=torch.bool)
        for mask in masks:
            top, left = (int(torch.randint(0, n - 120, (), generator=g)) for n in PAPER_PX)
            mask[top : top + 120, left : left + 120] = True
        targets.append(Targets(masks, torch.randint(0, 8, (10,), generator=g), torch.ones(10)))
    images = torch.randint(0, 256, (2, 3, *PAPER_PX), generator=g, dtype=torch.uint8)
    return PAPER_STUDENT, build_recipe("coco", overrides=overrides), as_batch(images, targets, 1), 8


def as_batch(images: Tensor, targets: list[Targets], num_labelled: int) -> Batch:
    unknown = torch.full((len(images), *images.shape[-2:]), -1, dtype=torch.int16)
    strong = (images.float() * 0.8 + 20).to(torch.uint8)
    return Batch(images, strong, torch.ones_like(unknown, dtype=torch.bool), targets, num_labelled, unknown, unknown)


CASES = {"shapes": shapes_case, "paper": paper_case}


class Step:
    """One optimiser step, whole or cut into timed parts."""

    def __init__(self, case: str, column: str | None, now: Callable[[], float], semi_view: str = "weak"):
        model, recipe, self.batch, num_classes = CASES[case](column)
        config = recipe.contrastive if column else None
        self.train, self.now = recipe.stages.distill, now
        torch.manual_seed(0)
        with mock.patch.dict(registry.ROWS["encoders"], dinov2_small=f"{__name__}:Dinov2Small"):
            self.network = CastNetwork(build_segmenter(model, num_classes, seed=0), config).train()
        loss = recipe.loss.model_copy(update={"semi_view": semi_view})
        self.objective = Objective(loss, config, proposals=model.proposals)
        self.optimizer = build_optimizer(self.network, self.train)
        self.average = WeightAverage(self.network, self.train.ema)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = self.now()
        yield
        self.current[part] += self.now() - start

    def whole(self) -> float:
        """As in `engine.loop.train`; returns its seconds."""
        start = self.now()
        self.backward()
        self.update()
        return self.now() - start

    def backward(self) -> None:
        batch, objective = self.batch, self.objective
        strong_from = batch.num_labelled if objective.is_semi_strong else None
        output = self.network(batch.weak, batch.strong if objective.reads_strong else None, (), strong_from)
        terms, _ = self.objective(output, self.batch, 0, step_generator(0, 0, CPU))
        self.weighted(terms).backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), self.train.clip_norm)
        set_lr(self.optimizer, 0, self.train)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()

    def weighted(self, terms: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        weights = {name: self.objective.weights[name] for name in terms}
        return weighted_sum(terms, weights, World().all_reduce_sum, 1)[0]

    def cut(self) -> None:
        """One step up to the gradients, every part timed by itself."""
        self.current: dict[str, float] = defaultdict(float)
        network, batch, projector = self.network, self.batch, self.network.projector
        with self.timed("encoder, decoder, head: forward"):
            predictions = network.segmenter(batch.weak)
        leaves = Predictions(
            [leaf(t) for t in predictions.class_logits],
            [leaf(t) for t in predictions.mask_logits],
            {stride: leaf(t) for stride, t in predictions.features.items()},
            {name: leaf(t) for name, t in predictions.auxiliary.items()},
        )
        output = Output(leaves)
        if projector is not None:
            with (
                self.timed("strong view: encoder"),
                torch.set_grad_enabled(projector.config.strong_grad),
            ):
                strong = network.segmenter.encode(batch.strong)[network.stride]
            strong_leaf = leaf(strong)
            with self.timed("contrastive: projection"):
                z = projector(leaves.features[network.stride], strong_leaf)
            z_leaves = [leaf(t) for t in z]
            output = Output(leaves, z_leaves[0], z_leaves[1])
        with (
            self.within("set loss", objective_module, "set_loss"),
            self.within("set loss: matching", set_criterion, "match_layers"),
            self.within("proposals", objective_module, "proposal_loss"),
            self.within("contrastive: loss", objective_module, "contrastive_loss"),
        ):
            terms, _ = self.objective(output, batch, 0, step_generator(0, 0, CPU))
        self.current["set loss"] -= self.current["set loss: matching"]
        terms_of = {"set loss": ("class", "mask", "dice"), "proposals": ("proposal",), "contrastive: loss": ("pxl",)}
        for part, marks in terms_of.items():
            own = {n: pair for n, pair in terms.items() if n.split("/")[-1].startswith(marks)}
            if own:
                with self.timed(part):
                    self.weighted(own).backward()
        if projector is not None:
            with self.timed("contrastive: projection"):
                backward(z, z_leaves)
            with self.timed("strong view: encoder"):
                backward([strong], [strong_leaf])
        with self.timed("encoder, decoder, head: backward"):
            backward(tensors_of(predictions), tensors_of(leaves))

    def parts(self) -> float:
        """A cut step and its update, part by part added to `seconds`; returns its seconds."""
        start = self.now()
        self.cut()
        with self.timed("clipping, optimiser, weight average"):
            self.update()
        for part, value in self.current.items():
            self.seconds[part].append(value)
        return self.now() - start

    @contextmanager
    def within(self, part: str, module: Any, name: str) -> Iterator[None]:
        real = getattr(module, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.timed(part):
                return real(*arguments, **options)

        with mock.patch.object(module, name, timed):
            yield


def tensors_of(predictions: Predictions) -> list[Tensor]:
    maps = (*predictions.features.values(), *predictions.auxiliary.values())
    return [*predictions.class_logits, *predictions.mask_logits, *maps]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def backward(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Hands the gradients that the cut leaves have gathered to the outputs they were cut from."""
    pairs = [(o, leaf.grad) for o, leaf in zip(outputs, leaves) if leaf.grad is not None and o.requires_grad]
    torch.autograd.backward([o for o, _ in pairs], [grad for _, grad in pairs])


def check(step: Step) -> None:
    """The cut step has the gradients of the whole one."""
    step.backward()
    wanted = {name: p.grad for name, p in step.network.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad(set_to_none=True)
    step.cut()
    for name, p in step.network.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-5 * float(wanted[name].abs().max()))
    step.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: both")
    parser.add_argument("--column", choices=("paper", "released"), action="append", help="default: both")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for a machine others use too")
    parser.add_argument("--repeats", type=int, help="default: 20 of shapes, 3 of paper")
    options = parser.parse_args()
    torch.set_num_threads(1)
    now = clock(options.cpu)
    for case in options.case or CASES:
        for column in options.column or ("paper", "released"):
            breakdown(case, column, options.repeats or {"shapes": 20, "paper": 3}[case], now)


def breakdown(case: str, column: str, repeats: int, now: Callable[[], float]) -> None:
    step, without = Step(case, column, now), Step(case, None, now)
    if case == "shapes":
        check(step)
    strong, strong_alone = Step(case, column, now, "strong"), Step(case, None, now, "strong")
    variants = {"cut": step.parts, "with": step.whole, "without": without.whole}
    variants |= {"strong": strong.whole, "strong alone": strong_alone.whole}
    seconds = interleaved(variants, repeats, warm_up=case == "shapes")
    parameters = sum(p.numel() for p in step.network.parameters()) / 1e6
    pixels = " x ".join(map(str, step.batch.weak.shape))
    print(f"{case}, contrastive={column}: {parameters:.1f} M parameters, images {pixels}, n={repeats}, medians")
    medians = {part: statistics.median(values[-repeats:]) for part, values in step.seconds.items()}
    total = sum(medians.values())
    for part, value in medians.items():
        print(f"  {part:40s} {1000 * value:10.1f} ms {100 * value / total:6.1f} %")
    term = sum(v for part, v in medians.items() if part.startswith("contrastive"))
    print(f"  {'the step, parts added up':40s} {1000 * total:10.1f} ms   contrastive term {100 * term / total:.1f} %")
    whole = {name: statistics.median(values) for name, values in seconds.items()}
    report(f"step_with_contrastive_{column}_{case}", whole["with"], whole["without"], "s")
    report(f"step_with_semi_on_the_strong_view_and_contrastive_{column}_{case}", whole["strong"], whole["with"], "s")
    report(f"step_with_semi_on_the_strong_view_alone_{case}", whole["strong alone"], whole["without"], "s")


if __name__ == "__main__":
    main()
