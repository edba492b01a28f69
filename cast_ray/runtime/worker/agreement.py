"""Whether a stage that ran again gave what the store holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

TOLERANCE = 1e-4
"""Relative difference up to which two numbers are equal: what another order of sums leaves, in a few hundred steps."""
ABSOLUTE_TOLERANCE = 1e-7
OF_THE_CLOCK = "images_per_s"
BESIDE = "val/"
"""Names of what validation beside training has added to a curve, which running again does not."""


@dataclass(frozen=True)
class Difference:
    """A value that is not the stored one; None: it is missing."""

    what: str
    stored: Any
    again: Any

    def __str__(self) -> str:
        return f"{self.what}: stored {_short(self.stored)}, now {_short(self.again)}"


def compare_curves(
    stored: Sequence[Mapping[str, float]], again: Sequence[Mapping[str, float]], last_step: int
) -> tuple[int, list[Difference]]:
    """Compares loss, terms and learning rate of two curves, entry by entry.

    Args:
        last_step: step at which the second run ended.

    Returns:
        How many entries were compared, and the differences in the order of the steps.
    """
    here = {int(entry["step"]): entry for entry in stored if "loss" in entry and entry["step"] <= last_step}
    there = {int(entry["step"]): entry for entry in again}
    found: list[Difference] = []
    for step in sorted(here | there):
        one, other = here.get(step, {}), there.get(step, {})
        names = [n for n in {**one, **other} if n not in ("step", OF_THE_CLOCK) and not n.startswith(BESIDE)]
        found += _differences({n: one.get(n) for n in names}, {n: other.get(n) for n in names}, f"step {step}, ")
    return len(here), found


def compare_metrics(stored: Mapping[str, Any], again: Mapping[str, Any]) -> list[Difference]:
    """Compares metrics, those of each class too."""
    return list(_differences(stored, again, ""))


def compare_labels(stored: pa.Table, again: pa.Table) -> list[Difference]:
    """Compares the pseudo-labels of each image: their classes, masks and scores, in their order."""
    here, there = ({row["position"]: row for row in table.to_pylist()} for table in (stored, again))
    found = []
    for position in sorted(here | there):
        one, other = (rows.get(position) for rows in (here, there))
        if one is None or other is None or not _same_labels(one["instances"], other["instances"]):
            counts = (None if row is None else len(row["instances"]) for row in (one, other))
            uri = (one or other or {})["uri"]
            found.append(Difference(f"labels of {uri}", *counts))
    return found


def _same_labels(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a["category_id"] == b["category_id"] and a["rle"] == b["rle"] and _equal(a["score"], b["score"])
        for a, b in zip(one, other)
    )


def _differences(stored: Mapping[str, Any], again: Mapping[str, Any], prefix: str) -> Iterator[Difference]:
    for name in {**stored, **again}:
        one, other = stored.get(name), again.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{name}/")
        elif not _equal(one, other):
            yield Difference(f"{prefix}{name}", one, other)


def _equal(one: Any, other: Any) -> bool:
    """Numbers are equal up to rounding, in lists too."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        is_close = math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
        return is_close or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
