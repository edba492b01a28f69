"""A sweep from the user's command to its results: datasets, one plan of all tables, run."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from rich.console import Console

import cast_ray
from cast_ray import registry
from cast_ray.datasets.fractions import split
from cast_ray.recipe import Recipe
from cast_ray.records import DatasetSplits
from cast_ray.runtime.claims import Holder, Presence
from cast_ray.runtime.cluster import connect, hardware, stage_slots
from cast_ray.runtime.preview import Preview, hours, print_plan, row_labels, titles_of
from cast_ray.runtime.results import SweepContext, is_current, read_result, result_from_store
from cast_ray.runtime.store import ArtifactStore, Listed, committed, read_each
from cast_ray.runtime.trackers import Trackers
from cast_ray.stages.cost import CostModel, PlanCost, Size, cost_of
from cast_ray.stages.graph import RowPlan, Stage, SweepPlan, plan, plan_sweep
from cast_ray.stages.table import Table

MAX_MANIFESTS = 400
"""Manifests of earlier stages that an estimate is made from, newest first."""
# Settings of training that do not change which files a dataset is read from.
NOT_OF_THE_DATASET = {"label_fraction", "num_unlabelled", "image_px", "scale_jitter", "flip", "color_jitter"}


@dataclass(frozen=True)
class TableRequest:
    """One table of a sweep, already validated."""

    table: Table
    recipes: dict[tuple[str, int], Recipe]
    """(row, seed) -> recipe."""
    name: str
    """Of the run: the folder of its results."""


@dataclass(frozen=True)
class SweepRequest:
    """What the user asked for, already validated."""

    tables: tuple[TableRequest, ...]
    storage: str
    address: str | None
    num_cpus: int | None
    dry_run: bool = False
    budget_hours: float | None = None
    """Device-hours after which no stage is started."""
    price_per_hour: float | None = None
    keep_going: bool = False
    """Start further rows though the first ones all failed."""
    trackers: Trackers = field(default_factory=Trackers)


@dataclass(frozen=True)
class Sweep:
    """One table of a sweep, with its results in the store."""

    context: SweepContext
    rows: tuple[RowPlan, ...]
    contexts: tuple[SweepContext, ...] = ()
    """Of each row: they differ where rows are on different datasets."""


@dataclass(frozen=True)
class SweepOutcome:
    """What became of a sweep. `stopped`: why some rows were not finished, if they were not."""

    sweeps: tuple[Sweep, ...]
    stopped: str | None = None


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


def run_sweep(request: SweepRequest, console: Console) -> SweepOutcome | None:
    """Plans a sweep and runs what is missing; rows that failed say so in their result. None after a dry run.

    Raises:
        ValueError: the user's data, storage or resources do not fit, before any compute is spent.
    """
    store = ArtifactStore(request.storage)
    store.check_writable()
    datasets = _read_datasets(request, store, console)
    sweeps = [_plan_table(table, store, datasets, request) for table in request.tables]
    rows = [row for sweep in sweeps for row in sweep.rows]
    command = shlex.join(["python", *sys.argv])
    if request.dry_run:
        listed = store.list_artifacts()
        _preview(request, plan_sweep(rows, committed(listed)), datasets, listed, store, console)
        return None
    with Presence(store, command) as presence:
        needed = {stage.fingerprint for row in rows for stage in row.stages}
        needed |= {dataset.stage.fingerprint for dataset in datasets.values()}
        presence.need(needed, on_wait=lambda holder: _say_pruning(holder, console))
        listed = store.list_artifacts()
        whole = plan_sweep(rows, committed(listed))
        _preview(request, whole, datasets, listed, store, console)
        for dataset in datasets.values():
            _save_dataset(store, dataset)
        jobs = _rows_without_result(sweeps, whole)
        stopped = _run(request, whole, jobs, presence.holder, store, console) if jobs else None
    return SweepOutcome(tuple(sweeps), stopped)


def _say_pruning(holder: Holder, console: Console) -> None:
    console.print(f"waiting for `store gc` of {holder.user} on {holder.host} (process {holder.pid})")


def _dataset_key(recipe: Recipe) -> str:
    return json.dumps(recipe.data.model_dump(exclude=NOT_OF_THE_DATASET), sort_keys=True, default=list)


def _read_datasets(request: SweepRequest, store: ArtifactStore, console: Console) -> dict[str, _Dataset]:
    """Every dataset that some row runs on, read once."""
    recipes = [recipe for table in request.tables for recipe in table.recipes.values()]
    of_each = {_dataset_key(recipe): recipe for recipe in reversed(recipes)}
    return {key: _Dataset(read_dataset(recipe, store, console)) for key, recipe in of_each.items()}


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


def _plan_table(
    request: TableRequest, store: ArtifactStore, datasets: dict[str, _Dataset], sweep: SweepRequest
) -> Sweep:
    """The rows of a table, each with the context of its dataset."""
    by_dataset: dict[str, list[Recipe]] = {}
    for recipe in request.recipes.values():
        by_dataset.setdefault(_dataset_key(recipe), []).append(recipe)
    contexts = {}
    for key, recipes in by_dataset.items():
        _check_fractions(recipes, datasets[key].splits)
        contexts[key] = _context(request, store, datasets[key])
    foundations: dict[tuple[str, str], str] = {}
    rows = []
    for (row, _), recipe in request.recipes.items():
        key, folder = _dataset_key(recipe), recipe.stages.foundation
        splits = datasets[key].splits
        if folder and (folder, key) not in foundations:
            from cast_ray.runtime.models import import_foundation

            foundations[folder, key] = import_foundation(store, folder, recipe.teacher, splits.categories)
        rows.append(
            plan(
                recipe,
                splits.content_hash,
                row=row,
                has_source=splits.source is not None,
                foundation=foundations.get((folder, key)),
            )
        )
    joined = plan_sweep(rows, []).rows
    of_rows = tuple(contexts[_dataset_key(row.recipe)] for row in joined)
    return Sweep(of_rows[0], joined, of_rows)


def _context(request: TableRequest, store: ArtifactStore, dataset: _Dataset) -> SweepContext:
    return SweepContext(
        name=request.name,
        table=request.table.name,
        command=shlex.join(["python", *sys.argv]),
        code_version=_code_version(),
        hardware=hardware(),
        store=store,
        dataset_key=dataset.stage.key,
        dataset=dataset.facts(),
        categories=dataset.splits.categories,
        runs_path=f"runs/{request.name}",
    )


def _preview(
    request: SweepRequest,
    whole: SweepPlan,
    datasets: dict[str, _Dataset],
    listed: dict[str, Listed],
    store: ArtifactStore,
    console: Console,
) -> None:
    titles = {}
    for table in request.tables:
        recipe = next(iter(table.recipes.values()))
        titles[table.table.name] = (table.table.title, recipe.preset, recipe.scale)
    named = [(table.table.name, row) for table in request.tables for row, _ in table.recipes]
    print_plan(
        Preview(
            plan=whole,
            titles=titles_of(titles),
            labels=row_labels(named),
            datasets=[dataset.splits for dataset in datasets.values()],
            storage=store.storage,
            cost=_cost(request, whole, datasets, listed, store),
            price_per_hour=request.price_per_hour,
            budget_hours=request.budget_hours,
        ),
        console,
    )


def _cost(
    request: SweepRequest,
    whole: SweepPlan,
    datasets: dict[str, _Dataset],
    listed: dict[str, Listed],
    store: ArtifactStore,
) -> PlanCost:
    """Device-hours from the store's newest manifests; where there are none, from FLOPs, if the user asked."""
    newest = sorted(listed.values(), key=lambda a: -(a.committed or 0.0))[:MAX_MANIFESTS]
    keys = [a.key for a in newest if a.committed is not None]
    manifests = [m for m in read_each(store.find_manifest, keys) if m is not None]
    sizes: dict[str, Size] = {}
    for row in whole.rows:
        splits, data = datasets[_dataset_key(row.recipe)].splits, row.recipe.data
        rest = round((1 - data.label_fraction) * splits.train.num_rows)
        unlabelled = rest if data.num_unlabelled is None else min(rest, data.num_unlabelled)
        sizes |= dict.fromkeys((s.fingerprint for s in row.stages), Size(unlabelled, splits.val.num_rows))
    device = "cuda" if whole.rows[0].recipe.runtime.use_gpu else "cpu"
    asked = request.dry_run or request.price_per_hour is not None or request.budget_hours is not None
    return cost_of(whole, CostModel(manifests, device), lambda stage: sizes[stage.fingerprint], count_flops=asked)


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


def _rows_without_result(sweeps: Sequence[Sweep], whole: SweepPlan) -> list[tuple[SweepContext, RowPlan]]:
    """Rows that still need Ray; a row whose stages are all stored gets its result from the store at once.

    A finished result of the same name but of other stages (another recipe, other data) is removed: it must not stand
    in this sweep's report if the row does not get as far.
    """
    pairs = [pair for sweep in sweeps for pair in zip(sweep.contexts, sweep.rows)]
    missing = []
    for (context, row), result in zip(pairs, read_each(lambda pair: read_result(*pair), pairs)):
        if any(s.fingerprint not in whole.stored for s in row.stages):
            missing.append((context, row))
            if result is not None and result["status"] == "done":
                context.store.delete(context.result_path(row))
        elif not is_current(result, row):
            context.store.write_json(context.result_path(row), result_from_store(context, row))
    return _spread(missing, whole)


def _spread(pairs: Sequence[tuple[SweepContext, RowPlan]], whole: SweepPlan) -> list[tuple[SweepContext, RowPlan]]:
    """Rows in turn from each group that waits for the same stage, so that the first ones do not wait for each other."""
    groups: dict[str, list[tuple[SweepContext, RowPlan]]] = {}
    for pair in pairs:
        first = next(s.fingerprint for s in pair[1].stages if s.fingerprint not in whole.stored)
        groups.setdefault(first, []).append(pair)
    return [pair for turn in zip_longest(*groups.values()) for pair in turn if pair is not None]


def _run(
    request: SweepRequest,
    whole: SweepPlan,
    pairs: Sequence[tuple[SweepContext, RowPlan]],
    holder: Holder,
    store: ArtifactStore,
    console: Console,
) -> str | None:
    """Runs rows on Ray; returns why some were not finished, if they were not."""
    cluster = connect(request.address, request.num_cpus)
    console.print(cluster.description, highlight=False)
    import ray

    from cast_ray.runtime.broker import MAX_CALLS, Broker
    from cast_ray.runtime.telemetry import ProgressDisplay
    from cast_ray.runtime.trials import DRIVER_CPUS, Job, run_trials

    try:
        # Rows beyond the slots only wait: a few more than can run, so that a free slot finds work at once.
        runtimes = {row.recipe.runtime for _, row in pairs}
        slots = min(stage_slots(runtime, cluster.resources, DRIVER_CPUS) for runtime in runtimes)
        broker = Broker.options(max_concurrency=MAX_CALLS).remote(  # type: ignore[attr-defined]
            slots, set(whole.stored), store.storage, holder.id, request.budget_hours, request.keep_going
        )
        jobs = [Job(context, row) for context, row in pairs]
        with ProgressDisplay(console, broker, whole, [job.name for job in jobs]):
            callbacks = request.trackers.callbacks()
            name = "+".join(table.name for table in request.tables)
            outcomes = run_trials(name, store, jobs, broker, min(len(jobs), 2 * slots + 2), callbacks)
        board = ray.get(broker.board.remote())
    finally:
        ray.shutdown()
    left = [job.row for job in jobs if outcomes[job.name] == "stopped"]
    if not left:
        return None
    rest = plan_sweep(left, board["done"])
    console.print(
        f"[yellow]stopped[/yellow]: {board['stop']}. Left: {len(left)} rows, {len(rest.to_run)} stages, "
        f"{rest.steps_to_run:,} steps; used {hours(board['device_s'] / 3600)}. The same command goes on."
    )
    return board["stop"]


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
