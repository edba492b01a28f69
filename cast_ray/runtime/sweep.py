"""A sweep from the user's command to its report: dataset, plan, run, tables."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import cast_ray
from cast_ray.recipe import Recipe
from cast_ray.runtime.cluster import connect, hardware, stage_slots
from cast_ray.runtime.dataset import StoredDataset, read_dataset
from cast_ray.runtime.label_splits import store_splits
from cast_ray.runtime.results import SweepContext, read_result, result_from_store, row_name
from cast_ray.runtime.store import ArtifactStore
from cast_ray.stages.graph import RowPlan, SweepPlan, plan, plan_sweep
from cast_ray.stages.table import Table


@dataclass(frozen=True)
class SweepRequest:
    """What the user asked for, already validated."""

    table: Table
    recipes: dict[tuple[str, int], Recipe]
    """(row, seed) -> recipe."""
    name: str
    storage: str
    address: str | None
    num_cpus: int | None
    dry_run: bool = False


@dataclass(frozen=True)
class Sweep:
    """A sweep as planned and, where it was run, with its results in the store."""

    context: SweepContext
    rows: tuple[RowPlan, ...]


def run_sweep(request: SweepRequest, console: Console) -> Sweep | None:
    """Plans a sweep and runs what is missing; rows that failed say so in their result. None after a dry run.

    Raises:
        ValueError: the user's data, storage or resources do not fit, before any compute is spent.
    """
    store = ArtifactStore(request.storage)
    store.check_writable()
    recipes = request.recipes.values()
    dataset = read_dataset(
        recipes, store, console, _run_path(request), lambda: connect(request.address, request.num_cpus)
    )
    store_splits(dataset, recipes, store)
    rows = _plan_rows(request, store, dataset)
    sweep = plan_sweep(rows, store.stored_fingerprints())
    print_plan(request, sweep, dataset, store, console)
    if request.dry_run:
        return None
    context = _context(request, store, dataset)
    missing = _rows_without_result(context, sweep)
    if missing:
        _run(request, context, sweep, missing, console)
    return Sweep(context, tuple(rows))


def _run_path(request: SweepRequest) -> str:
    """Where the run's files go, below the storage path."""
    return f"runs/{request.name}"


def _plan_rows(request: SweepRequest, store: ArtifactStore, dataset: StoredDataset) -> list[RowPlan]:
    foundations: dict[str, str] = {}
    rows = []
    for (row, _), recipe in request.recipes.items():
        folder = recipe.stages.foundation
        if folder and folder not in foundations:
            from cast_ray.runtime.models import import_foundation

            foundations[folder] = import_foundation(store, folder, recipe.teacher, dataset.categories)
        rows.append(
            plan(
                recipe,
                dataset.content_hash,
                row=row,
                has_source=dataset.has_source,
                foundation=foundations.get(folder),
                hashes=dataset.hashes(recipe.data),
            )
        )
    return rows


def print_plan(
    request: SweepRequest, sweep: SweepPlan, dataset: StoredDataset, store: ArtifactStore, console: Console
) -> None:
    """Says what will run before it runs."""
    seeds = sorted({row.seed for row in sweep.rows})
    names = list(dict.fromkeys(row.row for row in sweep.rows))
    recipe = sweep.rows[0].recipe
    console.print(f"[bold]{request.table.title}[/bold]  ({request.table.name}, {recipe.preset} at {recipe.scale})")
    console.print(f"  rows     {len(names)}: {', '.join(names)}")
    console.print(f"  seeds    {len(seeds)}: {', '.join(map(str, seeds))}")
    num = dataset.num_images
    others = "".join(f" + {num[split]} {split}" for split in ("source", "extra") if split in num)
    console.print(f"  images   {num['train']} train{others}, {num['val']} val, {len(dataset.categories)} classes")
    total = sum(len(row.stages) for row in sweep.rows)
    stored = len(sweep.stored)
    console.print(f"  stages   {len(sweep.unique)} unique of {total}, {stored} found in the store")
    saved = sweep.steps_from_scratch - sweep.steps_to_run
    share = 100 * saved / max(sweep.steps_from_scratch, 1)
    scratch = f"{sweep.steps_from_scratch} from scratch ({share:.0f} %)"
    console.print(f"  steps    {sweep.steps_to_run} to run, {saved} saved of {scratch}")
    console.print(f"  storage  {store.storage}", soft_wrap=True)
    for stage in sweep.unique.values():
        users = [row.row for row in sweep.rows if any(s.fingerprint == stage.fingerprint for s in row.stages)]
        if stage.kind != "evaluate":
            mark = (
                "stored" if stage.fingerprint in sweep.stored else f"{stage.steps} steps" if stage.steps else "to run"
            )
            used_by = "all rows" if len(set(users)) == len(names) else ", ".join(dict.fromkeys(users))
            console.print(f"    {stage.name:15} {mark:>11}  {used_by}", highlight=False)


def _context(request: SweepRequest, store: ArtifactStore, dataset: StoredDataset) -> SweepContext:
    return SweepContext(
        name=request.name,
        table=request.table.name,
        command=shlex.join(["python", *sys.argv]),
        code_version=_code_version(),
        hardware=hardware(),
        store=store,
        slots=1,
        dataset_key=dataset.key,
        dataset=dataset.facts(),
        categories=dataset.categories,
        runs_path=_run_path(request),
    )


def _rows_without_result(context: SweepContext, sweep: SweepPlan) -> list[RowPlan]:
    """Rows that still need Ray; a row whose stages are all stored gets its result from the store at once."""
    missing = []
    for row in sweep.rows:
        if any(s.fingerprint not in sweep.stored for s in row.stages):
            missing.append(row)
        elif not _is_current(read_result(context, row), row):
            context.store.write_json(context.result_path(row), result_from_store(context, row))
    return missing


def _is_current(result: dict[str, Any] | None, row: RowPlan) -> bool:
    """Whether a stored result is a finished one, made from exactly this row's stages."""
    if result is None or result["status"] != "done":
        return False
    return {s["fingerprint"] for s in result["stages"]} == {s.fingerprint for s in row.stages}


def _run(request: SweepRequest, context: SweepContext, sweep: SweepPlan, rows: list[RowPlan], console: Console) -> None:
    cluster = connect(request.address, request.num_cpus)
    console.print(cluster.description, highlight=False)
    import ray

    from cast_ray.runtime.broker import broker_for
    from cast_ray.runtime.telemetry import ProgressDisplay
    from cast_ray.runtime.trials import DRIVER_CPUS, run_trials
    from cast_ray.runtime.validation import validation_bundles

    try:
        # Rows beyond the slots only wait: a few more than can run, so that a free slot finds work at once.
        recipe = rows[0].recipe
        slots = stage_slots(recipe, cluster.resources, DRIVER_CPUS, validation_bundles(recipe))
        max_drivers = min(len(rows), 2 * slots + 2)
        context = dataclasses.replace(context, slots=slots)
        broker = broker_for(context.store.storage, slots, context.store.stored_fingerprints())
        names = [row_name(context.table, row) for row in rows]
        with ProgressDisplay(console, broker, sweep, names):
            run_trials(context, rows, max_drivers)
    finally:
        ray.shutdown()


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
