"""The files that `predict` and `label` write: COCO results, COCO annotations and the drawn images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from pycocotools import mask as coco_mask

from cast_ray.common.files import replaced
from cast_ray.contracts.records import Category, mask_areas
from cast_ray.data.reading.photos import OVERLAYS

Rows = Callable[[], Iterator[tuple[int, dict[str, Any]]]]
"""Gives, as often as it is called, (image id, row) of every image that was read; ids count from 1 over all images."""


def write_predictions(rows: Rows, categories: Sequence[Category], out: Path) -> None:
    """Writes `results.json` (COCO results) and `images.json` (the COCO file that they belong to), each whole."""
    classes = json.dumps([{"id": c.id, "name": c.name} for c in categories])
    head = f'{{"categories": {classes}, "annotations": [], "images": ['
    with (
        replaced(out / "results.json") as results_path,
        replaced(out / "images.json") as images_path,
        results_path.open("w") as results_file,
        images_path.open("w") as images_file,
        JsonList(results_file) as results,
        JsonList(images_file, head, "]}") as images,
    ):
        for number, row in rows():
            images.add({"id": number, "file_name": row["path"], "height": row["height"], "width": row["width"]})
            for result in json.loads(row["results"]):
                results.add({"image_id": number, **result})


def write_labels(rows: Rows, folder: str, categories: Sequence[Category], out: Path, counts: Counter[int]) -> None:
    """Writes `instances.json`, a COCO file with scores, which appears when it is whole.

    Args:
        rows: of all images; they are gone through twice.
        folder: that images are named relative to, which is then `data.root`; empty: by their whole paths.
        categories: of the labels.
        out: the output folder.
        counts: filled with the number of labels of each category id.
    """
    classes = json.dumps([{"id": c.id, "name": c.name} for c in categories])
    with replaced(out / "instances.json") as partial_file, partial_file.open("w") as file:
        file.write(f'{{"categories": {classes}, ')
        with JsonList(file, '"annotations": [', "],") as annotations:
            for number, row in rows():
                for result in json.loads(row["results"]):
                    rle = result["segmentation"]
                    # Unlike results (see `coco_result`), annotations have boxes: their size goes by their own `area`.
                    facts = {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(mask_areas([rle])[0]), "iscrowd": 0}
                    annotations.add({"id": annotations.num + 1, "image_id": number, **result, **facts})
                    counts[result["category_id"]] += 1
        with JsonList(file, '"images": [', "]}") as images:
            for number, row in rows():
                name = row["path"][len(folder) :].lstrip("/") if folder else row["path"]
                images.add({"id": number, "file_name": name, "height": row["height"], "width": row["width"]})


def shared_folder(paths: Sequence[str]) -> str:
    """Returns the folder of local paths or URIs that holds them all; empty without one."""
    parts = [path.split("/")[:-1] for path in paths]
    same = takewhile(lambda level: len(set(level)) == 1, zip(*parts))
    return "/".join(level[0] for level in same)


def write_overlay(row: dict[str, Any], names: Mapping[str, str], out: Path) -> None:
    """Writes `overlays/<name>.png` for a row that has a drawn image."""
    if row["overlay"]:
        path = out / OVERLAYS / f"{names[row['path']]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["overlay"])


class JsonList:
    """A JSON list written element by element, so that a million results never meet in memory.

    `head` and `tail` stand around its elements; a block that fails leaves the tail out, so that nobody reads the rest
    for the whole.
    """

    def __init__(self, file: IO[str], head: str = "[", tail: str = "]"):
        self.file, self.head, self.tail = file, head, tail
        self.num = 0

    def __enter__(self) -> JsonList:
        self.file.write(self.head)
        return self

    def add(self, element: Any) -> None:
        self.file.write((",\n" if self.num else "\n") + json.dumps(element))
        self.num += 1

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.file.write("\n" + self.tail + "\n")
