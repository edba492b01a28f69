"""Windows of local masks: where in the image the mask of a query may lie."""

from __future__ import annotations

import torch

RADIUS_CELLS = 2.0
"""Standard deviation of a window as it is before training, in cells of the proposals' grid."""


def window_logits(
    windows_BN4: torch.Tensor, tokens_BN: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """The logarithm of a Gaussian around each token, which is added to the logits of the token's mask.

    With (y, x) the middle of a pixel and (i, j) that of the token's cell, both in cells of the grid, and r =
    RADIUS_CELLS: logit(y, x) = -exp(a)/2 ((y - i - dy) / r)^2 - exp(b)/2 ((x - j - dx) / r)^2. Everything is relative
    to the token, so that a window is the same wherever the token lies and however large the image is.

    Args:
        windows_BN4: float [B, N, 4]: dy, dx, a, b.
        tokens_BN: int64 [B, N], places of the tokens in the flattened grid.
        grid: h, w of the tokens.
        size: H, W of the masks, edge to edge with the grid.

    Returns:
        float32 [B, N, H, W], at most 0.
    """
    windows_BN4 = windows_BN4.float()
    cells_BN2 = torch.stack([tokens_BN // grid[1], tokens_BN % grid[1]], dim=-1) + 0.5
    centres_BN2, sharpness_BN2 = cells_BN2 + windows_BN4[..., :2], windows_BN4[..., 2:].exp() / 2
    sides = []
    for axis in range(2):
        pixel_P = (torch.arange(size[axis], device=windows_BN4.device) + 0.5) * (grid[axis] / size[axis])
        distance_BNP = (pixel_P - centres_BN2[..., axis, None]) / RADIUS_CELLS
        sides.append(-sharpness_BN2[..., axis, None] * distance_BNP.square())
    return sides[0][..., :, None] + sides[1][..., None, :]
