"""Projection heads: unit length, head modes, stop-gradients."""

import pytest
import torch

from cast_ray.models.projector import Projector, select_stride
from cast_ray.recipe import CONTRASTIVE_PRESETS, ContrastiveConfig


def make(**changes):
    torch.manual_seed(0)
    return Projector(6, ContrastiveConfig(projection_dims=(8, 5), **changes))


FEATURES = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(1))


def step(projector):
    with torch.no_grad():
        for p in projector.head.parameters():
            p += 0.5


def strong_of(projector, features=FEATURES):
    return projector(FEATURES, features)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unit_length_in_float32_under_autocast(dtype):
    with torch.autocast("cpu", dtype=dtype):
        views = make()(FEATURES, -FEATURES)
    for z in views:
        assert z.shape == (2, 5, 3, 4) and z.dtype == torch.float32
        torch.testing.assert_close(z.norm(dim=1), torch.ones(2, 3, 4))


def test_each_location_goes_through_the_mlp():
    projector = make()
    weak, strong = projector(FEATURES, -FEATURES)
    first, _, second = projector.head
    for b, y, x in ((0, 0, 1), (1, 2, 3)):
        for z, sign in ((weak, 1), (strong, -1)):
            f = sign * FEATURES[b, :, y, x]
            g = second.weight @ (first.weight @ f + first.bias).clamp(min=0) + second.bias
            torch.testing.assert_close(z[b, :, y, x], g / g.norm())


def test_released_preset_is_the_published_head():
    config = ContrastiveConfig(**CONTRASTIVE_PRESETS["released"])
    projector = Projector(768, config)
    shapes = [tuple(p.shape) for p in projector.head.parameters()]
    assert shapes == [(128, 768), (128, 128), (128, 128)]  # no bias
    assert [type(layer).__name__ for layer in projector.head] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert not any(p.requires_grad for p in projector.strong_head.parameters())


def test_shared_head_follows_and_has_the_gradients_of_both_views():
    projector = make()
    for _ in range(2):
        weak, strong = projector(FEATURES, FEATURES)
        assert torch.equal(weak, strong)
        step(projector)
    both = torch.autograd.grad(sum(z[:, 0].sum() for z in projector(FEATURES, -FEATURES)), projector.parameters())
    apart = [torch.autograd.grad(projector(FEATURES, -FEATURES)[i][:, 0].sum(), projector.parameters()) for i in (0, 1)]
    for joint, weak, strong in zip(both, *apart):
        torch.testing.assert_close(joint, weak + strong)
        assert strong.any()


def test_frozen_head_stays_at_the_start():
    projector = make(head="frozen")
    start = projector(FEATURES, FEATURES)[0].detach()
    step(projector)
    projector.update_ema()
    torch.testing.assert_close(strong_of(projector), start)
    assert not torch.allclose(projector(FEATURES, FEATURES)[0], start)
    restored = make(head="frozen")
    step(restored)
    restored.load_state_dict(projector.state_dict())
    assert torch.equal(strong_of(restored), strong_of(projector))


def test_ema_head_moves_by_its_decay():
    projector = make(head="ema", head_ema=0.9)
    before = [p.clone() for p in projector.strong_head.parameters()]
    step(projector)
    projector.update_ema()
    for average, old, new in zip(projector.strong_head.parameters(), before, projector.head.parameters()):
        torch.testing.assert_close(average, 0.9 * old + 0.1 * new)
        assert not average.requires_grad


@pytest.mark.parametrize("head", ["shared", "frozen", "ema"])
def test_strong_grad_decides_whether_the_strong_view_gets_gradients(head):
    features = FEATURES.clone().requires_grad_()
    assert not strong_of(make(head=head, strong_grad=False), features).requires_grad
    strong_of(make(head=head, strong_grad=True), features)[:, 0].sum().backward()
    assert features.grad.any()


def test_zero_features_without_bias_have_finite_gradients():
    features = torch.zeros(2, 6, 3, 4, requires_grad=True)
    strong_of(make(projection_bias=False), features).sum().backward()
    assert features.grad.isfinite().all()


def test_stride_selection():
    maps = {4: FEATURES, 8: FEATURES, 32: FEATURES}
    strides = [select_stride(maps, ContrastiveConfig(feature_stride=s)) for s in (2, 4, 9, 32, 64, None)]
    assert strides == [4, 4, 8, 32, 32, 32]
    with pytest.raises(ValueError, match="at least one encoder map"):
        select_stride({}, ContrastiveConfig())


def test_no_width_is_refused():
    with pytest.raises(ValueError, match="projection_dims"):
        Projector(4, ContrastiveConfig(projection_dims=()))
