"""COCO segmentations from files nobody vouches for, to RLE bytes that pycocotools can decode safely.

pycocotools writes outside its buffers or aborts the process on hostile polygons and run lengths, and reads a list of
four numbers as a box: everything is checked here before it is called.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import mask_areas, rle_runs
from cast_ray.data.formats.coco_document import whole_number

_MAX_CHARACTERS_PER_COUNT = 7  # of 5 bits each: more than any run length of an image that is read
_FARTHEST_PX = 1e8  # pycocotools counts fifths of a pixel in 32 bits; a number this large is no coordinate
_LONG_OUTLINE_PX = 2**20  # pycocotools takes 40 bytes for each pixel of a polygon's outline
_LONGEST_OUTLINE_PX = 2**24


def encode_segmentation(segmentation: Any, height: int, width: int) -> bytes:
    """One annotation's segmentation as COCO compressed RLE counts at the image's own size.

    Args:
        segmentation: the JSON value: a list of polygons [x0, y0, x1, y1, ...] in pixels, one such polygon, or an object
            with `size` and compressed (string) or uncompressed (list) `counts`. Polygons are filled by the even-odd
            rule as pycocotools does it, and cut off at the image's border. Parts without an inside (fewer than three
            points, an odd number of coordinates) are left out where another part has one.
        height: height of the image, pixels.
        width: width of the image, pixels.

    Raises:
        ValueError: what is wrong with it, in a few words, as a reason to skip the annotation.
    """
    if segmentation in (None, [], {}):
        raise ValueError("no segmentation")
    if isinstance(segmentation, dict):
        counts = _encode_rle(segmentation, height, width)
    elif isinstance(segmentation, list):
        counts = _encode_polygons(segmentation, height, width)
    else:
        raise ValueError(f"segmentation is of type {type(segmentation).__name__}: expected polygons or RLE")
    return counts


def encode_mask(mask: np.ndarray) -> bytes:
    """COCO compressed RLE counts of a mask bool [H, W]."""
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def _encode_polygons(polygons: list[Any], height: int, width: int) -> bytes:
    if isinstance(polygons[0], int | float):
        polygons = [polygons]
    parts, too_short = [], ""
    for polygon in polygons:
        if reason := _too_short(polygon):  # detectron2 leaves these parts out too, and keeps the others
            too_short = too_short or reason
        else:
            parts.append(_points_of(polygon, height, width))
    if not parts:
        raise ValueError(too_short)
    if all(_is_line(points) for points in parts):
        raise ValueError("polygon has no area")
    drawable = [part for part in (_drawable(points, height, width) for points in parts) if len(part) > 2]
    rles = mask_utils.frPyObjects([part.ravel() for part in drawable], height, width) if drawable else []
    rle = mask_utils.merge(rles) if len(rles) > 1 else rles[0] if rles else None
    if rle is None or not mask_areas([rle])[0]:
        raise ValueError("polygon covers no pixel of the image")
    return rle["counts"]


def _too_short(polygon: Any) -> str:
    """Why a polygon has no inside, whatever its numbers are; empty where it may have one."""
    if not isinstance(polygon, list):
        raise ValueError(f"polygon is of type {type(polygon).__name__}: expected a list of numbers")
    if any(isinstance(value, list | dict) for value in polygon):
        raise ValueError("polygon is nested: expected a flat list x0, y0, x1, y1, ...")
    if len(polygon) < 6:
        return f"polygon of {len(polygon)} numbers: expected at least 6"
    return f"polygon of {len(polygon)} numbers: expected x, y pairs" if len(polygon) % 2 else ""


def _points_of(polygon: list[Any], height: int, width: int) -> np.ndarray:
    """A polygon's points, float64 [n, 2] as x, y in pixels."""
    try:
        numbers = np.array(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("polygon holds something that is not a number") from None
    if not np.isfinite(numbers).all():
        raise ValueError("polygon coordinate is not finite")
    worst = numbers[np.abs(numbers).argmax()]
    if abs(worst) > _FARTHEST_PX:
        raise ValueError(f"polygon coordinate {worst:g} lies far outside the {width} x {height} image")
    return numbers.reshape(-1, 2)


def _is_line(points: np.ndarray) -> bool:
    """Whether all points lie on one line; a figure of eight, whose signed areas cancel, is none."""
    offsets = points - points[0]
    longest = offsets[np.square(offsets).sum(1).argmax()]
    across = offsets[:, 0] * longest[1] - offsets[:, 1] * longest[0]
    return bool(np.abs(across).max() <= 1e-9 * max(1.0, float(np.abs(longest).max())))


def _drawable(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The polygon as pycocotools can draw it: unchanged, or cut off outside the image where its outline is too long.

    pycocotools cuts polygons off at the border by itself, but its memory grows with the whole outline.
    """
    if _outline_px(points) <= _LONG_OUTLINE_PX:
        return points
    for axis, size in ((0, width), (1, height)):
        points = _cut(points, axis, -size, 1)
        points = _cut(points, axis, 2 * size, -1)
    if _outline_px(points) > _LONGEST_OUTLINE_PX:
        raise ValueError(
            f"polygon outline of {_outline_px(points):,.0f} pixels: no object of a {width} x {height} image"
        )
    return points


def _outline_px(points: np.ndarray) -> float:
    return float(np.abs(points - np.roll(points, -1, axis=0)).max(1).sum()) if len(points) else 0.0


def _cut(points: np.ndarray, axis: int, bound: float, sign: int) -> np.ndarray:
    """The part of a polygon where sign * (coordinate - bound) >= 0: Sutherland and Hodgman's step for one border.

    What lies beyond is moved onto the border, so that inside it every pixel is enclosed as often as before.
    """
    if not len(points):
        return points
    following = np.roll(points, -1, axis=0)
    inside = sign * (points[:, axis] - bound) >= 0
    crosses = inside != np.roll(inside, -1)
    length = following[:, axis] - points[:, axis]
    share = np.where(crosses, bound - points[:, axis], 0) / np.where(crosses, length, 1)
    crossing = points + share[:, None] * (following - points)
    crossing[:, axis] = bound
    both = np.stack([points, crossing], axis=1).reshape(-1, 2)
    return both[np.stack([inside, crosses], axis=1).ravel()]


def _encode_rle(rle: dict[str, Any], height: int, width: int) -> bytes:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or [whole_number(value) for value in size] != [height, width]:
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
