"""Searches over recipe keys with Optuna: TPE beside random search, early stopping, Pareto fronts.

python sweeps/search.py losses --preset shapes
python sweeps/search.py latency --trials 40
optuna-dashboard runs/losses-search-shapes-demo/study.journal     # pip install optuna-dashboard
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

# Run from a checkout without installing, and inside `ray job submit --working-dir .`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.text import Text

from cast_ray.console import Parser, amount, exit_code, output_folder, plain_console, positive, whole_number
from cast_ray.plan.search import load_search, search_names
from cast_ray.recipe import SCALES, parse_overrides, preset_names
from cast_ray.runtime.sweep.trackers import TENSORBOARD, Trackers
from sweeps.ablate import EXIT_STOPPED, home, runs_folder

STUDY = "study.journal"


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    interrupted = "stopped; trials that were running are tried again by the same command, from what they stored"
    return exit_code(lambda: _search(arguments), interrupted)


def _search(arguments: argparse.Namespace) -> int:
    spec = load_search(arguments.search)
    changes = {"num_trials": arguments.trials, "samplers": arguments.samplers, "scheduler": arguments.scheduler}
    spec = type(spec).model_validate(
        spec.model_dump() | {key: value for key, value in changes.items() if value is not None}
    )
    overrides = parse_overrides(arguments.set) | {
        key: str(value)
        for key, value in (
            ("runtime.num_workers", arguments.workers_per_trial),
            ("runtime.max_concurrent_stages", arguments.max_concurrent),
        )
        if value is not None
    }
    preset, scale = arguments.preset or spec.preset, arguments.scale or spec.scale
    name = arguments.name or f"{spec.name}-search-{preset}-{scale}"
    out = output_folder(str(runs_folder(arguments.out) / name))
    folders = {f"{spec.name}-{sampler}": str(out) for sampler in spec.samplers}
    events = {} if arguments.no_tensorboard else dict.fromkeys(folders, str(out / TENSORBOARD))
    trackers = Trackers(folders, events, wandb=arguments.wandb, mlflow=arguments.mlflow, group=name)
    trackers.check_installed()
    spec.recipe({}, preset, scale, arguments.seed, overrides)  # refused before Ray and Optuna are loaded

    from cast_ray.publish.search import SearchRun, context_of_search, show_search, write_search_report
    from cast_ray.runtime.search.run import SearchRequest, run_search
    from cast_ray.runtime.sweep.row_results import SweepContext

    request = SearchRequest(
        spec=spec,
        preset=preset,
        scale=scale,
        overrides=overrides,
        seed=arguments.seed,
        name=name,
        study=arguments.study or str(out / STUDY),
        storage=arguments.storage or os.environ.get("CAST_RAY_STORAGE") or str(home() / "storage"),
        address=arguments.address,
        num_cpus=arguments.num_cpus,
        budget_hours=arguments.budget_hours,
        keep_going=arguments.keep_going,
        trackers=trackers,
    )
    console = plain_console()
    console.print(Text.assemble((spec.title, "bold"), f"  ({spec.name}, {preset} at {scale})"))
    plan = SearchRun(name, spec, request.study, {"preset": preset, "scale": scale, **overrides})

    def on_start(context: SweepContext) -> None:
        nonlocal plan
        plan = replace(plan, context=context_of_search(context, request.recipe({}).model_dump()))
        plan.write(out)
        console.print(f"  report   {out / 'report.html'}", soft_wrap=True, highlight=False)

    outcome = run_search(request, console, on_start)
    code = show_search(write_search_report(plan, outcome.studies, out), console)
    trackers.finish(lambda text: console.print(text, soft_wrap=True, highlight=False))
    if outcome.stopped:
        console.print(Text.assemble(("stopped", "yellow"), f": {outcome.stopped}; the same command goes on"))
        return EXIT_STOPPED
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="search.py",
        description="Searches recipe keys with Optuna on Ray. Trials share stages with each other and with all tables; "
        "the same command goes on with an interrupted search, and with more --trials it extends a finished one.",
        epilog="Exit codes as of ablate.py: 0 done, 1 no trial finished, 2 bad input, 3 stopped by a limit.",
    )
    parser.add_argument("search", help=f"a search of sweeps/search ({', '.join(search_names())}) or a YAML file")
    parser.add_argument("--preset", help=f"one of {', '.join(preset_names())} (default: the search's, else shapes)")
    parser.add_argument("--scale", help=f"one of {', '.join(SCALES)} (default: the search's, else demo)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--trials", type=positive, metavar="N", help="trials of each sampler, those before included")
    parser.add_argument("--samplers", nargs="+", metavar="S", help="tpe, random: a study each (default: the search's)")
    parser.add_argument("--scheduler", metavar="S", help="asha: stop trials early; none (default: the search's)")
    parser.add_argument("--seed", type=whole_number, default=0, help="seed of the recipes (default: 0)")
    parser.add_argument("--study", help=f"sqlite:///FILE or a journal file (default: <out>/<name>/{STUDY})")
    parser.add_argument("--name", help="name of the run (default: SEARCH-search-PRESET-SCALE)")
    parser.add_argument("--out", help="local folder for results and reports (default: runs)")
    parser.add_argument("--storage", help="as of ablate.py")
    parser.add_argument("--address", help="Ray cluster; 'local' for one of its own (default: $RAY_ADDRESS, else local)")
    parser.add_argument("--num-cpus", type=positive, help="logical CPUs of a local Ray (default: the machine's)")
    parser.add_argument(
        "--max-concurrent", type=whole_number, metavar="N", help="stages at a time (default: as many as fit)"
    )
    parser.add_argument("--workers-per-trial", type=positive, metavar="N", help="Train workers of a stage (default: 1)")
    parser.add_argument("--budget-hours", type=amount, metavar="H", help="device-hours after which no stage is started")
    parser.add_argument("--keep-going", action="store_true", help="go on though the first three trials failed")
    parser.add_argument("--no-tensorboard", action="store_true", help=f"no event files in <run>/{TENSORBOARD}")
    parser.add_argument("--wandb", metavar="PROJECT", help="log trials to this Weights & Biases project")
    parser.add_argument("--mlflow", metavar="URI", help="log trials to MLflow: http://SERVER, sqlite:///FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
