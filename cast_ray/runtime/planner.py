"""From recipes to planned rows: each dataset read once, each row with what its result says about where it ran."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from rich.console import Console

import cast_ray
from cast_ray import registry
from cast_ray.datasets.fractions import split
from cast_ray.recipe import DataConfig, Recipe
from cast_ray.records import DatasetSplits
from cast_ray.runtime.cluster import hardware
from cast_ray.runtime.results import SweepContext
from cast_ray.runtime.store import ArtifactStore
from cast_ray.stages.cost import Size
from cast_ray.stages.graph import RowPlan, Stage, plan

# Settings of training that do not change which files a dataset is read from.
NOT_OF_THE_DATASET = {"label_fraction", "num_unlabelled", "image_px", "scale_jitter", "flip", "color_jitter"}


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["python", *sys.argv])


class RowPlanner:
    """Plans rows on the datasets that their recipes name.

    Args:
        recipes: of all rows that are known; more may follow on the same datasets.

    Raises:
        ValueError: a dataset is missing or unusable, or a label fraction leaves too few images.
    """

    def __init__(self, recipes: Sequence[Recipe], store: ArtifactStore, console: Console):
        self.store = store
        of_each = {_dataset_key(recipe.data): recipe for recipe in reversed(recipes)}
        self.datasets = {key: _Dataset(read_dataset(recipe, store, console)) for key, recipe in of_each.items()}
        for key, dataset in self.datasets.items():
            _check_fractions([r for r in recipes if _dataset_key(r.data) == key], dataset.splits)
        self._contexts: dict[tuple[str, str, str], SweepContext] = {}
        self._foundations: dict[tuple[str, str], str] = {}

    def save(self) -> None:
        """Puts the datasets' record tables into the store, where every worker can read them."""
        for dataset in self.datasets.values():
            _save_dataset(self.store, dataset)

    def fingerprints(self) -> set[str]:
        """Of the datasets in the store."""
        return {dataset.stage.fingerprint for dataset in self.datasets.values()}

    def plan(self, recipe: Recipe, *, table: str, run: str, row: str) -> tuple[SweepContext, RowPlan]:
        """One row's stages and the context of its result.

        Raises:
            ValueError: the recipe does not fit its dataset or has no teacher; the message names the row.
        """
        key = _dataset_key(recipe.data)
        splits = self.datasets[key].splits
        try:
            planned = plan(
                recipe,
                splits.content_hash,
                row=row,
                has_source=splits.source is not None,
                foundation=self._foundation(recipe, key),
            )
        except ValueError as error:
            raise ValueError(f"{table}, row {row!r}: {error}") from None
        if (table, run, key) not in self._contexts:
            self._contexts[table, run, key] = self._context(table, run, self.datasets[key])
        return self._contexts[table, run, key], planned

    def size(self, recipe: Recipe) -> Size:
        """How many images a row's stages without steps go through."""
        splits, data = self.datasets[_dataset_key(recipe.data)].splits, recipe.data
        rest = round((1 - data.label_fraction) * splits.train.num_rows)
        unlabelled = rest if data.num_unlabelled is None else min(rest, data.num_unlabelled)
        return Size(unlabelled, splits.val.num_rows)

    def _foundation(self, recipe: Recipe, key: str) -> str | None:
        folder = recipe.stages.foundation
        if folder and (folder, key) not in self._foundations:
            from cast_ray.runtime.models import import_foundation

            categories = self.datasets[key].splits.categories
            self._foundations[folder, key] = import_foundation(self.store, folder, recipe.teacher, categories)
        return self._foundations.get((folder, key))

    def _context(self, table: str, run: str, dataset: _Dataset) -> SweepContext:
        return SweepContext(
            name=run,
            table=table,
            command=command_line(),
            code_version=_code_version(),
            hardware=hardware(),
            store=self.store,
            dataset_key=dataset.stage.key,
            dataset=dataset.facts(),
            categories=dataset.splits.categories,
            runs_path=f"runs/{run}",
        )


@dataclass(frozen=True)
class _Dataset:
    """A dataset that rows of the sweep run on."""

    splits: DatasetSplits

    @property
    def stage(self) -> Stage:
        return Stage("dataset", "dataset", {}, {}, self.splits.content_hash[:20])

    def facts(self) -> dict[str, Any]:
        splits = self.splits
        return {
            "content_hash": splits.content_hash,
            "num_train": splits.train.num_rows,
            "num_val": splits.val.num_rows,
            "num_source": splits.source.num_rows if splits.source is not None else 0,
            "skipped": len(splits.skipped),
            "classes": [c.name for c in splits.categories],
        }


@cache
def _dataset_key(data: DataConfig) -> str:
    return json.dumps(data.model_dump(exclude=NOT_OF_THE_DATASET), sort_keys=True, default=list)


def read_dataset(recipe: Recipe, store: ArtifactStore, console: Console) -> DatasetSplits:
    """Reads (for `shapes`: draws where needed) the dataset of a recipe.

    Raises:
        ValueError: the dataset is missing or unusable; the message names the file and field.
    """
    data = recipe.data
    if data.format == "shapes":
        from cast_ray.datasets.shapes import draw

        shapes = data.shapes
        folder = f"shapes-{shapes.num_source}-{shapes.num_train}-{shapes.num_val}-s{shapes.seed}"
        data = data.model_copy(update={"root": data.root or store.uri("datasets", folder)})
        draw(data.root, shapes)
    elif not data.root:
        raise ValueError(f"data.root is empty: expected the folder of a {data.format} dataset (--set data.root=DIR)")
    splits: DatasetSplits = registry.lookup("datasets", data.format)(data)
    if splits.skipped:
        first = splits.skipped[0]
        console.print(
            f"[yellow]{len(splits.skipped)} images or annotations skipped[/yellow], "
            f"first: {first['kind']} {first['id']} ({first['file']}): {first['reason']}"
        )
    return splits


def _check_fractions(recipes: Sequence[Recipe], splits: DatasetSplits) -> None:
    """Refuses a label fraction that leaves too few images, before anything runs."""
    ids = splits.train.select(["image_id"])
    seen = set()
    for recipe in recipes:
        needs_unlabelled = recipe.loss.lambda_semi > 0 or recipe.loss.lambda_pxl > 0
        data, workers = recipe.data, recipe.runtime.num_workers
        case = (data.label_fraction, recipe.seed, data.num_unlabelled, workers, needs_unlabelled)
        if case in seen:
            continue
        seen.add(case)
        _, unlabelled = split(ids, data.label_fraction, recipe.seed, data.num_unlabelled, workers)
        if needs_unlabelled and len(unlabelled) < workers:
            raise ValueError(
                f"data.label_fraction {data.label_fraction} of {splits.train.num_rows} images leaves "
                f"{len(unlabelled)} unlabelled images: expected at least 1 per worker ({workers})"
            )


def _save_dataset(store: ArtifactStore, dataset: _Dataset) -> None:
    """Record tables as an artifact, where every worker of the cluster can read them."""
    stage, splits = dataset.stage, dataset.splits
    if store.has(stage.key):
        return
    for name, table in (("train", splits.train), ("val", splits.val), ("source", splits.source)):
        if table is not None:
            buffer = io.BytesIO()
            pa.parquet.write_table(table, buffer)
            store.add(stage, f"{name}.parquet", buffer.getvalue())
    store.commit(stage, {"categories": [vars(c) for c in splits.categories], "skipped": list(splits.skipped)})


@cache
def _code_version() -> str:
    """The package's version and, in a git checkout, its commit."""
    folder = Path(cast_ray.__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return cast_ray.__version__
    commit = described.stdout.strip()
    return f"{cast_ray.__version__}+{commit}" if described.returncode == 0 and commit else cast_ray.__version__
