#!/usr/bin/env bash
# supervision 0.31.2 reads a polygon of 20 x 20 pixels as a mask of 21 x 21, and writes the polygon back to COCO with that
# area.
#
# One would guess: a polygon with corners at whole pixels, read from a YOLO-seg file, has as many pixels in
#   supervision as in pycocotools, and `area` of a COCO file that supervision writes is the area of its `segmentation`.
# What happens: the polygon's vertices are taken as the places of pixels and all of them belong to the mask, so that a
#   side of n pixels becomes n + 1. The box stays that of the polygon. Small objects grow most: 4 x 4 pixels become 25
#   instead of 16. `as_coco` writes the larger number as `area`, beside a polygon of the smaller one, and COCO's classes of
#   size (small, medium, large) go by `area`.
# Output seen:
#   supervision 0.31.2, pycocotools 2.0.11
#    4 x  4 px: mask    25 px, box 4 x 4; written to COCO: area    25, polygon of    16 px
#   20 x 20 px: mask   441 px, box 20 x 20; written to COCO: area   441, polygon of   400 px
#   32 x 32 px: mask  1089 px, box 32 x 32; written to COCO: area  1089, polygon of  1024 px
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet supervision==0.31.2 pycocotools==2.0.11 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import supervision as sv
from PIL import Image
from pycocotools import mask as coco_mask

IMAGE = 100
print(f"supervision {version('supervision')}, pycocotools {version('pycocotools')}")
for side in (4, 20, 32):
    home = Path(f"side{side}")
    for name in ("images", "labels"):
        (home / name).mkdir(parents=True)
    Image.new("RGB", (IMAGE, IMAGE)).save(home / "images/a.png")
    corners = [(10, 20), (10 + side, 20), (10 + side, 20 + side), (10, 20 + side)]
    (home / "labels/a.txt").write_text("0 " + " ".join(f"{x / IMAGE} {y / IMAGE}" for x, y in corners) + "\n")
    (home / "data.yaml").write_text("nc: 1\nnames: [thing]\n")
    read = sv.DetectionDataset.from_yolo(
        str(home / "images"), str(home / "labels"), str(home / "data.yaml"), force_masks=True
    )
    ((_, _, found),) = list(read)
    read.as_coco(annotations_path=str(home / "coco.json"))
    (written,) = json.loads((home / "coco.json").read_text())["annotations"]
    drawn = int(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(written["segmentation"], IMAGE, IMAGE))))
    x0, y0, x1, y1 = found.xyxy[0].round().astype(int)
    pixels = int(found.mask.sum())
    print(
        f"{side:2} x {side:2} px: mask {pixels:5} px, box {x1 - x0} x {y1 - y0}; "
        f"written to COCO: area {written['area']:5.0f}, polygon of {drawn:5} px"
    )
    assert (x1 - x0, y1 - y0) == (side, side) and drawn == side**2, "the box or the polygon has changed"
    assert pixels == written["area"] == (side + 1) ** 2, "supervision's masks have the polygon's size now"
PYTHON
