"""Runs an ablation table: every row and seed, each stage that several rows need once.

python sweeps/ablate.py losses --preset shapes
python sweeps/ablate.py losses --preset coco --set data.root=DIR --scale smoke
python sweeps/ablate.py report runs/losses-shapes-demo     # its report again, from its files alone (--watch: live)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Run from a checkout without installing, and inside `ray job submit --working-dir .`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from cast_ray.recipe import SCALES, parse_overrides, preset_names
from cast_ray.report.publish import announce, publish
from cast_ray.runtime.store import ArtifactStore
from cast_ray.runtime.sweep import SweepRequest, run_sweep
from cast_ray.stages.table import load_table, table_names

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    errors = Console(stderr=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if argv[:1] == ["report"]:
            from sweeps.report import main as report_command

            return report_command(argv[1:], console)
        request, out = _request(_parser().parse_args(argv))
        uri = ArtifactStore(request.storage).uri("runs", request.name)
        sweep = run_sweep(request, console, lambda: announce(out, request.table, request.recipes, uri, console))
        return publish(sweep, request.table, out, console) if sweep else 0
    except ValueError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        errors.print("stopped; finished stages are stored, the same command goes on from here")
        return EXIT_INTERRUPTED


def _request(arguments: argparse.Namespace) -> tuple[SweepRequest, Path]:
    """The validated request and the folder of its results and reports."""
    table = load_table(arguments.table)
    overrides = parse_overrides(arguments.set)
    rows = arguments.rows or list(table.rows)
    seeds = arguments.seeds if arguments.seeds is not None else list(table.seeds)
    recipes = {
        (row, seed): table.row_recipe(row, arguments.preset, arguments.scale, seed, overrides)
        for seed in seeds
        for row in rows
    }
    name = arguments.name or f"{table.name}-{arguments.preset}-{arguments.scale}"
    home = _home()
    request = SweepRequest(
        table=table,
        recipes=recipes,
        name=name,
        storage=arguments.storage or os.environ.get("CAST_RAY_STORAGE") or str(home / "storage"),
        address=arguments.address,
        num_cpus=arguments.num_cpus,
        dry_run=arguments.dry_run,
    )
    return request, Path(arguments.out or home / "runs") / name


def _home() -> Path:
    """Where results go by default: here; inside a Ray job, whose folder is thrown away, the user's home."""
    return Path.home() / "cast_ray" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else Path()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ablate.py",
        description="Runs an ablation table of CAST on Ray. Stages that rows share run once; the same command goes on "
        "with an interrupted run and finishes in seconds when everything is stored.",
        epilog="A recipe key for --set is any field of cast_ray/recipe/, for example loss.lambda_pxl=0.2, "
        "stages.distill.steps=800, contrastive=released, runtime.num_workers=4, runtime.use_gpu=true.",
    )
    parser.add_argument(
        "table", help=f"a table of sweeps/tables ({', '.join(table_names())}) or a YAML file of your own"
    )
    parser.add_argument("--preset", default="shapes", help=f"one of {', '.join(preset_names())} (default: %(default)s)")
    parser.add_argument("--scale", default="demo", help=f"one of {', '.join(SCALES)} (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds instead of the table's")
    parser.add_argument("--name", help="name of the run (default: TABLE-PRESET-SCALE)")
    parser.add_argument("--out", help="folder for results and reports (default: runs)")
    parser.add_argument(
        "--storage",
        help="path or URI (s3://...) for artifacts and checkpoints, reachable from every node; default: "
        "$CAST_RAY_STORAGE, else ./storage",
    )
    parser.add_argument("--address", help="Ray cluster; 'local' for one of its own (default: $RAY_ADDRESS, else local)")
    parser.add_argument("--num-cpus", type=int, help="logical CPUs of a local Ray (default: the machine's)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
