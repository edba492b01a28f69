"""The settings of a result: what two results must agree on, so that their difference is the rows' alone.

Settings are the fields of a recipe that can change a result. Seeds are none: results of several seeds are averaged.
Nor is anything that says where and how it runs (the fields marked CHANGES_NO_RESULT, and `runtime` but for its
precision), which enters no fingerprint either.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cast_ray.recipe import CONTRASTIVE_PRESETS, Recipe
from cast_ray.recipe.part import CHANGES_NO_RESULT, marked

NO_SETTING = frozenset(
    {"seed", *marked(Recipe, CHANGES_NO_RESULT)}
    | {f"stages.{stage}.batch_unlabelled" for stage in ("pretrain", "adapt", "refine")}
)
"""Dotted keys that change no result. Those under `data` may only decide which bad images are left out, and another set
of images is another dataset, which its content hash tells; three stages read no unlabelled image."""
PRECISION, OF_PRECISION = "runtime.precision", ("runtime.amp", "runtime.use_gpu")
"""What a run computes in is the one setting of its runtime, and these two keys decide it together."""
LOCATIONS = frozenset(
    f"data.{name}" for name in ("root", "annotations", "val_annotations", "image_dir", "val_image_dir")
)
"""Where a dataset lies; what it is, its content hash tells."""


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of a recipe's settings, as JSON has them.

    Args:
        recipe: a recipe as plain data (`Recipe.model_dump`, or from a `result.json`).
    """
    flat = flatten(json.loads(json.dumps(recipe, default=list)))
    settings = {key: value for key, value in flat.items() if not changes_nothing(key) and key not in OF_PRECISION}
    if all(key in flat for key in OF_PRECISION):
        amp, use_gpu = (flat[key] for key in OF_PRECISION)
        settings[PRECISION] = amp if amp != "auto" else "bf16" if use_gpu else "off"
    return settings


def changes_nothing(key: str) -> bool:
    """Whether a dotted recipe key is a seed, or says where and how it runs."""
    return key in NO_SETTING or (key.startswith("runtime.") and key not in OF_PRECISION)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested plain data as dotted key -> value; a teacher's synonyms stay one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_part = isinstance(value, Mapping) and prefix + key != "teacher.prompt.synonyms"
        flat |= flatten(value, f"{prefix}{key}.") if is_part else {prefix + key: value}
    return flat


def overridden(overrides: Iterable[str]) -> set[str]:
    """The dotted keys that overrides set; a named column (`contrastive`) sets several."""
    column = {f"contrastive.{name}" for fields in CONTRASTIVE_PRESETS.values() for name in fields}
    keys = {key for name in overrides for key in (column if name == "contrastive" else {name})}
    return keys | {PRECISION} if keys & set(OF_PRECISION) else keys


def differing(one: Mapping[str, Any], other: Mapping[str, Any], besides: Collection[str] = ()) -> list[str]:
    """Returns the keys whose values differ, apart from `besides`. A key that one of both lacks (from an older version)
    is unknown."""
    return [key for key, value in one.items() if key not in besides and key in other and other[key] != value]
