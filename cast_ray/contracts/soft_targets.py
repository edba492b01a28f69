"""Mask probabilities of pseudo-labels: as a teacher gives them, as they are stored, and as a crop shows them.

A label's probabilities lie on a grid of one value for each STRIDE x STRIDE pixels of its image, 8 bits each and
compressed: mask logits are no finer than that, and most of a grid is 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from cast_ray.contracts.instance import Instance, rle_of
from cast_ray.contracts.records import Targets

STRIDE = 4

AnyInstance = TypeVar("AnyInstance", bound=Instance)

BELIEFS = ("class_probs", "mask_probs")
"""What an instance tells of the query that it comes from, see `models.postprocess.to_instances`."""


def grid_hw(image_hw: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the grid over an image of so many pixels."""
    return -(-image_hw[0] // STRIDE), -(-image_hw[1] // STRIDE)


def mask_probabilities(
    mask_logits_KHW: Tensor, image_hw: tuple[int, int], resized_hw: tuple[int, int], image_px: tuple[int, int]
) -> list[bytes]:
    """Probabilities of K masks on their image's grid.

    Args:
        mask_logits_KHW: of the padded image, any float dtype.
        image_hw: the image's own size, pixels.
        resized_hw: its size inside the padding.
        image_px: the size with the padding.
    """
    size = grid_hw(image_hw)
    found = []
    for logits_HW in mask_logits_KHW:
        whole = F.interpolate(logits_HW[None, None].float(), size=tuple(image_px), mode="bilinear", align_corners=False)
        inside = whole[..., : resized_hw[0], : resized_hw[1]]
        grid = F.interpolate(inside, size=size, mode="bilinear", align_corners=False, antialias=True)[0, 0]
        levels = grid.sigmoid().mul(255).round().to(torch.uint8).cpu().numpy()
        found.append(zlib.compress(levels.tobytes(), 1))
    return found


def with_beliefs(instance: AnyInstance, num_classes: int) -> AnyInstance:
    """An instance that tells its beliefs: its query's, or else what its score, class and mask say of them.

    A score s of class c is P(c) = s and P(no object) = 1 - s; a mask is its own probability.
    """
    if "mask_probs" in instance:
        return instance
    probs = np.zeros(num_classes + 1)
    probs[[instance["label"], -1]] = instance["score"], 1 - instance["score"]
    mask_HW = coco_mask.decode(rle_of(instance))
    rows, columns = grid_hw(instance["size"])
    levels = cv2.resize(mask_HW * np.uint8(255), (columns, rows), interpolation=cv2.INTER_AREA)
    beliefs = {"class_probs": probs.tolist(), "mask_probs": zlib.compress(levels.tobytes(), 1)}
    return cast(AnyInstance, {**instance, **beliefs})


def sample_probabilities(stored: bytes, image_hw: Sequence[int], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Probabilities at points of the image, bilinear between the values of the grid and level beyond its edge.

    Args:
        stored: from `mask_probabilities`.
        image_hw: the image's size, pixels.
        y, x: float [h], [w], pixels from the upper and left edge of the image: 0.5 is the middle of the first pixel.

    Returns:
        uint8 [h, w], 255 for probability 1.
    """
    rows, columns = grid_hw(image_hw)
    grid = np.frombuffer(zlib.decompress(stored), np.uint8).reshape(rows, columns)
    x_HW, y_HW = np.meshgrid(x * columns / image_hw[1] - 0.5, y * rows / image_hw[0] - 0.5)
    places = (x_HW.astype(np.float32), y_HW.astype(np.float32))
    return cv2.remap(grid, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def mask_targets(target: Targets) -> Tensor:
    """What the masks of an image's matched queries shall be, [N, H, W]: its masks, or the teacher's probabilities.

    Where another label has the pixel and this one does not, the target is 0, whatever the teacher gave this one there:
    a pixel that painting gave away is not half an object's.
    """
    if target.mask_probs is None:
        return target.masks
    masks = target.masks
    probs = F.interpolate(
        target.mask_probs[None].float() / 255, size=masks.shape[-2:], mode="bilinear", align_corners=False
    )[0]
    return probs.masked_fill((masks.sum(0) > 0) & ~masks, 0.0)
