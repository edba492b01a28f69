"""Both views through the network: whose gradients flow where, and half precision end to end."""

from __future__ import annotations

import pytest
import torch
from training_scenes import CONTRAST, LOSS, make_batch, make_network

from cast_ray.engine.objective import Objective
from cast_ray.losses.contrastive.loss import contrastive_loss
from cast_ray.losses.contrastive.pixel_problem import PixelViews
from cast_ray.models.segmenter import Segmenter
from cast_ray.recipe import CONTRASTIVE_PRESETS, ContrastiveConfig

BATCH = make_batch((2, 3, 1, 2), num_labelled=2)


def test_without_a_contrastive_term_there_is_no_projector_and_no_second_pass() -> None:
    network = make_network(None)
    output = network(BATCH.weak, BATCH.strong)
    assert network.projector is None and output.z_weak is None and output.z_strong is None


@pytest.mark.parametrize("head", ["shared", "frozen", "ema"])
@pytest.mark.parametrize("strong_grad", [True, False])
def test_the_strong_branch_trains_the_encoder_only_where_the_recipe_says_so(head: str, strong_grad: bool) -> None:
    network = make_network(CONTRAST.model_copy(update={"head": head, "strong_grad": strong_grad}))
    output = network(BATCH.weak, BATCH.strong)
    assert output.z_weak is not None and output.z_strong is not None
    assert output.z_weak.requires_grad and output.z_strong.requires_grad == strong_grad
    if strong_grad:
        output.z_strong[:, 0].sum().backward()
        assert all(p.grad is not None for p in network.segmenter.encoder.stages[0].parameters())
        trained = [p.grad is not None for p in network.projector.head.parameters()]
        assert all(trained) if head == "shared" else not any(trained)


def test_views_are_not_mixed_up() -> None:
    network = make_network(CONTRAST).eval()
    with torch.no_grad():
        both, swapped = network(BATCH.weak, BATCH.strong), network(BATCH.strong, BATCH.weak)
    torch.testing.assert_close(both.z_weak, swapped.z_strong)
    torch.testing.assert_close(both.z_strong, swapped.z_weak)
    assert not torch.allclose(both.z_weak, both.z_strong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("column", ["paper", "released"])
def test_gradients_of_every_parameter_are_finite_under_autocast_at_the_lowest_temperature(
    dtype: torch.dtype, column: str
) -> None:
    config = ContrastiveConfig(**CONTRASTIVE_PRESETS[column] | {"projection_dims": (8, 8), "temperature": 0.07})
    network = make_network(config)
    with torch.autocast("cpu", dtype):
        output = network(BATCH.weak, BATCH.strong)
    predictions = output.predictions
    views = PixelViews(
        output.z_weak,
        output.z_strong,
        predictions.mask_logits[-1],
        predictions.class_logits[-1],
        BATCH.valid,
        BATCH.truth_instance,
        BATCH.truth_class,
    )
    pxl = contrastive_loss(views, config, temperature=0.07)
    assert pxl.count > 0
    (pxl.sum / pxl.count).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_whole_objective_is_finite_under_autocast(dtype: torch.dtype) -> None:
    network, objective = make_network(CONTRAST), Objective(LOSS.model_copy(update={"lambda_semi": 1.0}), CONTRAST)
    with torch.autocast("cpu", dtype):
        output = network(BATCH.weak, BATCH.strong)
    terms, _ = objective(output, BATCH, 19, torch.Generator().manual_seed(0))
    assert all(total.dtype == torch.float32 for total, _ in terms.values())
    sum(total for total, _ in terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("strong_grad", [True, False])
def test_the_set_losses_can_read_the_strong_view_of_d_u(strong_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(CONTRAST.model_copy(update={"strong_grad": strong_grad})).eval()
    with torch.no_grad():
        of_weak, of_strong = network.segmenter(BATCH.weak), network.segmenter(BATCH.strong)
    without = network(BATCH.weak, BATCH.strong)
    assert without.supervised is None
    encoded: list[int] = []
    real = Segmenter._normalised  # before every pass of the encoder
    monkeypatch.setattr(Segmenter, "_normalised", lambda self, x: encoded.append(len(x)) or real(self, x))
    output = network(BATCH.weak, BATCH.strong, BATCH.targets, 2)
    assert sum(encoded) == 2 * len(BATCH.weak)  # each view of each image once, for both losses
    for name in ("class_logits", "mask_logits", "auxiliary"):
        parts = [getattr(p, name) for p in (output.supervised, of_weak, of_strong)]
        parts = [list(p.values()) if isinstance(p, dict) else p for p in parts]
        for mine, first, second in zip(*parts, strict=True):
            torch.testing.assert_close(mine[:2], first[:2])
            torch.testing.assert_close(mine[2:], second[2:])
            assert not torch.allclose(first[2:], second[2:])
    torch.testing.assert_close(output.predictions.mask_logits[-1], of_weak.mask_logits[-1])  # y is the weak view's
    torch.testing.assert_close(output.z_weak, without.z_weak)
    torch.testing.assert_close(output.z_strong, without.z_strong)
    assert output.z_strong.requires_grad == strong_grad
    output.supervised.mask_logits[-1][2:].sum().backward()
    assert all(p.grad is not None for p in network.segmenter.encoder.stages[0].parameters())


def test_without_l_pxl_the_strong_view_of_d_u_takes_the_place_of_the_weak_one() -> None:
    network = make_network(None).eval()
    mixed = torch.cat([BATCH.weak[:2], BATCH.strong[2:]])
    output = network(BATCH.weak, BATCH.strong, BATCH.targets, 2)
    assert output.supervised is None  # one pass: the predictions are what the set losses read
    torch.testing.assert_close(output.predictions.mask_logits[-1], network.segmenter(mixed).mask_logits[-1])
