#!/usr/bin/env bash
# pycocotools 2.0.11 draws a polygon that sticks out of the image's left or top edge with other pixels inside the image
# than the same polygon drawn on a larger canvas and cut there. Past the right or bottom edge it does not.
#
# One would guess: a whole-pixel shift changes nothing, so "subtract the crop's offset from the polygon, then draw" (what
#   crop augmentations of polygon annotations do) equals "draw, then crop the mask", on all four sides.
# What happens: the rasteriser rounds 5 * coordinate + 0.5 by a cast to int, which rounds towards zero. Vertices at
#   negative coordinates therefore move by up to a fifth of a pixel towards the image, edges that cross the border tilt,
#   and border pixels change: of 2,000 random polygons 799 have at least one changed pixel (1,440 pixels in all); cut at
#   the right and bottom edge, none.
# Output seen:
#   pycocotools 2.0.11, numpy 2.4.6
#   past the left and top edge:      799 of 2000 polygons differ, 1440 pixels
#   past the right and bottom edge:  0 of 2000 polygons differ, 0 pixels
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from pycocotools import mask


def draw(points, size):
    return mask.decode(mask.frPyObjects([points.ravel().tolist()], size, size))[:, :, 0]


rng = np.random.default_rng(0)
polygons = [np.round(rng.uniform(0, 40, (rng.integers(3, 8), 2)), 2) for _ in range(2000)]
whole = [draw(points, 40) for points in polygons]
changed = {
    "left and top": [draw(p - 20, 20) != m[20:, 20:] for p, m in zip(polygons, whole)],
    "right and bottom": [draw(p, 20) != m[:20, :20] for p, m in zip(polygons, whole)],
}
print(f"pycocotools {version('pycocotools')}, numpy {version('numpy')}")
counts = {}
for side, masks in changed.items():
    counts[side] = sum(bool(m.any()) for m in masks)
    pixels = sum(int(m.sum()) for m in masks)
    print(f"past the {side + ' edge:':24}{counts[side]} of {len(polygons)} polygons differ, {pixels} pixels")
assert counts["left and top"] > 200, "a polygon past the left or top edge is drawn as a crop of the whole one now"
assert counts["right and bottom"] == 0, "a polygon past the right or bottom edge is drawn differently now"
PYTHON
