"""Classes that a user names for a teacher: in the command itself, in a text file or in a JSON file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cast_ray.common.paths import absolute, is_uri
from cast_ray.common.text_files import parse_json, read_text
from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco_document import read_categories

_EXPECTED = "expected names with commas between them, a .txt of one a line, a JSON list of names or a COCO .json"


def read_classes(text: str) -> list[Category]:
    """Reads the value of `--classes`.

    Args:
        text: names with commas between them, or a file (local path or URI): a .txt with one name a line, a .json that
            holds a list of names or COCO's `categories`, whose ids are then kept. Names without ids count from 1.

    Raises:
        ValueError: the file cannot be read, there is no name, or a name or an id is there twice.
    """
    option = f"--classes {text!r}"
    if not text.endswith((".json", ".txt")) and not _is_file(text):
        names = text.split(",")
    else:
        content = read_text(text, option)
        if content.lstrip().startswith(("{", "[")) or text.endswith(".json"):
            value = parse_json(content, option)
            if isinstance(value, dict) and _are_objects(value.get("categories")):
                return list(read_categories(value["categories"], option))
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise ValueError(f"{option}: {_EXPECTED}")
            names = value
        else:
            names = content.splitlines()
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"{option}: {_EXPECTED}")
    categories = [Category(i, name) for i, name in enumerate(names, 1)]
    check_classes(categories, "--classes")
    return categories


def check_classes(categories: Sequence[Category], where: str) -> None:
    """Checks that a teacher can be asked for these classes.

    Args:
        where: they come from, for the message.

    Raises:
        ValueError: there is none, one has no name, or a name or an id is there twice.
    """
    if not categories:
        raise ValueError(f"{where}: expected at least one name, got none")
    if any(not category.name.strip() for category in categories):
        raise ValueError(f"{where}: expected a name for each class, got an empty one")
    for values in ([c.name for c in categories], [c.id for c in categories]):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise ValueError(f"{where}: {twice[0]!r} is there twice")


def _is_file(text: str) -> bool:
    return is_uri(text) or os.path.isfile(absolute(text))


def _are_objects(entries: Any) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
