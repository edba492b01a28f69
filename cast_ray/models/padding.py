"""Images of any size: padded to what an encoder takes, and its maps cut back to the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pad_to_multiple(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """Images [B, C, H, W] with zeros below and to the right, up to multiples of `multiple`."""
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, below)) if below or right else images


def cut_padding(map_BDHW: torch.Tensor, padded_hw: tuple[int, int], image_hw: tuple[int, int]) -> torch.Tensor:
    """The part of a map of the padded image that shows the image, edge to edge.

    A slice where the image ends between two of the map's pixels; else a bilinear resample whose pixels, as many as
    touch the image, share it evenly.

    Args:
        map_BDHW: float [B, D, h, w], over `padded_hw`.
        padded_hw: height and width with the padding, pixels.
        image_hw: height and width of the image, above and left in it.

    Returns:
        float [B, D, ceil(h H / H'), ceil(w W / W')].
    """
    if padded_hw == image_hw:
        return map_BDHW
    size = [-(-n * own // padded) for n, own, padded in zip(map_BDHW.shape[-2:], image_hw, padded_hw)]
    if all(n * own % padded == 0 for n, own, padded in zip(map_BDHW.shape[-2:], image_hw, padded_hw)):
        return map_BDHW[..., : size[0], : size[1]]
    height, width = (own / padded for own, padded in zip(image_hw, padded_hw))
    theta = torch.tensor([[width, 0, width - 1], [0, height, height - 1]], device=map_BDHW.device, dtype=torch.float32)
    batch = map_BDHW.shape[0]
    grid = F.affine_grid(theta.expand(batch, 2, 3), [batch, 1, *size], align_corners=False)
    resampled = F.grid_sample(map_BDHW.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return resampled.to(map_BDHW.dtype)
