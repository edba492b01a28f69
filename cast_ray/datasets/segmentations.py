"""COCO segmentations from files nobody vouches for, to RLE bytes that pycocotools can decode safely.

pycocotools writes outside its buffers or aborts the process on hostile polygons and run lengths, and reads a list of
four numbers as a box: everything is checked here before it is called.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from cast_ray.records import mask_areas, rle_runs

_MAX_CHARACTERS_PER_COUNT = 7  # of 5 bits each: more than any run length of an image that is read


def encode_segmentation(segmentation: Any, height: int, width: int) -> bytes:
    """One annotation's segmentation as COCO compressed RLE counts at the image's own size.

    Args:
        segmentation: the JSON value: a list of polygons [x0, y0, x1, y1, ...] in pixels, one such polygon, or an object
            with `size` and compressed (string) or uncompressed (list) `counts`. Polygons may pass the image's border by
            up to one image size: they are cut off there.
        height: of the image, pixels.
        width: of the image, pixels.

    Raises:
        ValueError: what is wrong with it, in a few words, as a reason to skip the annotation.
    """
    if isinstance(segmentation, dict):
        counts = _encode_rle(segmentation, height, width)
    elif isinstance(segmentation, list) and segmentation:
        counts = _encode_polygons(segmentation, height, width)
    elif segmentation is None or segmentation == []:
        raise ValueError("no segmentation")
    else:
        raise ValueError(f"segmentation is of type {type(segmentation).__name__}: expected polygons or RLE")
    return counts


def encode_mask(mask: np.ndarray) -> bytes:
    """COCO compressed RLE counts of a mask bool [H, W]."""
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def _encode_polygons(polygons: list[Any], height: int, width: int) -> bytes:
    if isinstance(polygons[0], int | float):
        polygons = [polygons]
    area = 0.0
    parts = []
    for polygon in polygons:
        if not isinstance(polygon, list):
            raise ValueError(f"polygon is of type {type(polygon).__name__}: expected a list of numbers")
        if len(polygon) < 6:
            raise ValueError(f"polygon of {len(polygon)} numbers: expected at least 6")
        if len(polygon) % 2:
            raise ValueError(f"polygon of {len(polygon)} numbers: expected x, y pairs")
        try:
            points = np.array(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("polygon holds something that is not a number") from None
        if points.ndim != 1:
            raise ValueError("polygon is nested: expected a flat list x0, y0, x1, y1, ...")
        if not np.isfinite(points).all():
            raise ValueError("polygon coordinate is not finite")
        x, y = points[0::2], points[1::2]
        for values, size in ((x, width), (y, height)):
            low, high = values.min(), values.max()
            if low < -size or high > 2 * size:
                worst = low if low < -size else high
                raise ValueError(f"polygon coordinate {worst:g} lies far outside the {width} x {height} image")
        twice = np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:]) + x[-1] * y[0] - y[-1] * x[0]
        area += abs(float(twice)) / 2
        parts.append(points)
    if area <= 1e-9:
        raise ValueError("polygon has no area")
    rles = mask_utils.frPyObjects(parts, height, width)
    rle = rles[0] if len(rles) == 1 else mask_utils.merge(rles)
    if not mask_areas([rle])[0]:
        raise ValueError("polygon covers no pixel of the image")
    return rle["counts"]


def _encode_rle(rle: dict[str, Any], height: int, width: int) -> bytes:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(f"RLE size is {str(size)[:40]}: expected [{height}, {width}]")
    if isinstance(counts, list):
        runs = _runs_of_list(counts)
    elif isinstance(counts, str):
        runs = _runs_of_string(counts)
    else:
        raise ValueError(f"RLE counts are of type {type(counts).__name__}: expected a list or a string")
    if (runs < 0).any() or (runs > height * width).any() or int(runs.sum()) != height * width:
        raise ValueError(f"RLE counts do not add up to {height} x {width} pixels")
    if not runs[1::2].any():
        raise ValueError("RLE covers no pixel")
    if isinstance(counts, str):
        return counts.encode("ascii")
    return mask_utils.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]


def _runs_of_list(counts: list[Any]) -> np.ndarray:
    try:
        runs = np.array(counts)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("RLE counts hold something that is not a number") from None
    if runs.ndim != 1 or not (np.issubdtype(runs.dtype, np.integer) or runs.dtype == np.float64):
        raise ValueError("RLE counts hold something that is not a number")
    if runs.dtype == np.float64 and not (np.isfinite(runs) & (runs == np.floor(runs)) & (np.abs(runs) < 2**53)).all():
        raise ValueError("RLE counts are not whole numbers")
    return runs.astype(np.int64)


def _runs_of_string(counts: str) -> np.ndarray:
    try:
        codes = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("RLE string holds characters outside the format") from None
    if not len(codes):
        raise ValueError("RLE string is empty")
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("RLE string holds characters outside the format")
    ends = np.flatnonzero(codes < 32)
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("RLE string is cut off")
    if np.diff(ends, prepend=-1).max() > _MAX_CHARACTERS_PER_COUNT:
        raise ValueError("RLE string holds a run longer than any image")
    return rle_runs(counts.encode("ascii"))
