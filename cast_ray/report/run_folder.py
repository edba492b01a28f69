"""A run folder: results as files, and the plan that says which are still to come.

<run>/sweep.json                                tables and the rows and seeds that were asked for
<run>/<table>__<row>__s<seed>/result.json       one result
<run>/<table>__<row>__s<seed>/matches-*.npz     per-image data of its evaluations
<run>/<table>__<row>__s<seed>/samples.json      its worst and best images
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cast_ray.files import write_atomically
from cast_ray.report.content import Result
from cast_ray.report.metrics import PER_CLASS
from cast_ray.stages.table import Table, load_table

PLAN = "sweep.json"
RESULT = "result.json"


def matches_file(role: str) -> str:
    """Name of the per-image data of one of a row's models, beside its result."""
    return f"matches-{role}.npz"


@dataclass(frozen=True)
class RunPlan:
    """What a sweep was asked for. results_uri: folder in the store that a row's result appears in when it ends."""

    tables: tuple[Table, ...] = ()
    expected: tuple[tuple[str, str, int], ...] = ()
    """(table, row, seed)."""
    recipes: tuple[str, ...] = ()
    """Digest of the recipe of each; empty: any. Results of another recipe are of an earlier command."""
    results_uri: str = ""

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
    plan: RunPlan
    results: tuple[Result, ...] = field(repr=False)

    @property
    def table_names(self) -> tuple[str, ...]:
        names = [table for table, _, _ in self.plan.expected] + [r["table"] for r in self.results]
        return tuple(dict.fromkeys(names))

    def pending(self, table: str | None = None) -> list[tuple[str, str, int]]:
        """(table, row, seed) that were asked for and have no result yet."""
        there = {(r["table"], r["row"], r["seed"]) for r in self.results}
        return [key for key in self.plan.expected if key not in there and table in (None, key[0])]


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """Of all that a recipe says but where it runs."""
    content = {key: value for key, value in recipe.items() if key != "runtime"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()[:16]


def write_plan(
    run_dir: str | Path,
    tables: Sequence[Table],
    expected: Iterable[tuple[str, str, int]],
    results_uri: str = "",
    recipes: Iterable[str] = (),
) -> Path:
    """Notes in a run folder what a sweep is about to run, before its first result is there.

    What an earlier command asked for of other tables stays; of these tables its results do.

    Args:
        expected: (table, row, seed).
        results_uri: see `RunPlan`.
        recipes: digest of each expected recipe: until they are there, results of other recipes are not shown; none:
            whatever lies in the folder counts.
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
    }
    write_atomically(path, json.dumps(content, indent=1))
    return path


def read_plan(run_dir: str | Path) -> RunPlan:
    """The plan of a run folder; an empty one where there is none.

    Raises:
        ValueError: the file is not a plan.
    """
    path = Path(run_dir) / PLAN
    if not path.is_file():
        return RunPlan()
    try:
        content = json.loads(path.read_text())
        expected = tuple((str(table), str(row), int(seed)) for table, row, seed in content["expected"])
        tables = tuple(table for spec in content["tables"] if (table := _table_of(spec)) is not None)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the plan of a sweep: {error}") from None
    return RunPlan(tables, expected, tuple(content.get("recipes", ())), content.get("results_uri", ""))


def _table_of(spec: dict[str, Any]) -> Table | None:
    # as it was written: a grid is expanded already, and rows of 10,000 recipes need no second look
    missing = Table.model_fields.keys() - spec.keys()
    return None if missing else Table.model_construct(**spec | {"seeds": tuple(spec["seeds"])})


def read_run(run_dir: str | Path) -> Run:
    """Plan and results of a run folder; results of a recipe that is about to be replaced are left out.

    Raises:
        ValueError: neither a result nor a plan, or a file that is not one (the message names it and the missing key).
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"{run_dir}: no such folder")
    plan = read_plan(folder)
    digests = plan.digests
    results = [
        result
        for result in read_results(folder, may_be_empty=bool(plan.expected))
        for wanted in [digests.get((result["table"], result["row"], result["seed"]))]
        if wanted is None or wanted == recipe_digest(result.get("recipe") or {})
    ]
    return Run(folder, plan, tuple(results))


def read_results(run_dir: str | Path, may_be_empty: bool = False) -> list[Result]:
    """The results of one run folder, in the order in which they were started.

    Raises:
        ValueError: no result in the folder, or a file that is not a result (the message names it and the missing key).
    """
    paths = sorted(Path(run_dir).glob(f"*/{RESULT}"))
    if not paths and not may_be_empty:
        raise ValueError(f"{run_dir}: expected <table>__<row>__s<seed>/{RESULT} files, found none")
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from None
        missing = [key for key in ("table", "row", "seed", "status") if key not in result]
        if missing:
            raise ValueError(f"{path}: not a result: no {', '.join(missing)}")
        results.append(result | {"metrics": _all_metrics(result), "folder": str(path.parent)})
    return sorted(results, key=lambda r: (r.get("started") or "", r["seed"]))


def _all_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Metrics, those of a class as `student/per_class/<name>`, and the last diagnostics as `distill/margin`."""
    metrics = dict(result.get("metrics") or {})
    for role, values in (result.get("per_class") or {}).items():
        metrics |= {f"{role}/{PER_CLASS}/{name}": value for name, value in values.items()}
    for stage, points in (result.get("diagnostics") or {}).items():
        for point in reversed(points):  # not each point has each key: FNR needs labelled pixels among the anchors
            for key, value in point.items():
                if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                    metrics.setdefault(f"{stage}/{key}", value)
    return metrics
