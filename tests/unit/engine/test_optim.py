"""Learning-rate schedules, the optimiser's groups and the weight average, against slow references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cast_ray.engine.optim import WeightAverage, build_optimizer, lr_factor, set_lr
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import build_segmenter, outline
from cast_ray.models.vit_encoders import ViTEncoder
from cast_ray.recipe import ContrastiveConfig, EncoderConfig, ModelConfig, TrainConfig

TINY = ModelConfig(
    encoder=EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2),
    hidden_dim=16,
    num_queries=4,
    num_layers=1,
    feedforward_dim=16,
)
VIT = {"widths": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "stem_stride": 2}


def factors(**options) -> list[float]:
    config = TrainConfig(**{"steps": 10} | options)
    return [lr_factor(step, config) for step in range(config.steps)]


def test_hold_decay_holds_then_falls_linearly() -> None:
    found = factors(schedule="hold-decay", decay_fraction=0.4)
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert factors(schedule="hold-decay", decay_fraction=0) == [1.0] * 10
    assert factors(schedule="hold-decay", decay_fraction=1) == pytest.approx([1 - k / 10 for k in range(10)])


def test_poly_is_the_released_schedule() -> None:
    assert factors(schedule="poly", poly_power=0.9) == pytest.approx([(1 - k / 10) ** 0.9 for k in range(10)])


def test_constant() -> None:
    assert factors(schedule="constant") == [1.0] * 10


@pytest.mark.parametrize("schedule", ["constant", "poly", "hold-decay"])
def test_warm_up_rises_linearly_to_the_schedule(schedule: str) -> None:
    plain, warmed = factors(schedule=schedule), factors(schedule=schedule, warmup_steps=3)
    assert [w / p for w, p in zip(warmed, plain)] == pytest.approx([0.25, 0.5, 0.75, *[1] * 7])


def test_a_stage_without_steps_has_a_rate() -> None:
    assert lr_factor(0, TrainConfig(steps=0)) == 1.0


def make_network() -> CastNetwork:
    return CastNetwork(build_segmenter(TINY, 3, seed=0), ContrastiveConfig(head="frozen", projection_dims=(8, 8)))


def test_groups_cover_every_trainable_weight_once() -> None:
    network = make_network()
    config = TrainConfig(lr=1e-2, encoder_lr_factor=0.1, weight_decay=0.3)
    optimizer = build_optimizer(network, config)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert any(not p.requires_grad for p in network.parameters())  # the frozen head
    encoder = {id(p) for p in network.segmenter.encoder.parameters()}
    assert encoder
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.ndim > 1 and id(p) not in embeddings(network) else 0.0)
            assert group["base_lr"] == pytest.approx(1e-3 if id(p) in encoder else 1e-2)


def embeddings(network: nn.Module) -> set[int]:
    return {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}


@pytest.mark.parametrize("name", ["vit", "swin-t", "sam2-s", "dinov2-s-reg"])
def test_learnt_positions_and_tokens_are_not_decayed(name: str) -> None:
    model = outline(TINY.model_copy(update={"encoder": EncoderConfig(name=name, **VIT)}), 3)
    optimizer = build_optimizer(CastNetwork(model, None), TrainConfig(weight_decay=0.3))
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    names = {n for n, p in model.encoder.named_parameters() if p.ndim > 1 and id(p) in free}
    wanted = {
        "vit": {"cls_token", "position_embeddings"},
        "dinov2-s-reg": {"cls_token", "position_embeddings", "register_tokens"},
        "swin-t": {"relative_position_bias_table"},
        "sam2-s": {"pos_embed", "pos_embed_window"},
    }
    assert {n.rpartition(".")[2] for n in names} == wanted[name]


@pytest.mark.parametrize("name", ["vit", "swin-t", "dinov3-s"])
def test_biases_are_decayed_where_the_recipe_says_so(name: str) -> None:
    """As in Mask2Former: of the vectors only those of norms stay free, beside embeddings."""
    model = outline(TINY.model_copy(update={"encoder": EncoderConfig(name=name, **VIT)}), 3)
    network = CastNetwork(model, None)

    def free(**fields: Any) -> set[str]:
        optimizer = build_optimizer(network, TrainConfig(weight_decay=0.3, **fields))
        ids = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
        return {n for n, p in network.named_parameters() if id(p) in ids}

    of_norms = {
        f"{n}.{leaf}"
        for n, m in network.named_modules()
        if isinstance(m, nn.LayerNorm | nn.GroupNorm)
        for leaf, _ in m.named_parameters()
    }
    without, with_biases = free(), free(decay_biases=True)
    vectors = {n for n, p in network.named_parameters() if p.ndim <= 1 and p.requires_grad and "token" not in n}
    assert with_biases < without and of_norms & without == of_norms & with_biases != set()
    assert without - with_biases == vectors - of_norms - {n for n in vectors if "bias_table" in n}
    assert any(n.endswith("bias") for n in without - with_biases)


def test_each_layer_learns_slower_than_the_next() -> None:
    model = build_segmenter(TINY.model_copy(update={"encoder": EncoderConfig(name="vit", **VIT)}), 3, seed=0)
    config = TrainConfig(lr=1e-2, encoder_lr_factor=0.1, layer_decay=0.5)
    optimizer = build_optimizer(CastNetwork(model, None), config)
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert isinstance(model.encoder, ViTEncoder)
    backbone: Any = model.encoder.backbone
    for depth, layer in enumerate(backbone.encoder.layer):
        found = {rates[id(p)] for p in layer.parameters()}
        assert len(found) == 1 and found.pop() == pytest.approx(1e-3 * 0.5 ** (3 - depth))
    assert rates[id(backbone.layernorm.weight)] == pytest.approx(1e-3)  # after the last layer
    assert rates[id(backbone.embeddings.cls_token)] == pytest.approx(1e-3 * 0.5**4)
    # DPT's reassemble stage is new, as decoder and head are.
    assert {rates[id(p)] for p in model.encoder.pyramid.parameters()} == {1e-2}


def test_vectors_are_not_decayed() -> None:
    network = make_network()
    optimizer = build_optimizer(network, TrainConfig(lr=1e-2, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        decayed = p.ndim > 1 and p.requires_grad and id(p) not in embeddings(network)
        factor = 1 - 1e-2 * 0.5 if decayed else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_set_lr_scales_each_group_by_its_own_peak() -> None:
    config = TrainConfig(steps=10, lr=1e-2, encoder_lr_factor=0.1, schedule="poly")
    optimizer = build_optimizer(make_network(), config)
    for step in (0, 7):
        factor = set_lr(optimizer, step, config)
        assert factor == lr_factor(step, config)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert sorted(rates) == pytest.approx([1e-3 * factor, 1e-2 * factor])


@torch.no_grad()
def walk(module: nn.Linear, seed: int) -> None:
    module.weight.add_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.995])
def test_weight_average_against_a_slow_reference(decay: float) -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module, decay)
    wanted = module.weight.detach().clone().double()
    for t in range(120):
        walk(module, t)
        average.update()
        d = min(decay, (1 + t) / (10 + t))
        wanted = d * wanted + (1 - d) * module.weight.detach().double()
    live = module.weight.detach().clone()
    torch.testing.assert_close(average.average[0].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.weight, live)  # averaging leaves the live weights alone
    average.write_to(module)
    torch.testing.assert_close(module.weight.detach().double(), wanted, rtol=1e-5, atol=1e-5)


def test_weight_average_goes_on_from_its_state() -> None:
    whole, first, second = (nn.Linear(3, 2) for _ in range(3))
    for module in (first, second):
        module.load_state_dict(whole.state_dict())
    one = WeightAverage(whole, 0.9)
    for s in range(20):
        walk(whole, s)
        one.update()
    two = WeightAverage(first, 0.9)
    for s in range(8):
        walk(first, s)
        two.update()
    second.load_state_dict(first.state_dict())
    three = WeightAverage(second, 0.9)
    three.load_state_dict(two.state_dict())
    for s in range(8, 20):
        walk(second, s)
        three.update()
    assert three.updates == one.updates == 20
    assert all(torch.equal(a, b) for a, b in zip(one.average, three.average))
