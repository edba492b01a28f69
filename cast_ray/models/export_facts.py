"""`export.json`: what is known of the exported files of a folder, and the same on the folder's model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cast_ray.common.files import check_replaceable, write_atomically
from cast_ray.models.card import with_exports
from cast_ray.models.student import CARD, CONFIG, read_config

FACTS = "export.json"
_FORMAT = "cast_ray exports"


def check_facts(file: Path) -> None:
    """Checks that the `export.json` beside a file, if there is one, is ours. Raises ValueError: it is not."""
    folder = file.parent
    expected = "another folder, or one without it"
    check_replaceable(folder, [FACTS], lambda: _read(folder) is not None, "facts of `cast-ray export`", expected)


def add_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Writes what is known of an exported file into the `export.json` beside it, which keeps those of other files.

    If the folder is a saved student, its model card shows the same.
    """
    folder = file.parent
    exports = {name: known for name, known in (_read(folder) or {}).items() if (folder / name).is_file()}
    exports[file.name] = dict(facts)
    write_atomically(folder / FACTS, json.dumps({"format": _FORMAT, "exports": exports}, indent=1))
    card, config = folder / CARD, folder / CONFIG
    if card.is_file() and config.is_file():
        try:
            read_config(config.read_bytes(), str(folder))
        except ValueError:  # a model of something else
            return
        write_atomically(card, with_exports(card.read_text(encoding="utf-8"), exports))


def _read(folder: Path) -> dict[str, Any] | None:
    """The exports of a folder by file name; None where it has no `export.json`, or one of something else."""
    path = folder / FACTS
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    is_ours = isinstance(content, dict) and content.get("format") == _FORMAT
    return content["exports"] if is_ours else None
