"""A sweep from the user's command to its results: datasets, one plan of all tables, run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cast_ray.contracts.manifest import Manifest
from cast_ray.plan.ablation import Table
from cast_ray.plan.cost import CostModel, PlanCost, Size, cost_of, device_types
from cast_ray.plan.graph import (
    NoTeacherError,
    RowPlan,
    Stage,
    SweepPlan,
    artifact_key,
    fingerprint_of,
    given,
    input_size_of,
    plan_sweep,
)
from cast_ray.plan.prices import Prices
from cast_ray.plan.stage_parts import Model, TrainPart
from cast_ray.recipe import Recipe
from cast_ray.recipe.licence_chain import by_rows, licence_chain, warnings_of
from cast_ray.runtime.cluster import Cluster, RaySession, connect
from cast_ray.runtime.store.artifacts import ArtifactStore, read_each
from cast_ray.runtime.store.claims import Holder, Presence
from cast_ray.runtime.store.past_stages import note_past, past_manifests
from cast_ray.runtime.sweep.planner import RowPlanner, command_line
from cast_ray.runtime.sweep.preview import Preview, hours, print_plan, row_labels, titles_of
from cast_ray.runtime.sweep.row_results import (
    SweepContext,
    is_current,
    read_result,
    result_from_store,
    row_name,
    write_result,
)
from cast_ray.runtime.sweep.slots import slots_of
from cast_ray.runtime.sweep.trackers import Trackers


@dataclass(frozen=True)
class TableRequest:
    """One table of a sweep, already validated."""

    table: Table
    recipes: dict[tuple[str, int], Recipe]
    """(row, seed) -> recipe."""
    name: str
    """Name of the run and of the folder of its results."""
    asked: frozenset[str] = frozenset()
    """Rows that the user named: one that cannot be is refused, any other one left out."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What its rows have in common, see `Table.settings`."""
    folder: str = ""
    """Where its results and report go, in words; empty: not said."""
    has_own_folder: bool = False
    """Whether another folder holds results of the same table with other settings."""


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
    prices: Prices | None = None
    """What a device-hour costs; None: nobody has said so."""
    keep_going: bool = False
    """Start further rows though the first ones all failed."""
    trackers: Trackers = field(default_factory=Trackers)
    session: RaySession | None = None
    """Ray of several sweeps, which outlives this one; None: a Ray of its own."""
    with_tree: bool = True
    """Show every stage in the plan."""

    def connect(self) -> Cluster:
        """Starts or joins the Ray that the sweep runs on."""
        return connect(self.address, self.num_cpus) if self.session is None else self.session.connect()


@dataclass(frozen=True)
class Sweep:
    """One table of a sweep, with its results in the store."""

    context: SweepContext
    rows: tuple[RowPlan, ...]
    contexts: tuple[SweepContext, ...] = ()
    """The datasets of the rows: they differ where rows name different ones."""


@dataclass(frozen=True)
class SweepOutcome:
    """What became of a sweep. `stopped`: why some rows were not finished, if they were not; `device_s`: device-seconds
    that it has used."""

    sweeps: tuple[Sweep, ...]
    stopped: str | None = None
    device_s: float = 0.0


def run_sweep(
    request: SweepRequest, console: Console, on_start: Callable[[Sequence[Sweep]], None] = lambda sweeps: None
) -> SweepOutcome | None:
    """Plans a sweep and runs what is missing; rows that failed say so in their result. None after a dry run.

    Args:
        on_start: called with the tables' rows once the request has turned out to be sound, before anything runs.

    Raises:
        ValueError: the user's data, storage or resources do not fit, before any compute is spent.
    """
    store = ArtifactStore(request.storage)
    store.exists()  # whatever else lies at its path is refused
    store.check_writable()
    runs = {table.name: list(table.recipes.values()) for table in request.tables}
    with Presence(store, command_line(), on_wait=lambda holder: say_pruning(holder, console)) as presence:
        planner = RowPlanner(runs, store, console, request.connect, dry_run=request.dry_run)
        sweeps = [_plan_table(table, planner, console) for table in request.tables]
        rows = [row for sweep in sweeps for row in sweep.rows]
        stages = {stage.key: stage for row in rows for stage in row.stages}
        read = keys_read(planner, rows)
        presence.need(map(fingerprint_of, (*stages, *read)))
        manifests = store.find_manifests((*stages, *read))
        stored = set(map(fingerprint_of, manifests))
        if not request.dry_run:
            check_still_stored(map(fingerprint_of, read), stored)
        whole = plan_sweep(rows, stored)
        _preview(request, sweeps, whole, planner, manifests, store, console)
        if request.dry_run:
            return None
        on_start(sweeps)
        jobs = _rows_without_result(sweeps, whole)
        stopped, device_s = None, 0.0
        if jobs:
            try:
                stopped, device_s = _run(request, whole, jobs, presence.holder, store, manifests, console)
            finally:
                note_past(store, [stage.key for stage in whole.to_run])
    return SweepOutcome(tuple(sweeps), stopped, device_s)


def sweep_name(runs: Sequence[str]) -> str:
    """One name of several runs, short enough for a folder."""
    return runs[0] if len(runs) == 1 else f"{runs[0]}+{len(runs) - 1}"


def has_results(sweep: Sweep) -> bool:
    """Whether any row of a table has ended, now or in an earlier run."""
    return any(read_result(context, row) is not None for context, row in zip(sweep.contexts, sweep.rows))


def write_events(sweeps: Sequence[Sweep], trackers: Trackers) -> None:
    """TensorBoard's files of the rows that have none, because they were answered from the store."""
    for sweep in sweeps:
        for context, row in zip(sweep.contexts, sweep.rows):
            if context.table not in trackers.tensorboard:
                continue
            folder = Path(trackers.tensorboard[context.table]) / row_name(context.table, row)
            if not folder.is_dir() and (result := read_result(context, row)) is not None:
                from cast_ray.runtime.sweep.callbacks import write_finished

                write_finished(folder, result)


def say_pruning(holder: Holder, console: Console) -> None:
    """Says what a sweep waits for before it begins."""
    console.print(f"waiting for `store gc` of {holder.user} on {holder.host} (process {holder.pid})")


def keys_read(planner: RowPlanner, rows: Iterable[RowPlan]) -> list[str]:
    """Artifacts that planning has read: the datasets and the imported teachers of the rows."""
    teachers = sorted(set().union(*map(given, rows)))
    return [dataset.key for dataset in planner.datasets.values()] + [artifact_key("train", f) for f in teachers]


def check_still_stored(read: Iterable[str], stored: Iterable[str]) -> None:
    """Raises ValueError when `store gc` has removed what planning has read, before the sweep could say it needs it.

    Args:
        read: fingerprints of the datasets and imported teachers that the plan builds on.
        stored: those of them in the store, looked up after the sweep has left word of its needs.
    """
    if gone := sorted(set(read) - set(stored)):
        raise ValueError(
            f"`store gc` has removed {len(gone)} artifacts that this command had just read ({gone[0]}): run it again, "
            "which reads them anew"
        )


def _plan_table(request: TableRequest, planner: RowPlanner, console: Console) -> Sweep:
    """The rows of a table, each with the context of its dataset.

    A row that labels with a teacher that nothing has trained (the paper's is pre-trained, a preset's need not be) is
    left out and said so, unless the user named it or the others are compared with it.
    """
    pairs, left_out = [], {}
    for (row, _), recipe in request.recipes.items():
        try:
            pairs.append(planner.plan(recipe, table=request.table.name, run=request.name, row=row))
        except NoTeacherError as error:
            if row in request.asked or row == request.table.baseline:
                raise
            left_out[row] = str(error)
    for reason in left_out.values():
        console.print(Text.assemble(("left out", "yellow"), f": {reason}"), soft_wrap=True)
    return Sweep(pairs[0][0], plan_sweep([row for _, row in pairs], []).rows, tuple(context for context, _ in pairs))


def _preview(
    request: SweepRequest,
    sweeps: Sequence[Sweep],
    whole: SweepPlan,
    planner: RowPlanner,
    manifests: Mapping[str, Manifest],
    store: ArtifactStore,
    console: Console,
) -> None:
    titles = {}
    for table in request.tables:
        recipe = next(iter(table.recipes.values()))
        titles[table.table.name] = (table.table.title, recipe.preset, recipe.scale)
    labels = row_labels([(sweep.context.table, row.row) for sweep in sweeps for row in sweep.rows])
    chains = [(label, licence_chain(row.recipe)) for label, row in zip(labels, whole.rows)]
    print_plan(
        Preview(
            plan=whole,
            titles=titles_of(titles),
            labels=labels,
            datasets=list(planner.datasets.values()),
            storage=store.storage,
            costs=_costs(request, whole, planner, manifests, store),
            prices=request.prices,
            budget_hours=request.budget_hours,
            memory=_memory(request, whole, planner),
            licences=by_rows(chains),
            warnings=[*planner.warnings, *warnings_of(chains)],
            folders=[table.folder for table in request.tables if table.folder],
            tree=request.with_tree,
        ),
        console,
    )


def _costs(
    request: SweepRequest,
    whole: SweepPlan,
    planner: RowPlanner,
    manifests: Mapping[str, Manifest],
    store: ArtifactStore,
) -> dict[str, PlanCost]:
    """Device-hours by the type of device on which the store's newest stages ran, the last used one first.

    Where there are none, of `UNKNOWN_DEVICE`, from FLOPs if the user asked.
    """
    past = [*past_manifests(store), *manifests.values()]
    sizes: dict[str, Size] = {}
    for row in whole.rows:
        sizes |= dict.fromkeys((s.fingerprint for s in row.stages), planner.size(row.recipe))
    device = "cuda" if whole.rows[0].recipe.runtime.use_gpu else "cpu"
    asked = request.dry_run or request.prices is not None or request.budget_hours is not None
    return {
        model: cost_of(whole, CostModel(past, device, model), lambda stage: sizes[stage.fingerprint], count_flops=asked)
        for model in device_types(past, device)
    }


def _memory(request: SweepRequest, whole: SweepPlan, planner: RowPlanner) -> dict[str, list[int | None]]:
    """Bytes of one worker of each stage to run, by name; {} unless the user asked or takes a GPU.

    Of stages that only look at whole images, those whose model sees these at a size of their own: the others need less
    than the training before them.
    """
    if not request.dry_run and not any(row.recipe.runtime.use_gpu for row in whole.rows):
        return {}
    from cast_ray.plan.memory import inference_memory, stage_memory

    found: dict[str, list[int | None]] = {}
    seen = set(whole.stored)
    alike: dict[str, int | None] = {}
    for row in whole.rows:
        models = {stage.fingerprint: TrainPart.of(stage).model for stage in row.stages if stage.kind == "train"}
        for stage in row.stages:
            if stage.fingerprint in seen or (stage.kind != "train" and input_size_of(stage).is_fixed):
                continue
            seen.add(stage.fingerprint)
            model = models.get(stage.parents.get("teacher") or stage.parents.get("model") or stage.fingerprint)
            key = _memory_key(stage, row.recipe, model)
            if key not in alike:
                num_classes = planner.num_classes(row.recipe)
                if stage.kind == "train":
                    estimate = stage_memory(stage, row.recipe, num_classes)
                    alike[key] = estimate.total if estimate else None
                else:
                    image_hw = planner.size(row.recipe).image_hw
                    alike[key] = inference_memory(stage, row.recipe, model, num_classes, image_hw)
                found.setdefault(stage.name, []).append(alike[key])
    return found


def _memory_key(stage: Stage, recipe: Recipe, model: Model | None) -> str:
    """Equal for stages that need the same memory: thousands of rows may differ in learning rates and the like alone.

    Args:
        model: that the stage runs; None: an imported teacher's.
    """
    config, where = stage.config, [recipe.data.root, recipe.runtime.model_dump()]
    part = [stage.step, repr(model), config["data"].get("image_px"), config["data"].get("resize"), *where]
    if stage.kind != "train":
        return json.dumps([*part, recipe.evaluation.batch, recipe.label_batch], default=list)
    train = TrainPart.of(stage)
    part += [config["contrastive"], train.batch_labelled, train.batch_unlabelled, train.has_average]
    part += [getattr(recipe.stages, stage.step).accumulate]
    return json.dumps(part, default=list)


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
            if result is not None and result.is_done:
                context.store.delete(context.result_path(row))
        elif not is_current(result, row):
            write_result(context, row, result_from_store(context, row))
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
    manifests: Mapping[str, Manifest],
    console: Console,
) -> tuple[str | None, float]:
    """Runs rows on Ray; returns why some were not finished, if they were not, and the device-seconds used.

    Args:
        manifests: of what the rows find in the store.
    """
    cluster = request.connect()
    console.print(cluster.description, highlight=False)
    import ray

    from cast_ray.runtime.data.shared_images import forget_shared_images
    from cast_ray.runtime.shared_paths import check_shared_paths
    from cast_ray.runtime.sweep.broker import start_broker
    from cast_ray.runtime.sweep.progress import ProgressDisplay
    from cast_ray.runtime.sweep.row_driver import DRIVER_CPUS, Job, run_trials

    try:
        check_shared_paths(store.storage, [row.recipe.data.root for _, row in pairs])
        # Rows beyond the slots only wait: a few more than can run, so that a free slot finds work at once.
        slots = slots_of([row.recipe for _, row in pairs], cluster, DRIVER_CPUS, len(pairs))
        broker = start_broker(
            slots,
            set(whole.stored | whole.given),
            store.storage,
            holder.id,
            request.budget_hours,
            request.keep_going,
            by_turns=not cluster.is_local,
            sweep=sweep_name([table.name for table in request.tables]),
        )
        device_s = {manifest.fingerprint: manifest.device_seconds for manifest in manifests.values()}
        ray.get(broker.expect.remote(len(whole.to_run), device_s))
        jobs = [Job(context, row) for context, row in pairs]
        with ProgressDisplay(console, broker, whole, [job.name for job in jobs]):
            by_name = {job.name: job for job in jobs}
            callbacks = request.trackers.callbacks(
                by_name.__getitem__, lambda message: console.print(Text(message, "yellow"))
            )
            name = sweep_name([table.name for table in request.tables])
            outcomes = run_trials(name, store, jobs, broker, min(len(jobs), 2 * slots + 2), callbacks)
        board = ray.get(broker.board.remote())
    finally:
        forget_shared_images()
        if request.session is None:
            ray.shutdown()
    if "failed" in outcomes.values() and (words := cluster.where_logs_are()):
        console.print(words, soft_wrap=True, highlight=False)
    left = [job.row for job in jobs if outcomes[job.name] == "stopped"]
    if not left:
        return None, board["device_s"]
    rest = plan_sweep(left, whole.stored | set(board["done"]))
    words = (
        f": {board['stop']}. Left: {len(left)} rows, {len(rest.to_run)} stages, {rest.steps_to_run:,} steps; "
        f"used {hours(board['device_s'] / 3600)}. Run the same command again to continue."
    )
    console.print(Text.assemble(("stopped", "yellow"), words))
    return board["stop"], board["device_s"]
