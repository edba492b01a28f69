"""Masks as polygons, for annotation tools and formats that know no other shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage
from scipy.spatial import cKDTree

from cast_ray.data.formats.segmentations import encode_segmentation

MIN_IOU = 0.95
"""Least IoU of a polygon with its mask; an outline that would lose more is simplified less."""
_TOLERANCES_PX = (1.0, 0.5, 0.0)
"""Distances that a point of the outline may lie from the polygon, the first that reaches MIN_IOU is taken. With 0 only
points on straight lines are left out, and the polygon is exact."""


def outline(rle: bytes, height: int, width: int, *, is_one: bool) -> tuple[list[list[float]], bytes]:
    """Returns the polygons of a mask, and the mask that they cover.

    Points are corners of pixels: whole numbers, which survive the rounding of other tools. Polygons have no holes:
    a hole is joined to its outer border by a cut of no width, which the even-odd rule does not fill.

    Args:
        rle: COCO compressed counts of a mask that is not empty.
        height, width: size of the mask, pixels.
        is_one: joins the parts of the mask by cuts as well, for tools that know one polygon per object.

    Returns:
        Polygons [x0, y0, x1, y1, ...] in pixels, and compressed RLE counts of what pycocotools fills for them.
    """
    mask = coco_mask.decode({"size": [height, width], "counts": rle}).astype(bool)
    parts = _borders(mask)
    for tolerance in _TOLERANCES_PX:
        polygons = [_joined([_simplified(loop, tolerance) for loop in part]) for part in parts]
        if is_one:
            polygons = [_joined(polygons)]
        flat = [polygon.astype(float).ravel().tolist() for polygon in polygons]
        covered = encode_segmentation(flat, height, width)
        if iou(rle, covered, height, width) >= MIN_IOU:
            break
    return flat, covered


def iou(one: bytes, other: bytes, height: int, width: int) -> float:
    """Returns the intersection over union of two masks of one size, COCO compressed counts."""
    size = [height, width]
    return float(coco_mask.iou([{"size": size, "counts": one}], [{"size": size, "counts": other}], [0])[0, 0])


def _borders(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Borders of each connected part of a mask along the edges of its pixels: the outer one, then those of holes.

    Each border is int64 [n, 2] as x, y, without points on straight lines. Parts that touch at a corner are two.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inside = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    labels, num_parts = ndimage.label(inside)
    parts: list[list[np.ndarray]] = [[] for _ in range(num_parts)]
    for border, (y, x) in _walks(inside):
        parts[labels[y, x] - 1].append(border + np.array([columns[0] - 1, rows[0] - 1]))
    for part in parts:
        part.sort(key=_area, reverse=True)
    return parts


def _walks(inside: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Walks along every border with the mask on the right, and gives it with a pixel (y, x) beside it.

    Args:
        inside: bool [H, W], False at its own border. Pixel (y, x) has the corners (x, y) and (x + 1, y + 1).
    """
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Each row: where an edge of a pixel lies, the walk along it, and where the walk starts from the place in the array.
    for edges, step, (x_shift, y_shift) in (
        (inside[1:] & ~inside[:-1], (1, 0), (0, 1)),
        (inside[:-1] & ~inside[1:], (-1, 0), (1, 1)),
        (inside[:, 1:] & ~inside[:, :-1], (0, -1), (1, 1)),
        (inside[:, :-1] & ~inside[:, 1:], (0, 1), (1, 0)),
    ):
        for y, x in np.argwhere(edges).tolist():
            steps.setdefault((x + x_shift, y + y_shift), []).append(step)
    while steps:
        place = start = next(iter(steps))
        first = step = steps[start][0]
        points: list[tuple[int, int]] = []
        while True:
            ways = steps[place]
            following = first if not points else _turned(step) if len(ways) > 1 else ways[0]
            ways.remove(following)
            if not ways:
                del steps[place]
            if following != step or not points:
                points.append(place)
            step = following
            place = (place[0] + step[0], place[1] + step[1])
            if place == start and _turned(step) not in steps.get(start, ()):
                break
        if step == first:
            points = points[1:]
        (x, y), (dx, dy) = start, first
        yield np.array(points, dtype=np.int64), (y - (dx < 0 or dy < 0), x - (dx < 0 or dy > 0))


def _turned(step: tuple[int, int]) -> tuple[int, int]:
    """A step to the right of another one: where two parts touch at a corner, it stays with the same part."""
    return -step[1], step[0]


def _simplified(border: np.ndarray, tolerance_px: float) -> np.ndarray:
    """The border without points that matter little; unchanged where less than a triangle would be left."""
    if not tolerance_px:
        return border
    fewer = cv2.approxPolyDP(border.astype(np.int32), tolerance_px, True)[:, 0].astype(np.int64)
    return fewer if len(fewer) > 2 and _area(fewer) else border


def _area(border: np.ndarray) -> float:
    return float(cv2.contourArea(border.astype(np.int32)))


def _joined(borders: Sequence[np.ndarray]) -> np.ndarray:
    """One polygon of several borders: each is joined to those before by a cut between their nearest points."""
    polygon = borders[0]
    for border in borders[1:]:
        nearest, places = cKDTree(polygon).query(border)
        end = int(nearest.argmin())
        start = int(places[end])
        loop = np.roll(border, -end, axis=0)
        polygon = np.concatenate([polygon[: start + 1], loop, loop[:1], polygon[start:]])
    return polygon
