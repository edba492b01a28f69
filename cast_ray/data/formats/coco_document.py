"""A COCO annotation file, found, parsed and checked: any fault in it is reported in one line."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Container, Sequence
from fnmatch import fnmatch
from typing import Any

from cast_ray.common.text_files import parse_json, read_text
from cast_ray.contracts.records import Category
from cast_ray.data.reading.index import Skipped
from cast_ray.data.reading.listing import Listing

PARTS = ("images", "annotations", "categories")

TRAIN_NAMES = (
    "instances.json",
    "annotations.json",
    "annotations/instances_train*.json",
    "annotations/instances.json",
    "instances_train*.json",
    "train/_annotations.coco.json",
    "annotations/*.json",
    "labels.json",
    "train/labels.json",
    "result.json",  # Label Studio
)
VAL_NAMES = (
    "annotations/instances_val*.json",
    "instances_val*.json",
    "valid/_annotations.coco.json",
    "val/_annotations.coco.json",
    "validation/_annotations.coco.json",
    "val/labels.json",
    "validation/labels.json",
)
EXTRA_NAMES = ("annotations/image_info_unlabeled*.json", "image_info_unlabeled*.json")
_MOST_DIGITS = 30
_LVIS_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")
_LVIS_FREQUENCIES = ("r", "c", "f")
_CROWD_WORDS = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
"""Values of `iscrowd` in lower case: some tools write them as text or as floats."""
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
    for any_case in (False, True):
        for pattern in names:
            folder, name = posixpath.split(pattern)
            matches = [n for n in listing.files(folder) if fnmatch(n.lower() if any_case else n, name)]
            if name == "*.json":
                matches = [n for n in matches if not any(fnmatch(n, other) for other in _OTHER_TASKS)]
                if len(matches) > 1:
                    alike = [n for n in matches if any(fnmatch(n.lower(), other) for other in _OTHER_TASKS)]
                    matches = [n for n in matches if n not in alike] or matches
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
        expected: which of images, annotations and categories must be there; a part that is neither expected
            nor there is an empty list.

    Raises:
        ValueError: unreadable, not JSON, not COCO, or without images; the message names the file and the field.
    """
    document = parse_json(read_text(uri, file), file)
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
    for name in _LVIS_FIELDS:
        if any(name in image for image in document["images"]):
            raise ValueError(
                f"{file}: LVIS is not supported: its images ({name!r}) have not all of their objects annotated, "
                "and what is not annotated would be learnt as background"
            )
    for category in document.get("categories", []):
        if category.get("frequency") in _LVIS_FREQUENCIES and "synset" in category:
            raise ValueError(
                f"{file}: LVIS is not supported: its images have not all objects of its categories ('frequency') "
                "annotated, and what is not annotated would be learnt as background"
            )
    if not document["images"]:
        raise ValueError(f"{file}: 'images' is empty: expected at least one image")
    return {name: document.get(name, []) for name in PARTS}


def read_categories(entries: list[dict[str, Any]], file: str) -> tuple[Category, ...]:
    """The classes in the order of the file. Raises ValueError for ids or names that are missing, odd or repeated."""
    if not entries:
        raise ValueError(f"{file}: 'categories' is empty: expected at least one class")
    categories: dict[int, Category] = {}
    for index, entry in enumerate(entries):
        identifier, name = whole_number(entry.get("id")), entry.get("name")
        if identifier is None or not -(2**63) <= identifier < 2**63:
            raise ValueError(f"{file}: categories[{index}].id is {entry.get('id')!r}: expected a 64-bit integer")
        if not isinstance(name, str) or not _is_text(name):
            raise ValueError(f"{file}: categories[{index}].name is {name!r}: expected a string")
        if identifier in categories:
            raise ValueError(f"{file}: categories[{index}].id is {identifier} for the second time")
        categories[identifier] = Category(identifier, name)
    return tuple(categories.values())


def placeholder_of(document: dict[str, Any]) -> int | None:
    """Returns the id of Roboflow's category 0, which is the name of the project and no class; None: there is none.

    Roboflow numbers the classes from 1 and writes a category 0 that is the `supercategory` of all of them, has none of
    its own, and is that of no annotation.

    Args:
        document: see `read_document`.
    """
    first = [c for c in document["categories"] if whole_number(c.get("id")) == 0]
    others = [c for c in document["categories"] if whole_number(c.get("id")) != 0]
    if len(first) != 1 or not others or first[0].get("supercategory") != "none":
        return None
    if any(c.get("supercategory") != first[0].get("name") for c in others):
        return None
    is_used = any(resolve(a.get("category_id"), {0}) is not None for a in document["annotations"])
    return None if is_used else 0


def usable_images(images: list[dict[str, Any]], split: str, file: str) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """The images that an annotation can name; entries without a usable id and exact repetitions are left out.

    Raises:
        ValueError: two different images have one id: nobody can tell which of them the annotations mean.
    """
    by_id: dict[int | str, dict[str, Any]] = {}
    skipped = []
    for index, image in enumerate(images):
        identifier: Any = image.get("id")
        if isinstance(identifier, float) and (number := whole_number(identifier)) is not None:
            image = image | {"id": (identifier := number)}
        reason = ""
        if type(identifier) not in (int, str) or not _is_text(str(identifier)):
            reason = f"id is {identifier!r}: expected an integer or a string"
        elif identifier in by_id:
            if image != by_id[identifier]:
                raise ValueError(f"{file}: images[{index}].id is {identifier!r} for the second time")
            reason = "repeats an image of the same id"
        else:
            by_id[identifier] = image
        if reason:
            facts = {"id": printable(identifier), "file": printable(image.get("file_name")), "reason": reason}
            skipped.append({"split": split, "kind": "image", **facts})
    return list(by_id.values()), skipped


def references_of(
    annotation: dict[str, Any], image_ids: Container[Any], category_ids: Container[Any]
) -> tuple[int | str, int]:
    """The image and the category that an annotation names.

    Raises ValueError, with a reason to skip the annotation, where one of them does not exist.
    """
    found: list[Any] = []
    for name, known in (("image_id", image_ids), ("category_id", category_ids)):
        value = annotation.get(name)
        found.append(resolve(value, known))
        if found[-1] is None:
            got = f"is {shown(value)}" if name in annotation else "is missing"
            raise ValueError(f"{name} {got}: no such {name.removesuffix('_id')}")
    image_id, category_id = found
    return image_id, category_id


def resolve(reference: Any, known: Container[Any]) -> int | str | None:
    """The known id that a reference means; None where there is none.

    Some tools write the ids of one list as text or floats and those of the other as integers: where the very id is not
    known, the integer that it spells is taken, or the text that spells it.
    """
    number = whole_number(reference)
    spelled = [str(number)] if number is not None and not isinstance(reference, str) else []
    for candidate in (reference, number, *spelled):
        if type(candidate) in (int, str) and candidate in known:
            return candidate
    return None


def whole_number(value: Any) -> int | None:
    """The integer that a JSON value means: an integer, a float without a fraction, or digits in text; else None."""
    if type(value) is int:
        return value
    if isinstance(value, str):
        text = value.strip().removesuffix(".0")
        return int(text) if len(text) < _MOST_DIGITS and text.removeprefix("-").isdecimal() else None
    return int(value) if isinstance(value, float) and value.is_integer() else None


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether an annotation is a region of many objects: its `iscrowd`, which is 0 where it is missing, null or empty.

    Raises ValueError, with a reason to skip the annotation, for a value that is neither yes nor no.
    """
    value = annotation.get("iscrowd")
    if value is None:
        return False
    word = str(value).strip().lower()
    if not isinstance(value, bool | int | float | str) or word not in _CROWD_WORDS:
        raise ValueError(f"iscrowd is {shown(value)}: expected 0 for one object or 1 for a region of many")
    return _CROWD_WORDS[word]


def annotated_area(annotation: dict[str, Any]) -> float | None:
    """The annotation's `area`, pixels; None where it is missing or not a finite number."""
    value: Any = annotation.get("area")
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for nan
    return float(value) if is_number else None


def shown(value: Any) -> str:
    """A JSON value in a message: text in quotes, anything else as it is, cut off after 40 characters."""
    return repr(value[:40]) if isinstance(value, str) else str(value)[:40]


def printable(name: Any) -> str:
    """An id or a file name as it can be printed, whatever JSON held in its place."""
    return str(name).encode("utf-8", "replace").decode()


def _is_text(name: str) -> bool:
    """Whether a string can be printed: JSON can hold half a character."""
    return printable(name) == name
