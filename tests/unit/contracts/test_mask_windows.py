"""Windows of local masks."""

from __future__ import annotations

import math

import torch

from cast_ray.contracts.mask_windows import RADIUS_CELLS, window_logits


def test_a_window_is_the_logarithm_of_a_gaussian_around_its_token() -> None:
    windows = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.5, -1.0, math.log(4.0), 0.0]]])
    found = window_logits(windows, torch.tensor([[0, 4]]), (2, 3), (4, 6))
    assert found.shape == (1, 2, 4, 6)
    # Two pixels a cell: the middle of pixel (3, 5) is (1.75, 2.75), those of the tokens are (.5, .5) and (1.5, 1.5).
    plain = -(1.25**2 + 2.25**2) / (2 * RADIUS_CELLS**2)
    moved = -(4 * (1.75 - 2.0) ** 2 + (2.75 - 0.5) ** 2) / (2 * RADIUS_CELLS**2)
    torch.testing.assert_close(found[0, :, 3, 5], torch.tensor([plain, moved]))
    assert found.max() <= 0


def test_a_window_moves_with_its_token_in_an_image_of_any_size() -> None:
    window = torch.tensor([[[0.3, -0.2, 1.0, 0.5]]])
    small = window_logits(window, torch.tensor([[1 * 4 + 2]]), (4, 4), (8, 8))
    large = window_logits(window, torch.tensor([[11 * 16 + 7]]), (16, 16), (32, 32))
    torch.testing.assert_close(large[..., 20:28, 10:18], small)
