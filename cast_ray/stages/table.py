"""An ablation table: named rows of recipe overrides, read from `sweeps/tables/<name>.yaml`.

A row is what differs from the base recipe and nothing else, so that two rows can be compared by reading them. The
paper's values stay in `cast_ray/paper/tables.json`; a table only names which of them belong beside its columns.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cast_ray.recipe import Recipe, build_recipe

TABLES_DIR = Path(__file__).parents[2] / "sweeps" / "tables"


class Table(BaseModel):
    """One ablation: what is compared, on which seeds, against which baseline and which published values."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    title: str
    metric: str
    """The metric that rows are compared by, for example `student/mask_ap` (percent)."""
    baseline: str
    """The row that differences are taken to."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    rows: dict[str, dict[str, Any]] = Field(min_length=1)
    """Row name -> dotted recipe key -> value."""
    paper: str = ""
    """Key of the paper's table in `cast_ray/paper/tables.json`."""
    paper_columns: dict[str, str] = {}
    """Column of the paper's table -> metric of ours that it stands beside."""

    @field_validator("rows")
    @classmethod
    def _rows_are_recipes(cls, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for row, overrides in rows.items():
            try:
                build_recipe("shapes", overrides=overrides)
            except ValueError as error:
                raise ValueError(f"row {row!r}: {error}") from None
        return rows

    @model_validator(mode="after")
    def _names_exist(self) -> Table:
        if self.baseline not in self.rows:
            raise ValueError(f"baseline {self.baseline!r} is not a row{_nearest(self.baseline, list(self.rows))}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected different ones, got {list(self.seeds)}")
        if self.paper_columns and not self.paper:
            raise ValueError("paper_columns without paper: expected the paper's table to be named")
        if self.paper:
            self.paper_values()
        return self

    def paper_values(self) -> dict[str, dict[str, float]]:
        """The published values beside this table: metric -> row -> value (rows that the paper lacks are left out).

        Raises:
            ValueError: the paper's table or column does not exist; the message names the nearest.
        """
        if not self.paper:
            return {}
        published = _paper_rows(self.paper)
        values: dict[str, dict[str, float]] = {}
        for column, metric in self.paper_columns.items():
            known = sorted({name for cells in published.values() for name in cells})
            if column not in known:
                raise ValueError(f"paper_columns: no column {column!r} in {self.paper!r}{_nearest(column, known)}")
            values[metric] = {
                row: float(cells[column]) for row, cells in published.items() if row in self.rows and column in cells
            }
        return values

    def paper_dataset(self) -> str:
        """What the published values were measured on, or an empty string."""
        return str(_paper_tables()[self.paper].get("dataset", "")) if self.paper else ""

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
        self, row: str, preset: str, scale: str = "demo", seed: int = 0, overrides: Mapping[str, Any] | None = None
    ) -> Recipe:
        """The recipe of one row and seed.

        Args:
            row: a key of `rows`.
            preset, scale: as in `cast_ray.recipe.build_recipe`.
            seed: the recipe's seed.
            overrides: the user's own; the row's come after them, or two rows could become the same run.

        Raises:
            ValueError: unknown row (the message names the nearest) or a bad override.
        """
        if row not in self.rows:
            raise ValueError(f"unknown row {row!r} of table {self.name!r}{_nearest(row, list(self.rows))}")
        return build_recipe(preset, scale, {**(overrides or {}), **self.rows[row], "seed": seed})


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
        raise ValueError(f"unknown table {str(name_or_path)!r}{_nearest(str(name_or_path), table_names())}")
    try:
        spec = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(spec, dict):
        raise ValueError(f"{path}: expected a mapping with title, metric, baseline and rows, got {type(spec).__name__}")
    try:
        return Table.model_validate({"name": path.stem, **spec})
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error)}") from None


def _paper_tables() -> dict[str, Any]:
    return json.loads((resources.files("cast_ray") / "paper" / "tables.json").read_text())


def _paper_rows(key: str) -> dict[str, dict[str, float]]:
    """Row name -> column -> value of one of the paper's tables; its first column names the rows."""
    tables = _paper_tables()
    known = [name for name, table in tables.items() if isinstance(table, dict)]
    if key not in known:
        raise ValueError(f"paper: unknown table {key!r}{_nearest(key, known)}")
    table = tables[key]
    if "rows" in table:
        columns, rows = table["columns"], table["rows"]
    else:  # parallel lists
        lists = {name: values for name, values in table.items() if isinstance(values, list)}
        columns, rows = list(lists), list(zip(*lists.values()))
    return {
        str(cells[0]): {
            name: value
            for name, value in zip(columns[1:], cells[1:])
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for cells in rows
    }


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else f": expected one of {', '.join(known)}"


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{_nearest(key, list(Table.model_fields))}")
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing")
        elif problem["type"] == "value_error":
            lines.append(message)
        else:
            lines.append(f"{key}: {message} (got {problem['input']!r})")
    return "; ".join(lines)
