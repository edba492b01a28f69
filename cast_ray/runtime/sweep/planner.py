"""From recipes to planned rows: each dataset read once, each row with what its result says about where it ran."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console

from cast_ray.common.registry import lookup
from cast_ray.common.version import VERSION
from cast_ray.plan.cost import Size
from cast_ray.plan.graph import NoTeacherError, RowPlan, plan, split_part
from cast_ray.plan.reads import needs_unlabelled
from cast_ray.recipe import DataConfig, Recipe
from cast_ray.runtime.cluster import Cluster, hardware
from cast_ray.runtime.data.dataset import READ_FIELDS, StoredDataset, read_dataset
from cast_ray.runtime.data.splits import store_splits, stored_split
from cast_ray.runtime.store.artifacts import ArtifactStore, LostFilesError
from cast_ray.runtime.sweep.row_results import SweepContext


def command_line() -> str:
    """Returns what the user typed, as it can be typed again."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.name == "__main__.py":
        return shlex.join(["python", "-m", path.parent.name, *arguments])
    if path.suffix == ".py":
        return shlex.join(["python", program, *arguments])
    return shlex.join([path.name, *arguments])


class RowPlanner:
    """Plans rows on the datasets that their recipes name.

    Args:
        runs: name of each run and the recipes of all of its rows that are known; more may follow on the same datasets.
        connect: starts or joins Ray, for datasets of many images.
        dry_run: nothing is fetched from a hub.

    `warnings` holds a sentence for each split, and each choice of labelled images, without one object.

    Raises:
        ValueError: a dataset is missing or unusable, or a label fraction leaves too few images.
    """

    def __init__(
        self,
        runs: Mapping[str, Sequence[Recipe]],
        store: ArtifactStore,
        console: Console,
        connect: Callable[[], Cluster],
        dry_run: bool = False,
    ):
        self.store, self.dry_run = store, dry_run
        of_each: dict[str, list[Recipe]] = {}
        named: dict[str, list[str]] = {}
        for run, recipes in runs.items():
            for recipe in recipes:
                key = _dataset_key(recipe.data)
                of_each.setdefault(key, []).append(recipe)
                named.setdefault(key, []).append(_run_path(run))
        self.datasets: dict[str, StoredDataset] = {}
        for key, recipes in of_each.items():
            run_paths = list(dict.fromkeys(named[key]))
            dataset = self.datasets[key] = read_dataset(recipes, store, console, run_paths, connect)
            if (manifest := store.find_manifest(dataset.key)) is not None:
                store.carry({dataset.key: manifest})  # every process of the sweep reads the dataset's tables
        self.warnings: list[str] = [warning for dataset in self.datasets.values() for warning in dataset.warnings]
        self._chosen: set[tuple[str, int, int, bool]] = set()
        self._contexts: dict[tuple[str, str, str], SweepContext] = {}
        self._foundations: dict[tuple[str, str, str], str | None] = {}
        self._typical: dict[str, tuple[int, int]] = {}
        for key, recipes in of_each.items():
            self._choose_images(key, recipes)

    def fingerprints(self) -> set[str]:
        """Fingerprints of the datasets in the store."""
        return {dataset.fingerprint for dataset in self.datasets.values()}

    def plan(self, recipe: Recipe, *, table: str, run: str, row: str) -> tuple[SweepContext, RowPlan]:
        """One row's stages and the context of its result.

        Raises:
            ValueError: the recipe does not fit its dataset or has no teacher (`NoTeacherError`); the message names the
                row.
        """
        key = _dataset_key(recipe.data)
        dataset = self.datasets[key]
        try:
            _check_own_models(recipe)
            self._choose_images(key, [recipe])
            planned = plan(
                recipe,
                dataset.content_hash,
                row=row,
                has_source=dataset.has_source,
                foundation=self._foundation(recipe, key),
                hashes=dataset.hashes(recipe.data),
            )
        except ValueError as error:
            kind = NoTeacherError if isinstance(error, NoTeacherError) else ValueError
            raise kind(f"{table}, row {row!r}: {error}") from None
        if (table, run, key) not in self._contexts:
            self._contexts[table, run, key] = self._context(table, run, dataset)
        return self._contexts[table, run, key], planned

    def size(self, recipe: Recipe) -> Size:
        """How many images a row's stages without steps go through, and how large these are."""
        dataset = self.datasets[_dataset_key(recipe.data)]
        part = split_part(recipe, dataset.hashes(recipe.data), unlabelled=True)
        chosen = stored_split(self.store, dataset.content_hash, part)
        sizes = (recipe.input_size(by_teacher=by_teacher) for by_teacher in (True, False))
        image_hw = None if all(size.is_fixed for size in sizes) else self._typical_hw(dataset)
        return Size(len(chosen.unlabelled), dataset.num_images["val"], image_hw, len(chosen.labelled))

    def _typical_hw(self, dataset: StoredDataset) -> tuple[int, int]:
        """Median height and width of the validation images, pixels."""
        if dataset.key not in self._typical:
            table = self.store.read_table(dataset.key, "val.parquet", columns=["height", "width"])
            height, width = (int(np.median(table.column(name).to_numpy())) for name in ("height", "width"))
            self._typical[dataset.key] = (height, width)
        return self._typical[dataset.key]

    def num_classes(self, recipe: Recipe) -> int:
        """C of a row's dataset."""
        return len(self.datasets[_dataset_key(recipe.data)].categories)

    def forget_foundations(self) -> None:
        """Imports teachers again when they are next needed: the store may have lost them."""
        self._foundations.clear()

    def _choose_images(self, key: str, recipes: Sequence[Recipe]) -> None:
        """Stores D_l and D_u of recipes that choose images in a way that is new."""
        new: dict[tuple[str, int, int, bool], Recipe] = {}
        for recipe in recipes:
            is_read = needs_unlabelled(recipe)
            new[recipe.data.model_dump_json(), recipe.seed, recipe.runtime.num_workers, is_read] = recipe
        if missing := new.keys() - self._chosen:
            found = store_splits(self.datasets[key], [new[choice] for choice in missing], self.store)
            self.warnings += [warning for warning in found if warning not in self.warnings]
            self._chosen |= missing

    def _foundation(self, recipe: Recipe, key: str) -> str | None:
        if not recipe.needs_foundation:
            return None
        source = (recipe.stages.foundation, recipe.teacher.model_dump_json(), key)
        if source not in self._foundations:
            from cast_ray.runtime.store.models import import_foundation  # torch and transformers

            categories = self.datasets[key].categories
            try:
                self._foundations[source] = import_foundation(self.store, recipe, categories, dry_run=self.dry_run)
            except LostFilesError as error:
                raise ValueError(str(error)) from None
        return self._foundations[source]

    def _context(self, table: str, run: str, dataset: StoredDataset) -> SweepContext:
        return SweepContext(
            name=run,
            table=table,
            command=command_line(),
            code_version=_code_version(),
            hardware=hardware(),
            store=self.store,
            dataset_key=dataset.key,
            dataset=dataset.facts(),
            categories=dataset.categories,
            runs_path=_run_path(run),
        )


def _check_own_models(recipe: Recipe) -> None:
    """Imports the encoders and decoders that are a user's own and reads the settings of whole models to start from,
    before any stage is run that does not need them.

    Raises:
        ValueError: one cannot be imported or called, or a whole model has other settings than the recipe.
    """
    parts = {"student": recipe.student} | ({"teacher": recipe.teacher} if recipe.teacher.kind == "expert" else {})
    for part, model in parts.items():
        field = "encoder.name"
        try:
            if ":" in model.encoder.name:
                lookup("encoders", model.encoder.name)
            field = "decoder"
            if ":" in model.decoder:
                from cast_ray.models.decoders import find_decoder  # torch, which code of one's own needs anyway

                find_decoder(model.decoder)
        except ValueError as error:
            raise ValueError(f"{part}.{field}: {error}") from None
        if model.checkpoint:
            from cast_ray.models.published import check_start  # transformers, which reads the settings

            try:
                check_start(model)
            except ValueError as error:
                raise ValueError(f"{part}.{error}") from None


def _run_path(run: str) -> str:
    """Returns the folder of a run's files below the storage path."""
    return f"runs/{run}"


@cache
def _dataset_key(data: DataConfig) -> str:
    """Recipes of the same key read the same files."""
    return json.dumps(data.model_dump(include=set(READ_FIELDS)), sort_keys=True, default=list)


@cache
def _code_version() -> str:
    """Returns the package's version and, in a git checkout of it, its commit."""
    here = Path(__file__)
    # An installed package may lie in a folder of somebody's repository (`.venv`), whose commit says nothing about it.
    commands = (["git", "ls-files", "--error-unmatch", here.name], ["git", "describe", "--always", "--dirty"])
    try:
        for command in commands:
            done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10)
            if done.returncode != 0:
                return VERSION
    except (OSError, subprocess.TimeoutExpired):
        return VERSION
    commit = done.stdout.strip()
    return f"{VERSION}+{commit}" if commit else VERSION
