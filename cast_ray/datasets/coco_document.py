"""A COCO annotation file, found, parsed and checked: whatever is wrong with it is said in one line."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

from pyarrow import fs

from cast_ray.datasets.paths import is_uri, join, read_bytes, resolve
from cast_ray.records import Category

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
_OTHER_TASKS = ("captions_*", "person_keypoints_*", "panoptic_*", "stuff_*", "*_val*", "val*", "*_test*", "test*")


def check_folder(root: str, given: str) -> None:
    """Refuses a root that is not a folder; `given` is what the user wrote."""
    filesystem, path = resolve(root)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise ValueError(f"data.root: {given} cannot be read ({_first_line(error)})") from None
    if info.type != fs.FileType.Directory:
        what = "is a file" if info.type == fs.FileType.File else "does not exist"
        raise ValueError(f"data.root: {given} {what}: expected the folder of a COCO-format dataset")


def find_annotation_file(root: str, given: str, key: str, names: Sequence[str]) -> str | None:
    """The annotation file named by the user, or the only one that fits the first fitting usual name; None: no such.

    Raises:
        ValueError: the named file does not exist, or several fit; the message names them and the recipe key.
    """
    filesystem, base = resolve(root)
    if given:
        target, path = resolve(given if is_uri(given) else join(root, given))
        if target.get_file_info(path).type != fs.FileType.File:
            raise ValueError(f"{key}: {given} is not a file below {root}")
        return given
    listed: dict[str, list[str]] = {}
    for pattern in names:
        folder, name = posixpath.split(pattern)
        if folder not in listed:
            selector = fs.FileSelector(posixpath.join(base, folder), allow_not_found=True)
            listed[folder] = [f.base_name for f in filesystem.get_file_info(selector) if f.is_file]
        matches = sorted(n for n in listed[folder] if fnmatch(n, name))
        if name == "*.json":
            matches = [n for n in matches if not any(fnmatch(n, other) for other in _OTHER_TASKS)]
        if len(matches) > 1:
            raise ValueError(f"{root}: several annotation files fit ({', '.join(matches[:4])}): name one by {key}")
        if matches:
            return posixpath.join(folder, matches[0])
    return None


def read_document(root: str, file: str) -> tuple[dict[str, Any], str]:
    """The parsed file, known to hold lists of objects under images, annotations and categories, and its sha256.

    Raises:
        ValueError: unreadable, not JSON, not COCO, or without images; the message names the file and the field.
    """
    try:
        content = read_bytes(file if is_uri(file) else join(root, file))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({_first_line(error)})") from None
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({_first_line(error)})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{file}: not COCO: expected an object with images, annotations, categories, got a list")
    for name in ("images", "annotations", "categories"):
        value = document.get(name)
        if not isinstance(value, list):
            got = f"of type {type(value).__name__}" if name in document else "missing"
            raise ValueError(f"{file}: not COCO: {name!r} is {got}: expected a list")
        for index, entry in enumerate(value):
            if not isinstance(entry, dict):
                raise ValueError(f"{file}: not COCO: {name}[{index}] is of type {type(entry).__name__}")
    if not document["images"]:
        raise ValueError(f"{file}: 'images' is empty: expected at least one image")
    return document, sha256


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


def check_references(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Iterable[Category], file: str
) -> None:
    """Refuses odd or repeated image ids, and annotations whose image or category is not in the file."""
    image_ids = set()
    for index, image in enumerate(images):
        identifier = image.get("id")
        if type(identifier) not in (int, str):
            raise ValueError(f"{file}: images[{index}].id is {identifier!r}: expected an integer or a string")
        if identifier in image_ids:
            raise ValueError(f"{file}: images[{index}].id is {identifier!r} for the second time")
        image_ids.add(identifier)
    category_ids = {category.id for category in categories}
    for index, annotation in enumerate(annotations):
        for name, known in (("image_id", image_ids), ("category_id", category_ids)):
            value = annotation.get(name)
            if type(value) not in (int, str) or value not in known:
                kind = name.removesuffix("_id")
                got = f"is {value!r}" if name in annotation else "is missing"
                raise ValueError(
                    f"{file}: annotations[{index}].{name} {got} (annotation id {annotation.get('id')!r}): "
                    f"no such {kind}"
                )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
