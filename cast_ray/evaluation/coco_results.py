"""Detections in COCO results form: one list of JSON, written and read line by line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cast_ray.contracts.instance import Instance
from cast_ray.contracts.records import Category, decode_image_id


def coco_results(
    image_ids: Sequence[str], found: Sequence[Sequence[Instance]], categories: Sequence[Category]
) -> Iterator[dict[str, Any]]:
    """Detections of a batch in COCO results form, with the dataset's own image and category ids.

    Args:
        image_ids: B record ids (JSON of the dataset's own).
        found: instances of each image, as `predict` returns them.

    Yields:
        One dict a detection: image_id, category_id, segmentation (RLE at the image's own size), score.
    """
    for image_id, instances in zip(image_ids, found, strict=True):
        for i in instances:
            yield {"image_id": decode_image_id(image_id), **coco_result(i, categories)}


def coco_result(instance: Instance, categories: Sequence[Category]) -> dict[str, Any]:
    """One detection in COCO results form, without the image's id.

    There is no `bbox`: beside a mask it would make pycocotools, faster-coco-eval and hotcoco sort the detection by the
    area of its box, which changes the AP of small, medium and large objects.

    Args:
        instance: an instance, as `Teacher.predict` returns it.

    Returns:
        category_id, segmentation (RLE at the image's own size), score (single precision, see `predict`).
    """
    return {
        "category_id": categories[instance["label"]].id,
        "segmentation": {"size": list(instance["size"]), "counts": instance["rle"].decode()},
        "score": float(np.float32(instance["score"])),
    }


def results_lines(results: Iterable[dict[str, Any]]) -> bytes:
    """One line of JSON a detection: what workers write piece by piece; see `results_document`."""
    return b"".join(json.dumps(result).encode() + b"\n" for result in results)


def results_document(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of the results JSON, one list, of the lines of all workers."""
    yield b"["
    separator = b"\n"
    for line in lines:
        yield separator + line.rstrip(b"\n")
        separator = b",\n"
    yield b"\n]\n"


def results_of(document: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The detections of a results JSON, line by line, as `results_document` writes it: one on each line."""
    for line in document:
        text = line.strip().rstrip(b",")
        if text not in (b"", b"[", b"]"):
            yield json.loads(text)
