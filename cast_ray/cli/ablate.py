"""`cast-ray ablate` runs ablation tables: every row and seed, and each stage that several rows share only once.

cast-ray ablate losses --preset shapes
cast-ray ablate losses stages negatives labels --dry-run
cast-ray ablate losses --until decided --budget-hours 40
cast-ray ablate losses --preset coco --set data.root=DIR --scale smoke
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cast_ray.cli.options import (
    EXIT_STOPPED,
    Parser,
    add_price_option,
    add_ray_options,
    add_recipe_options,
    add_run_options,
    add_teacher_option,
    add_tracker_options,
    amount,
    check_teacher,
    exit_code,
    keep_wandb_here,
    output_folder,
    plain_console,
    prices_of,
    random_seed,
    recipe_overrides,
    runs_place,
    storage_path,
    tell_report_command,
)
from cast_ray.cli.until_decided import (
    DEFAULT_MAX_SEEDS,
    UndecidedTable,
    add_until_options,
    check_until_options,
    run_until_decided,
)
from cast_ray.common.results_folder import ResultsFolder, open_results
from cast_ray.plan.ablation import Table, load_table, table_names
from cast_ray.report.run_choice import choose_run, fetch_known
from cast_ray.runtime.sweep.run import (
    Sweep,
    SweepOutcome,
    SweepRequest,
    TableRequest,
    has_results,
    run_sweep,
    sweep_name,
    write_events,
)
from cast_ray.runtime.sweep.trackers import TENSORBOARD, Trackers


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    interrupted = "stopped; finished stages are stored, the same command resumes from here"
    return exit_code(lambda: _ablate(arguments, plain_console()), interrupted)


def _ablate(arguments: argparse.Namespace, console: Console) -> int:
    check_until_options(arguments)
    with open_results(runs_place(arguments.out, storage_path(arguments.storage))) as results:
        return _run_all(arguments, _request(arguments, results), results, console)


def _run_all(arguments: argparse.Namespace, request: SweepRequest, results: ResultsFolder, console: Console) -> int:
    """Runs the sweep or, with --until decided, one after the other; returns the exit code."""

    def run(of_round: SweepRequest, effects: Mapping[str, float | None]) -> tuple[int, SweepOutcome | None]:
        return _run(of_round, results, console, effects)

    if arguments.until is None:
        code, _ = run(request, {})
    else:
        overrides = recipe_overrides(arguments)
        tables = [_undecided(arguments, table, results.path) for table in request.tables]
        code = run_until_decided(
            request,
            tables,
            lambda table, row, seed: table.row_recipe(row, arguments.preset, arguments.scale, seed, overrides),
            run,
            console,
            results.at,
        )
    if not request.dry_run:
        for table in request.tables:
            tell_report_command(results.at(results.path / table.name), results.is_remote, console)
        request.trackers.finish(lambda text: console.print(text, soft_wrap=True, highlight=False))
        results.send()
    return code


def _undecided(arguments: argparse.Namespace, table: TableRequest, out: Path) -> UndecidedTable:
    from cast_ray.report.decisions import default_effect  # SciPy, which a help text does without

    return UndecidedTable(
        table.table,
        list(dict.fromkeys(row for row, _ in table.recipes)),
        list(dict.fromkeys(seed for _, seed in table.recipes)),
        out / table.name,
        default_effect(table.table.metric) if arguments.effect is None else arguments.effect,
        DEFAULT_MAX_SEEDS if arguments.max_seeds is None else arguments.max_seeds,
    )


def _run(
    request: SweepRequest, results: ResultsFolder, console: Console, effects: Mapping[str, float | None]
) -> tuple[int, SweepOutcome | None]:
    """Runs a sweep and publishes it.

    Args:
        effects: table -> smallest effect of interest that its report is to use.

    Returns:
        The exit code, and what became of the sweep; None after a dry run.
    """
    from cast_ray.publish.sweep import announce, publish  # what draws, once the request is sound

    out = results.path

    def on_start(sweeps: Sequence[Sweep]) -> None:
        for sweep, table in zip(sweeps, request.tables):
            recipes = {(row.row, row.seed): row.recipe for row in sweep.rows}
            stored = sweep.context.store.uri(sweep.context.runs_path)
            effect, folder = effects.get(table.table.name), out / table.name
            announce(
                folder, table.table, recipes, table.settings, stored, console, effect, request.prices, at=results.at
            )
        results.send()

    outcome = run_sweep(request, console, on_start)
    if outcome is None:
        return 0, None
    codes = [0]
    for sweep, table in zip(outcome.sweeps, request.tables):
        if not outcome.stopped or has_results(sweep):
            codes.append(publish(sweep, table.table, out / table.name, console, results.at))
            if table.has_own_folder:
                console.print(f"Results are in {table.folder}", soft_wrap=True, highlight=False)
    write_events(outcome.sweeps, request.trackers)
    results.send()
    return (EXIT_STOPPED if outcome.stopped else max(codes)), outcome


def _request(arguments: argparse.Namespace, results: ResultsFolder) -> SweepRequest:
    """The validated request; what earlier runs have left in the folder that it joins is fetched."""
    tables = [load_table(name) for name in arguments.tables]
    names = [table.name for table in tables]
    if len(set(names)) != len(names):
        raise ValueError(f"tables: expected different names, got {', '.join(names)}")
    _check_seeds(arguments)
    overrides = recipe_overrides(arguments)
    out = results.path
    requests = []
    for table in tables:
        rows = _rows(table.name, list(table.rows), arguments.rows, several=len(tables) > 1)
        if not rows:
            continue
        if arguments.until is not None and table.baseline not in rows:
            rows = [table.baseline, *rows]  # which the others are compared with
        seeds = arguments.seeds if arguments.seeds is not None else list(table.seeds)
        recipes = {
            (row, seed): table.row_recipe(row, arguments.preset, arguments.scale, seed, overrides)
            for seed in seeds
            for row in rows
        }
        check_teacher(arguments.teacher, (recipe.teacher.kind for recipe in recipes.values()))
        table.check_measured(recipes.values())
        of = f"{table.name}-{arguments.preset or table.preset}-{arguments.scale or table.scale}"
        name = of if not arguments.name else arguments.name if len(tables) == 1 else f"{arguments.name}-{table.name}"
        settings = table.settings(arguments.preset, arguments.scale, overrides)
        fetch_known(results, name)
        choice = choose_run(out, name, table, settings)
        results.fetch([choice.name])
        requests.append(
            TableRequest(
                table,
                recipes,
                choice.name,
                frozenset(rows if arguments.rows else ()),
                settings=settings,
                folder=choice.words(out, results.at),
                has_own_folder=bool(choice.beside),
            )
        )
    if unknown := _unknown_rows(tables, arguments.rows or []):
        raise ValueError(f"--rows: no row of {', '.join(names)} is called {', '.join(unknown)}")
    folders = {request.table.name: str(output_folder(str(out / request.name))) for request in requests}
    events = {name: str(Path(folder) / TENSORBOARD) for name, folder in folders.items()}
    trackers = Trackers(
        folders=folders,
        tensorboard={} if arguments.no_tensorboard else events,
        wandb=arguments.wandb,
        mlflow=arguments.mlflow,
        group=sweep_name([request.name for request in requests]),
    )
    trackers.check_installed()
    if results.is_remote and arguments.wandb:
        keep_wandb_here()
    return SweepRequest(
        tables=tuple(requests),
        storage=storage_path(arguments.storage),
        address=arguments.address,
        num_cpus=arguments.num_cpus,
        dry_run=arguments.dry_run,
        budget_hours=arguments.budget_hours,
        prices=prices_of(arguments),
        keep_going=arguments.keep_going,
        trackers=trackers,
    )


def _check_seeds(arguments: argparse.Namespace) -> None:
    seeds = arguments.seeds or []
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds: expected different numbers, got {' '.join(map(str, seeds))}")


def _unknown_rows(tables: Sequence[Table], wanted: Sequence[str]) -> list[str]:
    """The rows that were asked for and that no table has, by their name or as `TABLE:ROW`."""
    known = {name for table in tables for row in table.rows for name in (row, f"{table.name}:{row}")}
    return [row for row in wanted if row not in known]


def _rows(table: str, known: list[str], wanted: list[str] | None, several: bool) -> list[str]:
    """The rows to run. Of several tables `TABLE:ROW` means one table's, a plain name every table's that has it."""
    if wanted is None:
        return known
    if not several:
        return wanted  # an unknown one is refused with the nearest
    return [row for row in known if row in wanted or f"{table}:{row}" in wanted]


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray ablate",
        description="Runs ablation tables of CAST on Ray. A stage that several rows share runs once, also if the "
        "rows are in different tables. The same command resumes an interrupted run, tries failed rows again and ends "
        "in seconds when everything is stored. A recipe key for --set is any field of cast_ray/recipe/, for example "
        "loss.lambda_pxl=0.2, stages.distill.steps=800, runtime.use_gpu=true; variant=released (or contrastive=, "
        "student=) sets a named variant.",
    )
    parser.add_argument(
        "tables",
        nargs="+",
        metavar="TABLE",
        help=f"tables that come with cast_ray ({', '.join(table_names())}) or paths of your YAML files; several "
        "tables run as one plan",
    )
    add_recipe_options(parser, of="table")
    add_teacher_option(parser)
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="only these rows; TABLE:ROW if several tables have a row of that name"
    )
    parser.add_argument("--seeds", nargs="+", type=random_seed, metavar="N", help="seeds instead of the table's")
    add_run_options(parser, name="TABLE-PRESET-SCALE")
    add_ray_options(parser)
    add_until_options(parser)
    plan = parser.add_argument_group("what it costs")
    plan.add_argument("--dry-run", action="store_true", help="print the plan, its device-hours and cost, and stop")
    add_price_option(plan)
    plan.add_argument(
        "--budget-hours",
        type=amount,
        metavar="H",
        help="device-hours after which no further stage is started, counted in GPUs of workers, teachers, labellers "
        "and validation or, without GPUs, in these processes; the command says what is left",
    )
    plan.add_argument(
        "--keep-going",
        action="store_true",
        help="start the remaining rows even if the first three rows that ended have all failed (a single failed row "
        "never stops the others)",
    )
    add_tracker_options(parser, what="rows")
    return parser
