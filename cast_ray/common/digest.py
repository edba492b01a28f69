"""The one digest of settings: fingerprints, keys of artifacts and of datasets are made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

FULL_DIGITS = 64
"""Hexadecimal digits of a whole SHA-256."""


def digest_of(value: Any, length: int = 20, default: Callable[[Any], Any] | None = None) -> str:
    """The first hexadecimal digits of the SHA-256 of a value's JSON with sorted keys.

    Args:
        value: anything that JSON has.
        length: number of digits.
        default: makes JSON of what JSON has not, as in `json.dumps`.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()[:length]
