"""Small folders in COCO format, written for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]
HEIGHT, WIDTH = 8, 10


def image_entry(identifier: Any, name: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"id": identifier, "file_name": name or f"{identifier}.png", "height": HEIGHT, "width": WIDTH, **fields}


def annotation(
    identifier: Any, image: Any, category: Any = 1, segmentation: Any = None, **fields: Any
) -> dict[str, Any]:
    segmentation = SQUARE if segmentation is None else segmentation
    return {"id": identifier, "image_id": image, "category_id": category, "segmentation": segmentation, **fields}


def coco_document(
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[tuple[Any, str]] = ((1, "cat"), (7, "dog")),
) -> dict[str, Any]:
    return {
        "images": list(images),
        "annotations": list(annotations),
        "categories": [{"id": i, "name": n} for i, n in categories],
    }


def valid_document(count: int = 6, **fields: Any) -> dict[str, Any]:
    """So many images with one object each; `fields` of every annotation."""
    return coco_document([image_entry(i) for i in range(count)], [annotation(i, i, **fields) for i in range(count)])


def write_coco(
    root: Path, document: dict[str, Any], json_name: str = "instances.json", image_dir: str = "images"
) -> Path:
    """The annotation file, and an image for each entry whose file name stays in the folder."""
    (root / json_name).parent.mkdir(parents=True, exist_ok=True)
    (root / json_name).write_text(json.dumps(document))
    for image in document["images"]:
        name = image.get("file_name")
        if isinstance(name, str) and not name.startswith("/") and ".." not in name and "\0" not in name:
            write_image(root / image_dir / name)
    return root


def write_image(path: Path, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Noise that depends on the file's folder and name: the images of a dataset are no copies of each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(f"{path.parent.name}/{path.name}".encode()))
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
