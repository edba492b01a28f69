"""Named variants of a part of the recipe, each as one override: the paper's, the authors', and published students."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from cast_ray.recipe.losses import CONTRASTIVE_PRESETS
from cast_ray.recipe.models import STUDENT_PRESETS

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "contrastive": CONTRASTIVE_PRESETS,
    "student": STUDENT_PRESETS,
}
"""Part of the recipe -> name of a variant -> the fields that it sets."""
WHOLE = "variant"
"""The override that sets the variant of every part: `variant=released`."""


def is_variant(key: str) -> bool:
    """Whether an override names a variant instead of a field."""
    return key == WHOLE or key in VARIANTS


def variant_names(key: str) -> list[str]:
    """The variants that an override can name."""
    return list(next(iter(VARIANTS.values())) if key == WHOLE else VARIANTS[key])


def variant_fields(key: str, name: str) -> dict[str, dict[str, Any]]:
    """Part -> fields of a variant, which the caller may change.

    Args:
        key: a part of `VARIANTS`, or `variant` for all of them.
        name: of `variant_names(key)`.
    """
    parts = list(VARIANTS) if key == WHOLE else [key]
    return {part: copy.deepcopy(VARIANTS[part][name]) for part in parts}


def in_order(keys: Iterable[str]) -> list[str]:
    """Override keys as they are applied: the variant of all parts, then those of single parts, then fields."""
    return sorted(keys, key=lambda key: 0 if key == WHOLE else 1 if key in VARIANTS else 2)
