"""Padding images and cutting their maps back."""

from __future__ import annotations

import pytest
import torch

from cast_ray.models.padding import cut_padding, pad_to_multiple


def ramps(height: int, width: int, padded_hw: tuple[int, int]) -> torch.Tensor:
    """[1, 2, height, width]: y and x of each map pixel's centre in the padded image."""
    y = (torch.arange(height) + 0.5) * padded_hw[0] / height
    x = (torch.arange(width) + 0.5) * padded_hw[1] / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]


def test_padding_goes_below_and_to_the_right() -> None:
    images = torch.full((1, 3, 5, 8), 7, dtype=torch.uint8)
    padded = pad_to_multiple(images, 4)
    assert padded.shape == (1, 3, 8, 8) and padded.dtype == torch.uint8
    assert torch.equal(padded[:, :, :5], images) and not padded[:, :, 5:].any()
    assert pad_to_multiple(padded, 4) is padded


def test_a_cut_between_pixels_is_a_slice() -> None:
    whole = torch.randn(2, 3, 16, 24)
    assert torch.equal(cut_padding(whole, (64, 96), (40, 52)), whole[..., :10, :13])
    assert cut_padding(whole, (64, 96), (64, 96)) is whole


@pytest.mark.parametrize("image_hw", [(512, 1024), (500, 333), (523, 1030)])
def test_a_cut_inside_a_pixel_stays_aligned(image_hw: tuple[int, int]) -> None:
    """Patches of 14 px: the map of the padded 532 x 1036 image has 38 x 74 pixels, and 3.5 px apart four times more."""
    padded = (-(-image_hw[0] // 28) * 28, -(-image_hw[1] // 28) * 28)
    for per_patch in (0.5, 1, 4):
        size = (int(padded[0] / 14 * per_patch), int(padded[1] / 14 * per_patch))
        found = cut_padding(ramps(*size, padded), padded, image_hw)
        rows, columns = (-(-n * own // whole) for n, own, whole in zip(size, image_hw, padded))
        assert found.shape == (1, 2, rows, columns)
        # Edge to edge with the image: pixel i of n is at (i + 1/2) H / n. Linear maps survive bilinear sampling.
        wanted = ramps(rows, columns, image_hw)
        step = padded[0] / size[0]
        inside = (wanted[:, :1] > step) & (wanted[:, 1:] > step)  # nearer to the corner there is nothing to mix
        torch.testing.assert_close(found * inside, wanted * inside, rtol=1e-4, atol=1e-2)


def test_gradients_flow_through_both_cuts() -> None:
    for image_hw in ((40, 52), (41, 53)):
        whole = torch.randn(1, 2, 16, 24, requires_grad=True)
        cut_padding(whole, (64, 96), image_hw).sum().backward()
        assert whole.grad is not None
        assert whole.grad.abs().sum() > 0 and not whole.grad[..., 12:, :].any()
