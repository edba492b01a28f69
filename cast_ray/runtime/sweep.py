"""A sweep from the user's command to its report: dataset, plan, run, tables."""

from __future__ import annotations

import dataclasses
import io
import shlex
import subprocess
import sys
from dataclasses import dataclass
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
from cast_ray.runtime.cluster import connect, hardware, stage_slots
from cast_ray.runtime.results import SweepContext, read_result, result_from_store, row_name
from cast_ray.runtime.store import ArtifactStore
from cast_ray.stages.graph import RowPlan, Stage, SweepPlan, plan, plan_sweep
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
    recipe = next(iter(request.recipes.values()))
    splits = read_dataset(recipe, store, console)
    _check_fractions(request, splits)
    rows = _plan_rows(request, store, splits)
    sweep = plan_sweep(rows, store.stored_fingerprints())
    print_plan(request, sweep, splits, store, console)
    if request.dry_run:
        return None
    context = _context(request, store, splits)
    _save_dataset(store, splits)
    missing = _rows_without_result(context, sweep)
    if missing:
        _run(request, context, sweep, missing, console)
    return Sweep(context, tuple(rows))


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


def _check_fractions(request: SweepRequest, splits: DatasetSplits) -> None:
    """Refuses a label fraction that leaves too few images, before anything runs."""
    ids = splits.train.select(["image_id"])
    for recipe in {(r.data.label_fraction, r.seed): r for r in request.recipes.values()}.values():
        _, unlabelled = split(
            ids, recipe.data.label_fraction, recipe.seed, recipe.data.num_unlabelled, recipe.runtime.num_workers
        )
        needs_unlabelled = recipe.loss.lambda_semi > 0 or recipe.loss.lambda_pxl > 0
        if needs_unlabelled and len(unlabelled) < recipe.runtime.num_workers:
            raise ValueError(
                f"data.label_fraction {recipe.data.label_fraction} of {splits.train.num_rows} images leaves "
                f"{len(unlabelled)} unlabelled images: expected at least 1 per worker ({recipe.runtime.num_workers})"
            )


def _plan_rows(request: SweepRequest, store: ArtifactStore, splits: DatasetSplits) -> list[RowPlan]:
    foundations: dict[tuple[str, str], str | None] = {}
    rows = []
    for (row, _), recipe in request.recipes.items():
        source = (recipe.stages.foundation, recipe.teacher.model_dump_json())
        if source not in foundations and recipe.needs_foundation:
            from cast_ray.runtime.models import import_foundation  # torch and transformers

            foundations[source] = import_foundation(store, recipe, splits.categories, dry_run=request.dry_run)
        rows.append(
            plan(
                recipe,
                splits.content_hash,
                row=row,
                has_source=splits.source is not None,
                foundation=foundations.get(source),
            )
        )
    return rows


def print_plan(
    request: SweepRequest, sweep: SweepPlan, splits: DatasetSplits, store: ArtifactStore, console: Console
) -> None:
    """Says what will run before it runs."""
    seeds = sorted({row.seed for row in sweep.rows})
    names = list(dict.fromkeys(row.row for row in sweep.rows))
    recipe = sweep.rows[0].recipe
    console.print(f"[bold]{request.table.title}[/bold]  ({request.table.name}, {recipe.preset} at {recipe.scale})")
    console.print(f"  rows     {len(names)}: {', '.join(names)}")
    console.print(f"  seeds    {len(seeds)}: {', '.join(map(str, seeds))}")
    source = f" + {splits.source.num_rows} source" if splits.source is not None else ""
    console.print(
        f"  images   {splits.train.num_rows} train{source}, {splits.val.num_rows} val, {len(splits.categories)} classes"
    )
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


def _context(request: SweepRequest, store: ArtifactStore, splits: DatasetSplits) -> SweepContext:
    return SweepContext(
        name=request.name,
        table=request.table.name,
        command=shlex.join(["python", *sys.argv]),
        code_version=_code_version(),
        hardware=hardware(),
        store=store,
        slots=1,
        dataset_key=_dataset_stage(splits).key,
        dataset={
            "content_hash": splits.content_hash,
            "num_train": splits.train.num_rows,
            "num_val": splits.val.num_rows,
            "num_source": splits.source.num_rows if splits.source is not None else 0,
            "skipped": len(splits.skipped),
            "classes": [c.name for c in splits.categories],
        },
        categories=splits.categories,
        runs_path=f"runs/{request.name}",
    )


def _dataset_stage(splits: DatasetSplits) -> Stage:
    return Stage("dataset", "dataset", {}, {}, splits.content_hash[:20])


def _save_dataset(store: ArtifactStore, splits: DatasetSplits) -> None:
    """Record tables as an artifact, where every worker of the cluster can read them."""
    stage = _dataset_stage(splits)
    if store.has(stage.key):
        return
    for name, table in (("train", splits.train), ("val", splits.val), ("source", splits.source)):
        if table is not None:
            buffer = io.BytesIO()
            pa.parquet.write_table(table, buffer)
            store.add(stage, f"{name}.parquet", buffer.getvalue())
    store.commit(stage, {"categories": [vars(c) for c in splits.categories], "skipped": list(splits.skipped)})


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

    try:
        # Rows beyond the slots only wait: a few more than can run, so that a free slot finds work at once.
        slots = stage_slots(rows[0].recipe.runtime, cluster.resources, DRIVER_CPUS)
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
