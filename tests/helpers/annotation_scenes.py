"""A label file of three drawn photos, as `cast-ray label` writes it, for tests of `cast-ray annotate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 18, "name": "dog"}]
SIZES = {"sub/a.png": (40, 60), "b.png": (33, 47), "c.png": (20, 30)}
IDS = {name: number for name, number in zip(SIZES, (7, 9, 12))}


def masks() -> list[tuple[str, int, np.ndarray]]:
    """(image, category id, mask) of five objects: a ring, one of two parts, a square; a disc and a square."""
    a, b = (np.zeros(SIZES[name], bool) for name in ("sub/a.png", "b.png"))
    ring, parts, square, disc, second = a.copy(), a.copy(), a.copy(), b.copy(), b.copy()
    ring[4:24, 5:25] = True
    ring[10:16, 10:18] = False
    parts[5:15, 35:45], parts[20:30, 40:55] = True, True
    square[28:38, 2:20] = True
    rows, columns = np.indices(b.shape)
    disc[(rows - 12) ** 2 + (columns - 14) ** 2 <= 81] = True
    second[20:31, 25:40] = True
    return [
        *(("sub/a.png", category, mask) for category, mask in ((3, ring), (18, parts), (3, square))),
        *(("b.png", category, mask) for category, mask in ((18, disc), (3, second))),
    ]


def encode(mask: np.ndarray) -> dict[str, object]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def write_labels(folder: Path) -> Path:
    """Writes photos and `labels/instances.json` and returns the folder `labels`."""
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / "photos" / name)
    annotations = [
        {"id": n, "image_id": IDS[name], "category_id": category, "segmentation": encode(mask), "score": 0.5 + n / 10}
        for n, (name, category, mask) in enumerate(masks(), 1)
    ]
    images = [{"id": IDS[n], "file_name": n, "height": h, "width": w} for n, (h, w) in SIZES.items()]
    document = {
        "info": {"description": "cast_ray label", "folder": str(folder / "photos")},
        **{"categories": CATEGORIES, "images": images, "annotations": annotations},
    }
    (folder / "labels").mkdir()
    (folder / "labels/instances.json").write_text(json.dumps(document))
    return folder / "labels"
