"""An ablation table: named rows of recipe overrides, read from `sweeps/tables/<name>.yaml`.

A row is what differs from the base recipe and nothing else, so that two rows can be compared by reading them. Grid axes
multiply the rows. A value `x2` is twice what the base recipe has, so that one table fits every preset and scale. The
paper's values stay in `cast_ray/paper/tables.json`; a table only names which of them belong beside its columns.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from cast_ray.common.text import FOLDER_NAME_RULE, is_folder_name, nearest
from cast_ray.plan.metrics import check_metric, why_missing
from cast_ray.plan.settings import overridden, settings_of
from cast_ray.plan.yaml_files import read_spec, shipped_folder
from cast_ray.recipe import CHOSEN_FIRST, SCALES, Recipe, build_recipe, preset_names
from cast_ray.recipe.part import Seed, StrictModel
from cast_ray.recipe.strict_yaml import read_yaml

TABLES_DIR = shipped_folder("tables", "tables")
DEFAULT_PRESET, DEFAULT_SCALE = "shapes", "demo"

# Of directories and trials; a slash would nest them, a leading dot hide them.
_POINT_VALUE = re.compile(r"=(\[[^]]*\]|[^,]*)")
_FACTOR = re.compile(r"x(\d+(?:\.\d+)?)")


class Table(StrictModel):
    """One ablation: what is compared, on which seeds, against which baseline and which published values."""

    name: str
    title: str
    metric: str
    """The metric that rows are compared by, for example `student/mask_ap` (percent); see `plan.metrics`."""
    baseline: str
    """The row that differences are taken to."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    base: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe key -> value of all rows; also `preset` and `scale`, where the command names none."""
    rows: dict[str, dict[str, Any]] = Field(min_length=1)
    """Row name -> dotted recipe key -> value; with a grid, every row at every point of it."""
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """Axis -> values of a recipe key (`loss.lambda_pxl: [0.1, 0.2]`), or label -> overrides."""
    paper: str = ""
    """Key of the paper's table in `cast_ray/paper/tables.json`."""
    paper_columns: dict[str, str | list[str]] = Field(default_factory=dict)
    """Column of the paper's table -> metric of ours that it stands beside, or several."""
    paper_rows: dict[str, str | dict[str, str]] = Field(default_factory=dict)
    """Row of ours -> the paper's row, or metric -> the paper's row, where the names differ."""

    @model_validator(mode="before")
    @classmethod
    def _expand_grid(cls, spec: Any) -> Any:
        if not isinstance(spec, dict) or not isinstance(grid := spec.get("grid"), dict):
            return spec
        rows = spec.get("rows") or {"": {}}
        axes = [_axis(name, values) for name, values in grid.items()]
        if not isinstance(rows, dict) or not all(isinstance(overrides, dict) for overrides in rows.values()):
            return spec
        expanded = {}
        for (row, overrides), *point in itertools.product(rows.items(), *axes):
            name = ", ".join(part for part in (row, *(label for label, _ in point)) if part)
            if name in expanded:
                raise ValueError(f"grid: two rows are called {name!r}: expected points with different names")
            expanded[name] = {**overrides, **{k: v for _, part in point for k, v in part.items()}}
        baseline = _point_called(spec.get("baseline"), expanded)
        return {**spec, "rows": expanded} | ({"baseline": baseline} if baseline else {})

    @field_validator("rows")
    @classmethod
    def _rows_have_names(cls, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for row in rows:
            if not is_folder_name(row):
                raise ValueError(f"row {row!r}: {FOLDER_NAME_RULE}")
        return rows

    @model_validator(mode="after")
    def _names_exist(self) -> Table:
        if self.baseline not in self.rows:
            raise ValueError(f"baseline {self.baseline!r} is not a row{nearest(self.baseline, list(self.rows))}")
        self._metrics_exist()
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected different ones, got {list(self.seeds)}")
        for key, known in (("preset", preset_names()), ("scale", SCALES)):
            if key in self.base and self.base[key] not in known:
                raise ValueError(f"base: {key}: unknown {self.base[key]!r}{nearest(str(self.base[key]), known)}")
        for where, overrides in self._parts():
            if "seed" in overrides:
                raise ValueError(f"{where}: seed: expected the table's `seeds`, which all rows share")
            try:
                resolve_recipe(DEFAULT_PRESET, DEFAULT_SCALE, self._base_overrides, overrides)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if self.paper_columns and not self.paper:
            raise ValueError("paper_columns without paper: expected the paper's table to be named")
        for row in self.paper_rows:
            if row not in self.rows:
                raise ValueError(f"paper_rows: {row!r} is not a row{nearest(row, list(self.rows))}")
        if self.paper:
            self.paper_values()
        return self

    def _metrics_exist(self) -> None:
        named = [("metric", self.metric)]
        named += [
            ("paper_columns", name)
            for metrics in self.paper_columns.values()
            for name in ([metrics] if isinstance(metrics, str) else metrics)
        ]
        compared = {name for _, name in named}
        for where, name in named:
            try:
                check_metric(name)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        for row, names in self.paper_rows.items():
            for name in names if isinstance(names, dict) else ():
                if name not in compared:
                    raise ValueError(
                        f"paper_rows: {row!r}: no paper_columns name metric {name!r}{nearest(name, sorted(compared))}"
                    )

    def _parts(self) -> list[tuple[str, dict[str, Any]]]:
        """What the table's author wrote, piece by piece: a grid of 10,000 rows is checked along its axes."""
        parts: list[tuple[str, dict[str, Any]]] = [("base", {})]
        if not self.grid:
            parts += [(f"row {row!r}", overrides) for row, overrides in self.rows.items()]
        else:
            parts += [(f"row {self.baseline!r}", self.rows[self.baseline])]
            for name, values in self.grid.items():
                parts += [(f"grid {name!r}, {label!r}", overrides) for label, overrides in _axis(name, values)]
        return parts

    @property
    def preset(self) -> str:
        """The preset of the base recipe, where the command names none."""
        return self.base.get("preset", DEFAULT_PRESET)

    @property
    def scale(self) -> str:
        return self.base.get("scale", DEFAULT_SCALE)

    @property
    def _base_overrides(self) -> dict[str, Any]:
        return {key: value for key, value in self.base.items() if key not in CHOSEN_FIRST}

    def paper_values(self, preset: str = "") -> dict[str, dict[str, float]]:
        """The published values beside this table: metric -> row -> value (rows that the paper lacks are left out).

        Args:
            preset: `ade20k` puts that dataset's columns in place of `{dataset}`, any other one Cityscapes'.

        Raises:
            ValueError: the paper's table, column or row does not exist; the message names the nearest.
        """
        if not self.paper:
            return {}
        published = _paper_rows(self.paper)
        values: dict[str, dict[str, float]] = {}
        for template, metrics in self.paper_columns.items():
            column = template.replace("{dataset}", "ade20k" if preset == "ade20k" else "cityscapes")
            known = sorted({name for cells in published.values() for name in cells})
            if column not in known:
                raise ValueError(f"paper_columns: no column {column!r} in {self.paper!r}{nearest(column, known)}")
            for metric in [metrics] if isinstance(metrics, str) else metrics:
                values[metric] = {}
                for row in self.rows:
                    named = self.paper_rows.get(row, row)
                    theirs = named if isinstance(named, str) else named.get(metric, "")
                    if row in self.paper_rows and theirs and theirs not in published:
                        raise ValueError(
                            f"paper_rows: no row {theirs!r} in {self.paper!r}{nearest(theirs, list(published))}"
                        )
                    if column in published.get(theirs, {}):
                        values[metric][row] = float(published[theirs][column])
        return values

    def paper_dataset(self, preset: str = "") -> str:
        """What the published values of `paper_values` were measured on, or an empty string."""
        if not self.paper:
            return ""
        both = any("{dataset}" in column for column in self.paper_columns)
        chosen = "ade20k" if preset == "ade20k" else "cityscapes"
        return str(_paper_tables()[self.paper].get("dataset", chosen if both else ""))

    def paper_metric(self, preset: str = "") -> str:
        """Which AP the published values of `paper_values` are, as in `evaluation.metric`: Cityscapes' own on that
        dataset, COCO's on ADE20K."""
        if not self.paper:
            return ""
        return "coco" if self.paper_dataset(preset).startswith("ade20k") else "cityscapes"

    def paper_curves(self) -> dict[str, dict[float, float]]:
        """The paper's table where its rows are numbers (label fractions, weights): metric or column -> number -> value.

        Columns that stand beside a metric of ours are called by it; the others (other methods) keep their own name.
        """
        curves: dict[str, dict[float, float]] = {}
        for row, cells in _paper_rows(self.paper).items() if self.paper else ():
            try:
                x = float(row)
            except ValueError:
                continue
            for column, value in cells.items():
                metrics = self.paper_columns.get(column, column)
                for name in [metrics] if isinstance(metrics, str) else metrics:
                    curves.setdefault(name, {})[x] = value
        return curves

    def row_recipe(
        self,
        row: str,
        preset: str | None = None,
        scale: str | None = None,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """The recipe of one row and seed.

        Args:
            row: a key of `rows`.
            preset, scale: names, as in `cast_ray.recipe.build_recipe`; None: those of the table.
            seed: the recipe's seed.
            overrides: the user's own, after the table's base; the row's come after them, or two rows could become the
                same run.

        Raises:
            ValueError: unknown row (the message names the nearest) or a bad override.
        """
        if "seed" in (overrides or {}):
            raise ValueError("seed: expected --seeds, which may name several (a row and a seed are one trial)")
        if row not in self.rows:
            raise ValueError(f"unknown row {row!r} of table {self.name!r}{nearest(row, list(self.rows))}")
        base = _in_turn(self._base_overrides, {**(overrides or {}), "seed": seed})
        return resolve_recipe(preset or self.preset, scale or self.scale, base, self.rows[row])

    def settings(
        self, preset: str | None = None, scale: str | None = None, overrides: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What all rows have in common: preset, scale, the table's base, the user's own; see `settings.settings_of`."""
        base = _in_turn(self._base_overrides, {**(overrides or {})})
        try:
            recipe = resolve_recipe(preset or self.preset, scale or self.scale, base, {})
            own: set[str] = set()
        except ValueError:  # what only a row makes valid
            recipe = self.row_recipe(self.baseline, preset, scale, overrides=overrides)
            own = overridden(self.rows[self.baseline])
        return {key: value for key, value in settings_of(recipe.model_dump(mode="json")).items() if key not in own}

    @property
    def base_keys(self) -> set[str]:
        """Dotted recipe keys that the table sets for all of its rows."""
        return overridden(self._base_overrides)

    def check_measured(self, recipes: Iterable[Recipe]) -> None:
        """Checks that rows can be compared at all.

        Args:
            recipes: of all rows of a run.

        Raises:
            ValueError: none of them will have the table's metric.
        """
        reasons = [why_missing(self.metric, recipe) for recipe in recipes]
        if reasons and all(reasons):
            raise ValueError(f"table {self.name!r}: no row will have its metric {self.metric}: {reasons[0]}")


def _axis(name: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """(label, overrides) of each point of an axis; nothing for a malformed one, which pydantic refuses."""
    if isinstance(values, dict):
        return [(str(label), part) for label, part in values.items() if isinstance(part, dict)]
    if not isinstance(values, list):
        return []
    short = name.rpartition(".")[2]
    return [(f"{short}={_label_of(value)}", {name: value}) for value in values]


def _label_of(value: Any) -> str:
    """How a value of a grid stands in the names of its rows."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _point_called(name: Any, rows: Iterable[str]) -> str | None:
    """The row that a baseline means whose values are written as in the grid: `lr=1e-3` for `lr=0.001`."""

    def normal(text: str) -> str:
        return _POINT_VALUE.sub(lambda match: f"={_label_of(read_yaml(match[1]))}", re.sub(r",\s*", ", ", text))

    if not isinstance(name, str) or name in rows:
        return None
    try:
        found = [row for row in rows if normal(row) == normal(name)]
    except ValueError:  # a name that holds what is no YAML
        return None
    return found[0] if len(found) == 1 else None


def resolve_recipe(preset: str, scale: str, base: Mapping[str, Any], row: Mapping[str, Any]) -> Recipe:
    """The recipe of a row's overrides on top of the base's, with `x2` resolved."""
    resolved = dict(row)
    for key, value in row.items():
        factor = _FACTOR.fullmatch(value) if isinstance(value, str) else None
        if factor is None:
            continue
        before = _value_of(_base_recipe(preset, scale, json.dumps(base, default=list)), key)
        if isinstance(before, bool) or not isinstance(before, int | float):
            continue  # a text, which may well be called x2
        resolved[key] = before * float(factor[1])
        if isinstance(before, int) and math.isfinite(resolved[key]):  # what is not, the recipe refuses
            resolved[key] = max(round(resolved[key]), min(before, 1))
    return build_recipe(preset, scale, _in_turn(base, resolved))


def _in_turn(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides applied one after the other: a column (`contrastive`) also replaces fields before it."""
    return {key: value for key, value in first.items() if key not in then} | dict(then)


@lru_cache(maxsize=64)
def _base_recipe(preset: str, scale: str, base: str) -> Recipe:
    return build_recipe(preset, scale, json.loads(base))


def _value_of(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def table_names() -> list[str]:
    """Names of the tables in `sweeps/tables`."""
    return sorted(path.stem for path in TABLES_DIR.glob("*.yaml"))


def load_table(name_or_path: str | Path) -> Table:
    """A table by name, or from a YAML file of your own.

    Raises:
        ValueError: no such table (the message names the nearest), or the file is not a table (the message names the
            file, the key and, for an unknown key, the nearest).
    """
    path = TABLES_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise ValueError(f"no table file {str(path)!r}")
        raise ValueError(f"unknown table {str(name_or_path)!r}{nearest(str(name_or_path), table_names())}")
    return read_spec(path, Table, "title, metric, baseline and rows")


@cache
def _paper_tables() -> dict[str, Any]:
    return json.loads((resources.files("cast_ray") / "paper" / "tables.json").read_text())


def _paper_rows(key: str) -> dict[str, dict[str, float]]:
    """Row name -> column -> value of one of the paper's tables; its first column names the rows.

    A table of several groups of rows (`main`) has its columns once for each: `student_52M.cityscapes_ap`.
    """
    tables = _paper_tables()
    known = [name for name, table in tables.items() if isinstance(table, dict)]
    if key not in known:
        raise ValueError(f"paper: unknown table {key!r}{nearest(key, known)}")
    table = tables[key]
    if "rows" in table:
        groups = {"": table["rows"]}
    elif "columns" in table:
        groups = {f"{name}.": rows for name, rows in table.items() if isinstance(rows, list) and name != "columns"}
    else:  # parallel lists
        lists = {name: values for name, values in table.items() if isinstance(values, list)}
        table = {"columns": list(lists)}
        groups = {"": list(zip(*lists.values()))}
    published: dict[str, dict[str, float]] = {}
    for prefix, rows in groups.items():
        for first, *cells in rows:
            for name, value in zip(table["columns"][1:], cells):
                if isinstance(value, int | float) and not isinstance(value, bool):
                    published.setdefault(str(first), {})[prefix + name] = value
    return published
