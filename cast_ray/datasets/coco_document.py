"""A COCO annotation file, found, parsed and checked: whatever is wrong with it is said in one line."""

from __future__ import annotations

import json
import posixpath
import sys
from collections.abc import Container, Sequence
from fnmatch import fnmatch
from typing import Any

from cast_ray.datasets.index import Skipped
from cast_ray.datasets.listing import Listing
from cast_ray.datasets.paths import first_line, read_bytes
from cast_ray.records import Category

PARTS = ("images", "annotations", "categories")

TRAIN_NAMES = (
    "instances.json",
    "annotations.json",
    "annotations/instances_train*.json",
    "annotations/instances.json",
    "instances_train*.json",
    "train/_annotations.coco.json",
    "annotations/*.json",
)
VAL_NAMES = ("annotations/instances_val*.json", "instances_val*.json", "valid/_annotations.coco.json")
EXTRA_NAMES = ("annotations/image_info_unlabeled*.json", "image_info_unlabeled*.json")
_OTHER_TASKS = (
    *("captions_*", "person_keypoints_*", "panoptic_*", "stuff_*", "image_info_*", "*unlabel*"),
    *("*_val*", "val*", "*_test*", "test*"),
)


def find_annotation_file(listing: Listing, given: str, key: str, names: Sequence[str]) -> str | None:
    """The annotation file named by the user, or the only one that fits the first fitting usual name; None: no such.

    Raises:
        ValueError: the named file does not exist, or several fit; the message names them and the recipe key.
    """
    if given:
        if listing.file(given) is None:
            raise ValueError(f"{key}: {given} is not a file below {listing.root}")
        return given
    for pattern in names:
        folder, name = posixpath.split(pattern)
        matches = listing.files(folder, name)
        if name == "*.json":
            matches = [n for n in matches if not any(fnmatch(n, other) for other in _OTHER_TASKS)]
        if len(matches) > 1:
            raise ValueError(
                f"{listing.root}: several annotation files fit ({', '.join(matches[:4])}): name one by {key}"
            )
        if matches:
            return posixpath.join(folder, matches[0])
    return None


def read_document(uri: str, file: str, expected: Sequence[str] = PARTS) -> dict[str, Any]:
    """The parsed file, known to hold lists of objects under the `expected` names and at least one image.

    Args:
        uri: where it is.
        file: its name in messages.
        expected: of images, annotations and categories; a part that is neither expected nor there is an empty list.

    Raises:
        ValueError: unreadable, not JSON, not COCO, or without images; the message names the file and the field.
    """
    try:
        content = read_bytes(uri)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({first_line(error)})") from None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({first_line(error)})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{file}: not COCO: expected an object with images, annotations, categories, got a list")
    for name in PARTS:
        value = document.get(name, None if name in expected else [])
        if not isinstance(value, list):
            got = f"of type {type(value).__name__}" if name in document else "missing"
            raise ValueError(f"{file}: not COCO: {name!r} is {got}: expected a list")
        for index, entry in enumerate(value):
            if not isinstance(entry, dict):
                raise ValueError(f"{file}: not COCO: {name}[{index}] is of type {type(entry).__name__}")
    if not document["images"]:
        raise ValueError(f"{file}: 'images' is empty: expected at least one image")
    return {name: document.get(name, []) for name in PARTS}


def read_categories(entries: list[dict[str, Any]], file: str) -> tuple[Category, ...]:
    """The classes in the order of the file. Raises ValueError for ids or names that are missing, odd or repeated."""
    if not entries:
        raise ValueError(f"{file}: 'categories' is empty: expected at least one class")
    categories: dict[int, Category] = {}
    for index, entry in enumerate(entries):
        identifier, name = entry.get("id"), entry.get("name")
        if type(identifier) is not int or not -(2**63) <= identifier < 2**63:
            raise ValueError(f"{file}: categories[{index}].id is {identifier!r}: expected a 64-bit integer")
        if not isinstance(name, str):
            raise ValueError(f"{file}: categories[{index}].name is {name!r}: expected a string")
        if identifier in categories:
            raise ValueError(f"{file}: categories[{index}].id is {identifier} for the second time")
        categories[identifier] = Category(identifier, name)
    return tuple(categories.values())


def usable_images(images: list[dict[str, Any]], split: str, file: str) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """The images that an annotation can name; entries without a usable id and exact repetitions are left out.

    Raises:
        ValueError: two different images have one id: nobody can tell which of them the annotations mean.
    """
    by_id: dict[int | str, dict[str, Any]] = {}
    skipped = []
    for index, image in enumerate(images):
        identifier: Any = image.get("id")
        reason = ""
        if type(identifier) not in (int, str):
            reason = f"id is {identifier!r}: expected an integer or a string"
        elif identifier in by_id:
            if image != by_id[identifier]:
                raise ValueError(f"{file}: images[{index}].id is {identifier!r} for the second time")
            reason = "repeats an image of the same id"
        else:
            by_id[identifier] = image
        if reason:
            facts = {"id": str(identifier), "file": printable(image.get("file_name")), "reason": reason}
            skipped.append({"split": split, "kind": "image", **facts})
    return list(by_id.values()), skipped


def check_annotation(annotation: dict[str, Any], image_ids: Container[Any], category_ids: Container[Any]) -> None:
    """Raises ValueError, with a reason to skip it, for an annotation whose image or category does not exist."""
    for name, known in (("image_id", image_ids), ("category_id", category_ids)):
        value = annotation.get(name)
        if type(value) not in (int, str) or value not in known:
            got = f"is {str(value)[:40]!r}" if isinstance(value, str) else f"is {str(value)[:40]}"
            raise ValueError(
                f"{name} {got if name in annotation else 'is missing'}: no such {name.removesuffix('_id')}"
            )


def annotated_area(annotation: dict[str, Any]) -> float | None:
    """The annotation's `area`, pixels; None where it is missing or not a finite number."""
    value: Any = annotation.get("area")
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for nan
    return float(value) if is_number else None


def printable(name: Any) -> str:
    """A file name as it can be printed, whatever JSON held in its place."""
    return str(name).encode("utf-8", "replace").decode()
