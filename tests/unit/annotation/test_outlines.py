"""Polygons of masks: exact where they may be, never far from the mask, and one polygon for tools that know one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from cast_ray.annotation import outlines
from cast_ray.annotation.outlines import MIN_IOU, iou, outline
from cast_ray.data.formats.segmentations import encode_mask


def blobs(count: int) -> list[np.ndarray]:
    """Masks with holes, several parts, parts that touch at corners, and pixels at the image's border."""
    rng = np.random.default_rng(0)
    drawn = []
    for number in range(count):
        noise = rng.random(rng.integers(4, 40, 2))
        smooth = ndimage.gaussian_filter(noise, number % 3)
        drawn.append(smooth >= np.quantile(smooth, 0.6))
    return [*drawn, np.ones((5, 7), bool), np.eye(6, dtype=bool), np.ones((1, 1), bool)]


@pytest.mark.parametrize("is_one", [True, False])
def test_an_outline_that_is_not_simplified_covers_exactly_its_mask(
    monkeypatch: pytest.MonkeyPatch, is_one: bool
) -> None:
    monkeypatch.setattr(outlines, "_TOLERANCES_PX", (0.0,))
    for mask in blobs(30):
        rle = encode_mask(mask)
        polygons, covered = outline(rle, *mask.shape, is_one=is_one)
        assert covered == rle
        assert len(polygons) == (1 if is_one else ndimage.label(mask)[1])


def test_a_simplified_outline_has_fewer_points_and_stays_near_its_mask() -> None:
    rows, columns = np.indices((400, 500))
    ring = ((rows - 200) ** 2 + (columns - 250) ** 2 < 150**2) & ((rows - 200) ** 2 + (columns - 250) ** 2 > 60**2)
    polygons, covered = outline(encode_mask(ring), 400, 500, is_one=True)
    assert len(polygons[0]) < 400  # its staircase has thousands
    assert iou(encode_mask(ring), covered, 400, 500) > 0.99
    for mask in blobs(30):
        rle = encode_mask(mask)
        assert iou(rle, outline(rle, *mask.shape, is_one=True)[1], *mask.shape) >= MIN_IOU
