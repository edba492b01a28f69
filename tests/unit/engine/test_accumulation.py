"""A step in parts against the step at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from training_scenes import CONTRAST, LOSS, NUM_CLASSES, batches, make_batch, make_network, run

from cast_ray.contracts.records import Batch
from cast_ray.engine.accumulation import PartedForward
from cast_ray.engine.loop import RunSettings, train
from cast_ray.engine.objective import Objective, weighted_sum
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import ContrastiveConfig, EncoderConfig, LossConfig, ModelConfig, TrainConfig

SEMI = LOSS.model_copy(update={"lambda_semi": 1.0})
STRONG = SEMI.model_copy(update={"semi_view": "strong"})
# With parts of one image, each would have no other image at all.
CROSS = CONTRAST.model_copy(update={"scope": "cross-image"})
CONFIG = TrainConfig(steps=4, lr=1e-3, ema=0.5)
COUNTS = (1, 7, 4, 0)


def stream() -> Iterator[Batch]:
    return batches(0, CONFIG.steps, COUNTS, num_labelled=2)


CASES = {
    "supervised": (LOSS, None),
    "contrastive": (SEMI, CONTRAST),
    "across images": (SEMI, CROSS),
    "without gradients of the strong view": (SEMI, CROSS.model_copy(update={"strong_grad": False})),
    "pseudo-labels on the strong view": (STRONG, None),
    "both on the strong view": (STRONG, CROSS),
    "both, without gradients of the projection": (STRONG, CROSS.model_copy(update={"strong_grad": False})),
}


def gradients(loss: LossConfig, contrastive: ContrastiveConfig | None, parts: int) -> dict[str, torch.Tensor]:
    network = make_network(contrastive).train()
    batch = make_batch(COUNTS, num_labelled=2)
    objective = Objective(loss, contrastive)
    forward = PartedForward(network, network, parts, nullcontext, seed=0)
    strong_from = batch.num_labelled if objective.is_semi_strong else None
    output = forward(batch.weak, batch.strong if objective.reads_strong else None, batch.targets, strong_from)
    terms, _ = objective(output, batch, 0, torch.Generator().manual_seed(0))
    weighted_sum(terms, objective.weights, World().all_reduce_sum, 1)[0].backward()
    forward.backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_parts_give_the_gradients_of_the_whole(case: str, parts: int) -> None:
    whole, parted = gradients(*CASES[case], 1), gradients(*CASES[case], parts)
    largest = max(float(g.abs().max()) for g in whole.values())
    assert largest > 0.01
    for name, wanted in whole.items():
        torch.testing.assert_close(parted[name], wanted, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert all(not parted[name].any() for name in set(parted) - set(whole))


@pytest.mark.parametrize("parts", [2, 9])
@pytest.mark.parametrize("case", CASES)
def test_a_run_in_parts_ends_where_the_whole_does(case: str, parts: int) -> None:
    loss, contrastive = CASES[case]
    whole = run(CONFIG, stream(), loss=loss, contrastive=contrastive)
    parted = run(CONFIG.model_copy(update={"accumulate": parts}), stream(), loss=loss, contrastive=contrastive)
    first = make_network(contrastive).segmenter.state_dict()
    moved = max(float((whole.weights[n] - first[n]).abs().max()) for n in first)
    for name, wanted in whole.weights.items():
        # AdamW divides by the gradient's size: where that is rounding alone (biases of keys), so is the step.
        torch.testing.assert_close(parted.weights[name], wanted, rtol=0, atol=0.05 * moved, msg=name)
    for found, curve in zip(parted.curve, whole.curve, strict=True):
        assert found == pytest.approx(curve, rel=1e-3, abs=1e-5)
    if contrastive is not None:
        assert whole.curve[-1]["pxl"] > 0


class Peak:
    """Most bytes that a step keeps for its backward pass at a time, by hooks of autograd."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.now += tensor.numel() * tensor.element_size()
        self.most = max(self.most, self.now)
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.now -= tensor.numel() * tensor.element_size()
        return tensor


def test_parts_hold_less() -> None:
    def most(parts: int) -> int:
        peak = Peak()
        with torch.autograd.graph.saved_tensors_hooks(peak.pack, peak.unpack):
            config = CONFIG.model_copy(update={"accumulate": parts, "steps": 1})
            run(config, iter([make_batch((2,) * 8, num_labelled=4)]), loss=SEMI)
        return peak.most

    assert most(8) < 0.35 * most(1)


def test_random_layers_draw_the_same_in_both_passes() -> None:
    """DINOv3 rescales its positions at random in training: with other ones, gradients would belong to no loss."""
    encoder = EncoderConfig(name="dinov3-s")
    config = ModelConfig(encoder=encoder, hidden_dim=16, num_queries=3, num_layers=1, num_heads=2, proposals=False)
    network = CastNetwork(build_segmenter(config, NUM_CLASSES, 0), None).train()
    images = make_batch((2, 3), num_labelled=2).weak
    forward = PartedForward(network, network, 2, torch.no_grad, seed=5)
    first = forward(images, None, []).predictions.mask_logits[-1]
    again = [forward._run(network, i).predictions.mask_logits[-1] for i in range(2)]
    assert torch.equal(first, torch.cat(again))
    other = PartedForward(network, network, 2, torch.no_grad, seed=6)(images, None, []).predictions.mask_logits[-1]
    assert not torch.equal(first, other)


def test_a_resumed_run_draws_what_it_would_have_drawn() -> None:
    """Dropped paths of Swin come from the step's seed, not from how often the process was started."""
    encoder = EncoderConfig(name="swin-t")
    config = ModelConfig(encoder=encoder, hidden_dim=16, num_queries=3, num_layers=1, num_heads=2, proposals=False)

    def step(before: int) -> list[dict[str, float]]:
        network = CastNetwork(build_segmenter(config, NUM_CLASSES, 0), None)
        torch.manual_seed(before)
        objective = Objective(LOSS, None, proposals=False)
        batch = iter([make_batch((2, 3), num_labelled=2)])
        result = train(network, objective, batch, TrainConfig(steps=1, ema=0), RunSettings("f", 0, World()))
        return [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in result.curve]

    assert step(1) == step(2)
