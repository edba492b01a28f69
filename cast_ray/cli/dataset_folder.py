"""The recipe of a dataset that a command is given as a folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cast_ray.common import registry
from cast_ray.common.paths import absolute

if TYPE_CHECKING:
    from cast_ray.recipe import Recipe

FORMATS = ", ".join(name for name in registry.ROWS["datasets"] if name != "shapes")
"""Names of the formats of datasets that lie in a folder."""


def recipe_of_folder(folder: str, kind: str | None, settings: list[str]) -> Recipe:
    """Returns the recipe of the format's preset, whose data part names the folder.

    Args:
        folder: path or URI.
        kind: format; None: recognised by the folders in it.
        settings: values of `--set`.

    Raises:
        ValueError: a key that is none of the data part, a bad value, or a format whose images lie in no folder.
    """
    from cast_ray.data.reading.inspection import guess_format  # what --help does without
    from cast_ray.recipe import build_recipe, parse_overrides, preset_names

    root = absolute(folder)
    kind = kind or guess_format(root)
    if kind == "shapes":
        raise ValueError(f"--format shapes: drawn scenes lie in no folder; expected {FORMATS} or a reader")
    quoted = json.dumps(root, ensure_ascii=False)  # text in YAML too, where a path may hold a colon
    overrides: dict[str, Any] = {"data.root": quoted, "data.format": kind, **parse_overrides(settings)}
    if unknown := [key for key in overrides if not key.startswith("data.")]:
        raise ValueError(f"--set {unknown[0]}: expected a key of the recipe's data part, for example data.annotations")
    return build_recipe(kind if kind in preset_names() else "coco", "full", overrides)
