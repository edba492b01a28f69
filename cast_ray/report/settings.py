"""Results of different settings in one table: they are named, and never averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cast_ray.common.text import first_of
from cast_ray.plan.ablation import Table
from cast_ray.plan.settings import LOCATIONS, differing, overridden, settings_of
from cast_ray.report.content import Result

MAX_KEYS, MAX_ROWS = 6, 4


def averageable(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Returns the results whose seeds may be averaged, and a note on each one that is left out.

    Of a row's results with different settings those count that agree with its newest finished one.
    """
    by_row: dict[str, list[Result]] = {}
    for result in results:
        if not result.is_unreadable:
            by_row.setdefault(result.row, []).append(result)
    left_out: dict[int, str] = {}
    for row, each in by_row.items():
        newest = max(each, key=lambda r: (r.is_done, r.started or ""))
        wanted = _settings(newest)
        for result in each:
            found = _settings(result)
            if keys := differing(wanted, found):
                words = [f"{key} {value_words(found[key])} instead of {value_words(wanted[key])}" for key in keys]
                left_out[id(result)] = (
                    f"WARNING: {row}, seed {result.seed} is left out, because its settings are not those of the "
                    f"row's newest result (seed {newest.seed}): {first_of(words, MAX_KEYS)}."
                )
    return [r for r in results if id(r) not in left_out], list(left_out.values())


def mixed_settings(results: Sequence[Result], table: Table | None) -> list[str]:
    """A note that names the keys in which rows differ beyond what the table says of them; [] where there are none.

    Args:
        table: whose rows say in what they are meant to differ; None: nobody knows that.
    """
    values: dict[str, dict[str, tuple[Any, dict[str, None]]]] = {}  # key -> value as text -> value, rows
    for result in results:
        if table is None or result.row not in table.rows or result.is_unreadable:
            continue
        own = overridden(table.rows[result.row])
        for key, value in _settings(result).items():
            if key not in own:
                _, rows = values.setdefault(key, {}).setdefault(repr(value), (value, {}))
                rows[result.row] = None
    mixed = []
    for key, found in values.items():
        words = [f"{value_words(value)}: {first_of(list(rows), MAX_ROWS)}" for value, rows in found.values()]
        if len(found) > 1:
            mixed.append(f"{key} ({'; '.join(words)})")
    if not mixed:
        return []
    return [
        "WARNING: results of different settings are mixed in this table, so that rows differ by more than the table "
        f"says: {first_of(mixed, MAX_KEYS)}."
    ]


def _settings(result: Result) -> dict[str, Any]:
    """Leaves out where the dataset lies: its content hash tells one dataset from another."""
    return {k: v for k, v in settings_of(result.recipe).items() if k not in LOCATIONS}


def value_words(value: Any) -> str:
    """A setting's value as one reads it."""
    return "empty" if value in ("", None) else str(value)
