"""Label maps, in which each pixel names its instance, to RLE without a dense mask per instance."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils


def encode_regions(map_HW: np.ndarray) -> dict[int, bytes]:
    """COCO compressed RLE counts of every value of a label map.

    One pass over the pixels, whatever the number of instances: the runs of all values are found together.

    Args:
        map_HW: integer [H, W].

    Returns:
        value -> RLE counts at H x W, values rising.
    """
    height, width = map_HW.shape
    pixels = np.ascontiguousarray(map_HW.T).ravel()  # RLE runs go down the columns
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
    lengths = np.diff(starts, append=len(pixels))
    values = pixels[starts]
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    regions = {}
    for runs in np.split(order, cuts):
        begins, ends = starts[runs], starts[runs] + lengths[runs]
        counts = np.empty(2 * len(runs) + 1, dtype=np.int64)
        counts[0:-1:2] = begins - np.concatenate([[0], ends[:-1]])
        counts[1::2] = lengths[runs]
        counts[-1] = len(pixels) - ends[-1]
        rle = {"size": [height, width], "counts": counts[: -1 if counts[-1] == 0 else None].tolist()}
        regions[int(values[runs[0]])] = mask_utils.frPyObjects(rle, height, width)["counts"]
    return regions


def instance(category_id: int, rle: bytes, *, is_crowd: bool = False) -> dict[str, Any]:
    """One ground-truth instance, INSTANCE_TYPE as a dict."""
    return {"category_id": category_id, "rle": rle, "score": 1.0, "is_crowd": is_crowd, "area": None}
