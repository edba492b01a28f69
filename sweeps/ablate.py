"""Runs ablation tables: every row and seed, each stage that several rows need once.

python sweeps/ablate.py losses --preset shapes
python sweeps/ablate.py losses stages negatives labels --dry-run
python sweeps/ablate.py losses --preset coco --set data.root=DIR --scale smoke
python sweeps/ablate.py store ls
python sweeps/ablate.py report runs/losses-shapes-demo     # its report again, from its files alone (--watch: live)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Run from a checkout without installing, and inside `ray job submit --working-dir .`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from cast_ray.console import Parser, amount, exit_code, output_folder, plain_console, positive, whole_number
from cast_ray.plan.ablation import load_table, table_names
from cast_ray.recipe import SCALES, parse_overrides, preset_names
from cast_ray.report.run_choice import choose_run
from cast_ray.runtime.sweep.run import (
    Sweep,
    SweepRequest,
    TableRequest,
    has_results,
    run_sweep,
    sweep_name,
    write_events,
)
from cast_ray.runtime.sweep.trackers import TENSORBOARD, Trackers

EXIT_STOPPED = 3


def main(argv: list[str] | None = None) -> int:
    interrupted = "stopped; finished stages are stored, the same command goes on from here"
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv), interrupted)


def _run(argv: list[str]) -> int:
    console = plain_console()
    if argv[:1] == ["efficiency"]:  # no table of training runs
        from sweeps.efficiency import main as measure

        return measure(argv[1:], console)
    if argv[:1] == ["store"]:
        from sweeps.store import main as store_command

        return store_command(argv[1:])
    if argv[:1] == ["report"]:
        from sweeps.report import main as report_command

        return report_command(argv[1:], console)
    return _ablate(argv, console)


def _ablate(argv: list[str], console: Console) -> int:
    request, out = _request(_parser().parse_args(argv))

    from cast_ray.publish.sweep import announce, publish  # what draws, once the request is sound

    def on_start(sweeps: Sequence[Sweep]) -> None:
        for sweep, table in zip(sweeps, request.tables):
            recipes = {(row.row, row.seed): row.recipe for row in sweep.rows}
            results = sweep.context.store.uri(sweep.context.runs_path)
            announce(out / table.name, table.table, recipes, table.settings, results, console)

    outcome = run_sweep(request, console, on_start)
    if outcome is None:
        return 0
    codes = [0]
    for sweep, table in zip(outcome.sweeps, request.tables):
        if not outcome.stopped or has_results(sweep):
            codes.append(publish(sweep, table.table, out / table.name, console))
            if table.has_own_folder:
                console.print(f"Results are in {table.folder}", soft_wrap=True, highlight=False)
    write_events(outcome.sweeps, request.trackers)
    request.trackers.finish(lambda text: console.print(text, soft_wrap=True, highlight=False))
    return EXIT_STOPPED if outcome.stopped else max(codes)


def _request(arguments: argparse.Namespace) -> tuple[SweepRequest, Path]:
    """The validated request and the folder of its runs."""
    tables = [load_table(name) for name in arguments.tables]
    names = [table.name for table in tables]
    if len(set(names)) != len(names):
        raise ValueError(f"tables: expected different names, got {', '.join(names)}")
    _check_seeds(arguments)
    overrides = parse_overrides(arguments.set) | {
        key: str(value)
        for key, value in (
            ("runtime.num_workers", arguments.workers_per_trial),
            ("runtime.max_concurrent_stages", arguments.max_concurrent),
        )
        if value is not None
    }
    out = runs_folder(arguments.out)
    requests = []
    for table in tables:
        rows = _rows(table.name, list(table.rows), arguments.rows, several=len(tables) > 1)
        if not rows:
            continue
        seeds = arguments.seeds if arguments.seeds is not None else list(table.seeds)
        recipes = {
            (row, seed): table.row_recipe(row, arguments.preset, arguments.scale, seed, overrides)
            for seed in seeds
            for row in rows
        }
        of = f"{table.name}-{arguments.preset or table.preset}-{arguments.scale or table.scale}"
        name = of if not arguments.name else arguments.name if len(tables) == 1 else f"{arguments.name}-{table.name}"
        settings = table.settings(arguments.preset, arguments.scale, overrides)
        choice = choose_run(out, name, table, settings)
        requests.append(
            TableRequest(
                table,
                recipes,
                choice.name,
                frozenset(rows if arguments.rows else ()),
                settings=settings,
                folder=choice.words(out),
                has_own_folder=bool(choice.beside),
            )
        )
    if not requests:
        raise ValueError(f"--rows: no row of {', '.join(names)} is called {', '.join(arguments.rows)}")
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
    request = SweepRequest(
        tables=tuple(requests),
        storage=arguments.storage or os.environ.get("CAST_RAY_STORAGE") or str(home() / "storage"),
        address=arguments.address,
        num_cpus=arguments.num_cpus,
        dry_run=arguments.dry_run,
        budget_hours=arguments.budget_hours,
        price_per_hour=arguments.price_per_gpu_hour,
        keep_going=arguments.keep_going,
        trackers=trackers,
    )
    return request, out


def _check_seeds(arguments: argparse.Namespace) -> None:
    seeds = arguments.seeds or []
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds: expected different numbers, got {' '.join(map(str, seeds))}")


def _rows(table: str, known: list[str], wanted: list[str] | None, several: bool) -> list[str]:
    """The rows to run. Of several tables `TABLE:ROW` means one table's, a plain name every table's that has it."""
    if wanted is None:
        return known
    if not several:
        return wanted  # an unknown one is refused with the nearest
    return [row for row in known if row in wanted or f"{table}:{row}" in wanted]


def home() -> Path:
    """Where results go by default: here; inside a Ray job, whose folder is thrown away, the user's home."""
    return Path.home() / "cast_ray" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else Path()


def runs_folder(out: str | None) -> Path:
    """The folder of all runs that `--out` names, or the default one.

    Raises:
        ValueError: a URI, which reports cannot be written to, a file, or a place that cannot be written.
    """
    if out and "://" in out:
        raise ValueError(f"--out {out}: expected a local folder for results and reports (--storage takes a URI)")
    return output_folder(out or str(home() / "runs"))


def _parser() -> Parser:
    parser = Parser(
        prog="ablate.py",
        description="Runs ablation tables of CAST on Ray. Stages that rows share run once, also those of several "
        "tables; the same command goes on with an interrupted run, tries failed rows again and ends in seconds when "
        "all is stored. `ablate.py store --help`: the artifacts of earlier runs.",
        epilog="A recipe key for --set is any field of cast_ray/recipe/, for example loss.lambda_pxl=0.2, "
        "stages.distill.steps=800, runtime.use_gpu=true; variant=released (or contrastive=, student=) sets a named "
        "variant. Exit codes: 0 all rows done, 1 a row "
        "failed (the others ran), 2 bad input, 3 stopped by a limit, 130 interrupted.",
    )
    parser.add_argument(
        "tables",
        nargs="+",
        metavar="TABLE",
        help=f"tables of sweeps/tables ({', '.join(table_names())}) or YAML files of your own; several run as one "
        "plan. Also `report`, `store` and `efficiency`, with --help of their own",
    )
    parser.add_argument("--preset", help=f"one of {', '.join(preset_names())} (default: the table's, else shapes)")
    parser.add_argument("--scale", help=f"one of {', '.join(SCALES)} (default: the table's, else demo)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="only these rows; TABLE:ROW where several tables have one of that name"
    )
    parser.add_argument("--seeds", nargs="+", type=whole_number, metavar="N", help="seeds instead of the table's")
    parser.add_argument("--name", help="name of the run (default: TABLE-PRESET-SCALE)")
    parser.add_argument("--out", help="local folder for results and reports (default: runs)")
    parser.add_argument(
        "--storage",
        help="path or URI (s3://...) for artifacts and checkpoints, reachable from every node; default: "
        "$CAST_RAY_STORAGE, else ./storage",
    )
    parser.add_argument("--address", help="Ray cluster; 'local' for one of its own (default: $RAY_ADDRESS, else local)")
    parser.add_argument("--num-cpus", type=positive, help="logical CPUs of a local Ray (default: the machine's)")
    parser.add_argument(
        "--max-concurrent", type=whole_number, metavar="N", help="stages at a time (default: as many as fit)"
    )
    parser.add_argument("--workers-per-trial", type=positive, metavar="N", help="Train workers of a stage (default: 1)")
    plan = parser.add_argument_group("what it costs")
    plan.add_argument("--dry-run", action="store_true", help="print the plan, its device-hours and cost, and stop")
    plan.add_argument("--price-per-gpu-hour", type=amount, metavar="P", help="price of a device-hour, for the plan")
    plan.add_argument(
        "--budget-hours",
        type=amount,
        metavar="H",
        help="device-hours (hours x workers) after which no further stage is started; the command says what is left",
    )
    plan.add_argument(
        "--keep-going",
        action="store_true",
        help="a failed row never stops the others, but when the first three rows to end have all failed, the rest is "
        "not started: with this flag it is",
    )
    trackers = parser.add_argument_group("trackers")
    trackers.add_argument("--no-tensorboard", action="store_true", help=f"no event files in <run>/{TENSORBOARD}")
    trackers.add_argument("--wandb", metavar="PROJECT", help="log rows to this Weights & Biases project")
    trackers.add_argument("--mlflow", metavar="URI", help="log rows to MLflow: http://SERVER, sqlite:///FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
