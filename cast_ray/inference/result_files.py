"""The files that `predict` and `label` write: COCO results, COCO annotations and the drawn images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Literal

from pycocotools import mask as coco_mask

from cast_ray.common.files import check_replaceable, replaced
from cast_ray.common.paths import absolute
from cast_ray.common.version import VERSION
from cast_ray.contracts.records import Category, mask_areas
from cast_ray.data.reading.photos import IMAGES, INSTANCES, OVERLAYS, RESULTS

Rows = Callable[[], Iterator[tuple[int, dict[str, Any]]]]
"""Gives, as often as it is called, (image id, row) of every image that was read; ids count from 1 over all images."""


DRAWN_BY, MAX_HEAD_BYTES = ("Software", "cast_ray"), 256
"""Text chunk of an overlay, and how much of the file is looked through for it: it stands before the pixels."""
_MARK = '{"info": {"description": "cast_ray '
"""The beginning of `instances.json` and `images.json`: the command that has written a file knows it again by this."""


def check_results(out: Path, command: Literal["label", "predict"]) -> None:
    """Checks that a command replaces no file in its output folder that something else has written.

    `results.json`, a list, has no place for a mark: it is known by the `images.json` beside it.

    Raises:
        ValueError: there is such a file; the message names it.
    """
    names = {"label": [INSTANCES], "predict": [RESULTS, IMAGES]}[command]
    mark = _mark(command).encode()

    def is_ours() -> bool:
        with (out / names[-1]).open("rb") as file:
            return file.read(len(mark)) == mark

    what = f"results of `cast-ray {command}`"
    check_replaceable(out, names, is_ours, what, "another folder, or one without these files")


def check_overlays(names: Iterable[str], out: Path) -> None:
    """Checks that drawn images replace none that something else has written.

    Args:
        names: of the images, see `write_overlay`.
        out: the output folder.

    Raises:
        ValueError: there is one; the message names it.
    """
    mark = "\0".join(DRAWN_BY).encode("latin-1")

    def is_ours(path: Path) -> bool:
        with path.open("rb") as file:
            return mark in file.read(MAX_HEAD_BYTES)

    files = {name: _overlay_path(out, name) for name in names}
    others = [str(path.relative_to(out)) for path in files.values() if path.exists() and not is_ours(path)]
    check_replaceable(out, others, lambda: False, "overlays of cast-ray", "another folder, or --no-overlays")


def _overlay_path(out: Path, name: str) -> Path:
    return out / OVERLAYS / f"{name}.png"


def _mark(command: str) -> str:
    return f'{_MARK}{command}"'


def _head(command: str, folder: str, categories: Sequence[Category]) -> str:
    """The beginning of a COCO file: who has written it, the folder of the images, and the classes."""
    place = absolute(folder) if folder else ""
    classes = json.dumps([{"id": c.id, "name": c.name} for c in categories])
    facts = f'"version": {json.dumps(VERSION)}, "folder": {json.dumps(place)}'
    return f'{_mark(command)}, {facts}}}, "categories": {classes}, '


def write_predictions(rows: Rows, folder: str, categories: Sequence[Category], out: Path) -> None:
    """Writes `results.json` (COCO results) and `images.json` (a COCO file with the same instances), each whole.

    Args:
        rows: of all images; they are gone through several times.
        folder, categories: see `_write_coco`.
        out: the output folder.
    """
    with (
        replaced(out / RESULTS) as results_path,
        replaced(out / IMAGES) as images_path,
        results_path.open("w") as results_file,
        images_path.open("w") as images_file,
    ):
        with JsonList(results_file) as results:
            for number, row in rows():
                for result in json.loads(row["results"]):
                    results.add({"image_id": number, **result})
        _write_coco(images_file, "predict", rows, folder, categories)


def write_labels(rows: Rows, folder: str, categories: Sequence[Category], out: Path) -> Counter[int]:
    """Writes `instances.json`, a COCO file with scores, which appears when it is whole.

    Args:
        rows: of all images; they are gone through twice.
        folder, categories: see `_write_coco`.
        out: the output folder.

    Returns:
        Category id -> number of labels.
    """
    with replaced(out / INSTANCES) as partial_file, partial_file.open("w") as file:
        return _write_coco(file, "label", rows, folder, categories)


def _write_coco(file: IO[str], command: str, rows: Rows, folder: str, categories: Sequence[Category]) -> Counter[int]:
    """Writes a COCO file with annotations, boxes and scores.

    Args:
        file: to write to.
        command: which has found the instances.
        rows: of all images; they are gone through twice.
        folder: that images are named relative to: `data.root` of a dataset, the folder of images for other tools;
            empty: by their whole paths.
        categories: of the annotations.

    Returns:
        Category id -> number of annotations.
    """
    counts = Counter[int]()
    file.write(_head(command, folder, categories))
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
    return counts


def shared_folder(paths: Sequence[str]) -> str:
    """Returns the folder of local paths or URIs that holds them all; empty without one."""
    parts = [path.split("/")[:-1] for path in paths]
    same = takewhile(lambda level: len(set(level)) == 1, zip(*parts))
    return "/".join(level[0] for level in same)


def write_overlay(row: dict[str, Any], names: Mapping[str, str], out: Path) -> None:
    """Writes `overlays/<name>.png` for a row that has a drawn image."""
    if row["overlay"]:
        path = _overlay_path(out, names[row["path"]])
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
