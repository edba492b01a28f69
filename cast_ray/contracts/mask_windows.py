"""Windows of local masks: where in an image the mask of a query may lie."""

from __future__ import annotations

import torch

RADIUS_CELLS = 2.0
"""Standard deviation of every window before training, in cells of the proposals' grid."""


def window_logits(
    windows_BN4: torch.Tensor, tokens_BN: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Returns the logarithm of a Gaussian around each token, which is added to the logits of the token's mask.

    A pixel lies at (y, x) and a token at (i, j), both in cells of the grid and measured to their middle. With
    r = RADIUS_CELLS and a window (dy, dx, a, b) the value is
    -exp(a)/2 ((y - i - dy) / r)^2 - exp(b)/2 ((x - j - dx) / r)^2: the window is moved by (dy, dx), and a and b make it
    narrower. Nothing depends on where the token lies or on how large the image is.

    Args:
        windows_BN4: float [B, N, 4]: dy, dx, a, b; zeros are the window before training.
        tokens_BN: int64 [B, N], places of the tokens in the flattened grid.
        grid: h and w, in cells.
        size: H and W of the masks, which lie edge to edge with the grid.

    Returns:
        float32 [B, N, H, W], nowhere above 0.
    """
    windows_BN4 = windows_BN4.float()
    cells_BN2 = torch.stack([tokens_BN // grid[1], tokens_BN % grid[1]], dim=-1) + 0.5
    centres_BN2, sharpness_BN2 = cells_BN2 + windows_BN4[..., :2], windows_BN4[..., 2:].exp() / 2
    along = []
    for axis in range(2):
        middles_P = (torch.arange(size[axis], device=windows_BN4.device) + 0.5) * (grid[axis] / size[axis])
        distance_BNP = (middles_P - centres_BN2[..., axis, None]) / RADIUS_CELLS
        along.append(-sharpness_BN2[..., axis, None] * distance_BNP.square())
    return along[0][..., :, None] + along[1][..., None, :]
