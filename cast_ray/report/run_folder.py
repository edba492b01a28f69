"""A run folder: results as files, and the plan that says which are still to come.

<run>/sweep.json                                tables and the rows and seeds that were asked for
<run>/<table>__<row>__s<seed>/result.json       one result
<run>/<table>__<row>__s<seed>/matches-*.npz     per-image data of its evaluations
<run>/<table>__<row>__s<seed>/samples.json      its worst and best images
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cast_ray.common.digest import digest_of
from cast_ray.common.files import write_atomically
from cast_ray.plan.ablation import Table, load_table
from cast_ray.plan.prices import NO_PRICES, Prices
from cast_ray.report.content import UNREADABLE, Result

PLAN = "sweep.json"
RESULT = "result.json"


def matches_file(role: str) -> str:
    """Name of the per-image data of one of a row's models, beside its result."""
    return f"matches-{role}.npz"


@dataclass(frozen=True)
class RunRequest:
    """What a sweep was asked for. results_uri: folder in the store that a row's result appears in when it ends."""

    tables: tuple[Table, ...] = ()
    expected: tuple[tuple[str, str, int], ...] = ()
    """(table, row, seed)."""
    recipes: tuple[str, ...] = ()
    """Digest of the recipe of each; empty: any. Results of another recipe are of an earlier command."""
    results_uri: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Table -> what its rows have in common (`Table.settings`); a plan of an older version has none."""
    effects: Mapping[str, float] = field(default_factory=dict)
    """Table -> smallest effect of interest, where a command named one."""
    prices: Prices = NO_PRICES
    """What a device-hour costs, as the command that last ran has said."""

    @property
    def digests(self) -> dict[tuple[str, str, int], str]:
        """(table, row, seed) -> digest of its recipe, where that matters."""
        return {key: digest for key, digest in zip(self.expected, self.recipes) if digest}

    def table(self, name: str) -> Table | None:
        """A table of the plan, else the one of that name in `sweeps/tables`; None where its YAML is gone."""
        for table in self.tables:
            if table.name == name:
                return table
        try:
            return load_table(name)
        except ValueError:
            return None


@dataclass(frozen=True)
class Run:
    """All that lies in a run folder."""

    folder: Path
    plan: RunRequest
    results: tuple[Result, ...] = field(repr=False)

    @property
    def table_names(self) -> tuple[str, ...]:
        names = [table for table, _, _ in self.plan.expected] + [r.table for r in self.results]
        return tuple(dict.fromkeys(names))

    def pending(self, table: str | None = None) -> list[tuple[str, str, int]]:
        """(table, row, seed) that were asked for and have no result yet, or one that cannot be read."""
        there = {r.key for r in self.results if not r.is_unreadable}
        wanted = [*self.plan.expected, *(r.key for r in self.results if r.is_unreadable)]
        return [key for key in dict.fromkeys(wanted) if key not in there and table in (None, key[0])]


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """Digest of all that a recipe says, except where it runs."""
    content = {key: value for key, value in recipe.items() if key != "runtime"}
    return digest_of(content, 16, default=list)


def write_plan(
    run_dir: str | Path,
    tables: Sequence[Table],
    expected: Iterable[tuple[str, str, int]],
    results_uri: str = "",
    recipes: Iterable[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    effects: Mapping[str, float] | None = None,
    prices: Prices | None = None,
) -> Path:
    """Notes in a run folder what a sweep is about to run, before its first result is there.

    What an earlier command asked for of other tables stays; of these tables its results do.

    Args:
        expected: (table, row, seed).
        results_uri: see `RunRequest`.
        recipes: digest of each expected recipe: until they are there, results of other recipes are not shown; none:
            whatever lies in the folder counts.
        settings, effects: see `RunRequest`; of other tables those before stay.
        prices: see `RunRequest`; None or none named: those before stay.
    """
    path = Path(run_dir) / PLAN
    before = read_plan(run_dir)
    names = {table.name for table in tables}
    digests = before.digests
    others = [key for key in before.expected if key[0] not in names]
    expected, recipes = list(expected), list(recipes)
    merged = {table.name: table for table in (*before.tables, *tables)}
    content = {
        "tables": [table.model_dump(mode="json") for table in merged.values()],
        "expected": [list(key) for key in (*others, *expected)],
        "recipes": [digests.get(key, "") for key in others] + (recipes or [""] * len(expected)),
        "results_uri": results_uri or before.results_uri,
        "settings": {**before.settings, **(settings or {})},
        "effects": {**before.effects, **(effects or {})},
        "prices": (prices or before.prices).by_type,
    }
    write_atomically(path, json.dumps(content, indent=1))
    return path


def read_plan(run_dir: str | Path) -> RunRequest:
    """The plan of a run folder; an empty one where there is none.

    Raises:
        ValueError: the file is not a plan.
    """
    path = Path(run_dir) / PLAN
    if not path.is_file():
        return RunRequest()
    try:
        content = json.loads(path.read_text())
        expected = tuple((str(table), str(row), int(seed)) for table, row, seed in content["expected"])
        tables = tuple(table for spec in content["tables"] if (table := _table_of(spec)) is not None)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the plan of a sweep: {error}") from None
    recipes, results_uri = tuple(content.get("recipes", ())), content.get("results_uri", "")
    settings, effects = content.get("settings", {}), content.get("effects", {})
    prices = Prices(content.get("prices", {}))
    return RunRequest(tables, expected, recipes, results_uri, settings, effects, prices)


def _table_of(spec: dict[str, Any]) -> Table | None:
    # as it was written: a grid is expanded already, and rows of 10,000 recipes need no second look
    missing = Table.model_fields.keys() - spec.keys()
    return None if missing else Table.model_construct(**spec | {"seeds": tuple(spec["seeds"])})


def read_run(run_dir: str | Path) -> Run:
    """Plan and results of a run folder; results of a recipe that is about to be replaced are left out.

    Raises:
        ValueError: neither a result nor a plan, or a plan that is not one.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"{run_dir}: no such folder")
    plan = read_plan(folder)
    digests = plan.digests
    results = [
        result
        for result in read_results(folder, plan.expected)
        for wanted in [digests.get(result.key)]
        if wanted is None or result.is_unreadable or wanted == recipe_digest(result.recipe)
    ]
    return Run(folder, plan, tuple(results))


def read_results(run_dir: str | Path, expected: Sequence[tuple[str, str, int]] = ()) -> list[Result]:
    """The results of one run folder, in the order in which they were started.

    A file that cannot be read (cut by a full disk, edited by hand) is a result too: its status is UNREADABLE, its error
    says why, and its table, row and seed follow from its folder's name.

    Args:
        expected: (table, row, seed) that a plan names; where there are some, a folder may have no result yet.

    Raises:
        ValueError: no result in the folder.
    """
    paths = sorted(Path(run_dir).glob(f"*/{RESULT}"))
    if not paths and not expected:
        raise ValueError(f"{run_dir}: expected <table>__<row>__s<seed>/{RESULT} files, found none")
    results: list[Result] = []
    unreadable: list[tuple[Path, ValueError]] = []
    for path in paths:
        try:
            results.append(_read_result(path))
        except ValueError as error:
            unreadable.append((path, error))
    names = {f"{table}__{row}__s{seed}": (table, row, seed) for table, row, seed in expected}
    default = results[0].table if results else "unknown"
    for path, reason in unreadable:
        table, row, seed = names.get(path.parent.name) or _key_of_folder(path.parent.name, default)
        results.append(
            Result(table=table, row=row, seed=seed, status=UNREADABLE, error=str(reason), folder=path.parent)
        )
    return sorted(results, key=lambda r: (r.started or "", r.seed))


def _key_of_folder(name: str, default_table: str) -> tuple[str, str, int]:
    """(table, row, seed) as the name of a result's folder says them."""
    table, _, rest = name.partition("__")
    row, _, seed = rest.rpartition("__s")
    return (table, row, int(seed)) if table and row and seed.isdecimal() else (default_table, name, 0)


def _read_result(path: Path) -> Result:
    """One result; raises ValueError, which names the file, when it is not one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return Result.read(content, str(path)).model_copy(update={"folder": path.parent})
