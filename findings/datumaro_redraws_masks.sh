#!/usr/bin/env bash
# datumaro 1.13.12 changes the masks of a COCO file that it only reads and writes: it makes polygons of them, and fills
# their holes. Masks that are marked as crowds come through unchanged.
#
# One would guess: `import_from(..., "coco_instances")` and then `export(..., "coco_instances")`, with nothing in between,
#   gives the same masks. `iscrowd` says whether an annotation is one object or many, and not how its mask is stored.
# What happens: a mask in RLE with `iscrowd: 0` is written as polygons through the centres of its border pixels. A disc
#   loses a part of its border, and a ring its hole. With `iscrowd: 1` the same masks are written as RLE, bit for bit. So
#   only masks that are marked as crowds survive, and COCO's own evaluation then ignores them.
# Output seen:
#   datumaro 1.13.12, pycocotools 2.0.11
#   iscrowd 0  disc:       317 px ->  304 px, IoU 0.899, stored as polygons
#   iscrowd 0  ring:      1060 px -> 1232 px, IoU 0.795, stored as polygons
#   iscrowd 0  two parts:  226 px ->  208 px, IoU 0.808, stored as polygons
#   iscrowd 1  disc:       317 px ->  317 px, IoU 1.000, stored as RLE
#   iscrowd 1  ring:      1060 px -> 1060 px, IoU 1.000, stored as RLE
#   iscrowd 1  two parts:  226 px ->  226 px, IoU 1.000, stored as RLE
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datumaro==1.13.12 pycocotools==2.0.11 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import datumaro
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SIDE = 64


def disc(y, x, radius):
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


MASKS = {
    "disc": disc(20, 20, 10),
    "ring": disc(32, 32, 20) & ~disc(32, 32, 8),
    "two parts": disc(12, 12, 6) | disc(50, 50, 6),
}


def annotation(number, mask, iscrowd):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = [float(v) for v in coco_mask.toBbox(rle)]
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    shared = {"id": number, "image_id": 1, "category_id": 1, "iscrowd": iscrowd}
    return shared | {"segmentation": segmentation, "area": int(mask.sum()), "bbox": box}


def decode(segmentation):
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, SIDE, SIDE))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, SIDE, SIDE)
    return coco_mask.decode(segmentation).astype(bool)


print(f"datumaro {version('datumaro')}, pycocotools {version('pycocotools')}")
for iscrowd in (0, 1):
    source, target = Path(f"in{iscrowd}"), Path(f"out{iscrowd}")
    (source / "annotations").mkdir(parents=True)
    (source / "images/default").mkdir(parents=True)
    Image.new("RGB", (SIDE, SIDE)).save(source / "images/default/a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "thing", "supercategory": ""}],
        "annotations": [annotation(i, mask, iscrowd) for i, mask in enumerate(MASKS.values(), 1)],
    }
    (source / "annotations/instances_default.json").write_text(json.dumps(document))
    datumaro.Dataset.import_from(str(source), "coco_instances").export(str(target), "coco_instances", save_media=True)
    (written,) = target.rglob("*.json")
    back = sorted(json.loads(written.read_text())["annotations"], key=lambda entry: entry["id"])
    for (name, mask), entry in zip(MASKS.items(), back, strict=True):
        found = decode(entry["segmentation"])
        overlap = (found & mask).sum() / (found | mask).sum()
        kind = "polygons" if isinstance(entry["segmentation"], list) else "RLE"
        print(
            f"iscrowd {iscrowd}  {name + ':':10}{mask.sum():5} px -> {found.sum():4} px, "
            f"IoU {overlap:.3f}, stored as {kind}"
        )
        if iscrowd:
            assert overlap == 1 and kind == "RLE", "masks of crowds are changed now"
        else:
            assert overlap < 0.95 and kind == "polygons", "masks of single objects come through now"
PYTHON
