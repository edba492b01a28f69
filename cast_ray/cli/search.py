"""`cast-ray search` searches recipe keys with Optuna: TPE beside random search, early stopping, Pareto fronts.

cast-ray search losses --preset shapes
cast-ray search latency --trials 40
optuna-dashboard runs/losses-search-shapes-demo/study.journal     # pip install optuna-dashboard
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError
from rich.text import Text

from cast_ray.cli.options import (
    EXIT_STOPPED,
    Parser,
    add_ray_options,
    add_recipe_options,
    add_run_options,
    add_teacher_option,
    add_tracker_options,
    amount,
    check_teacher,
    exit_code,
    is_ray_job,
    keep_wandb_here,
    output_folder,
    plain_console,
    positive,
    random_seed,
    recipe_overrides,
    runs_place,
    storage_path,
    tell_report_command,
)
from cast_ray.common.paths import below, is_uri
from cast_ray.common.results_folder import ResultsFolder, open_results
from cast_ray.plan.search import SearchSpec, load_search, search_names
from cast_ray.plan.yaml_files import explain
from cast_ray.runtime.sweep.trackers import TENSORBOARD, Trackers

STUDY = "study.journal"


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    interrupted = "stopped; trials that were running are tried again by the same command, from what they stored"
    return exit_code(lambda: _search(arguments), interrupted)


def _search(arguments: argparse.Namespace) -> int:
    with open_results(runs_place(arguments.out, storage_path(arguments.storage))) as results:
        return _run(arguments, results)


def _run(arguments: argparse.Namespace, results: ResultsFolder) -> int:
    spec = load_search(arguments.search)
    changes = {"num_trials": arguments.trials, "samplers": arguments.samplers, "scheduler": arguments.scheduler}
    try:
        spec = SearchSpec.model_validate(
            spec.model_dump() | {key: value for key, value in changes.items() if value is not None}
        )
    except ValidationError as error:
        raise ValueError(explain(error, SearchSpec)) from None
    overrides = recipe_overrides(arguments)
    searched = spec.domains().get("teacher.kind")
    check_teacher(arguments.teacher, map(str, searched.ends()) if searched else ())
    preset, scale = arguments.preset or spec.preset, arguments.scale or spec.scale
    name = arguments.name or f"{spec.name}-search-{preset}-{scale}"
    results.fetch([name])
    out = output_folder(str(results.path / name))
    storage = storage_path(arguments.storage)
    folders = {f"{spec.name}-{sampler}": str(out) for sampler in spec.samplers}
    events = {} if arguments.no_tensorboard else dict.fromkeys(folders, str(out / TENSORBOARD))
    trackers = Trackers(folders, events, wandb=arguments.wandb, mlflow=arguments.mlflow, group=name)
    trackers.check_installed()
    if results.is_remote and arguments.wandb:
        keep_wandb_here()
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
        study=arguments.study or _study(out, storage, name, results),
        storage=storage,
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
        console.print(f"  report   {results.at(out / 'report.html')}", soft_wrap=True, highlight=False)
        results.send()

    outcome = run_search(request, console, on_start)
    code = show_search(write_search_report(plan, outcome.studies, out), console, results.at)
    tell_report_command(results.at(out), results.is_remote, console)
    trackers.finish(lambda text: console.print(text, soft_wrap=True, highlight=False))
    results.send()
    if outcome.stopped:
        console.print(
            Text.assemble(("stopped", "yellow"), f": {outcome.stopped}. Run the same command again to continue.")
        )
        return EXIT_STOPPED
    return code


def _study(out: Path, storage: str, name: str, results: ResultsFolder) -> str:
    """Returns where the study lies: in the run folder, or below the storage path where that outlives this machine."""
    if not results.is_remote and (out / STUDY).is_file():  # one of an earlier version is continued where it is
        return str(out / STUDY)
    if is_uri(storage) or results.is_remote or is_ray_job():
        return below(storage, "runs", name, STUDY)
    return str(out / STUDY)


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray search",
        description="Searches recipe keys with Optuna on Ray. Trials share stages with each other and with all tables. "
        "The same command resumes an interrupted search, and with more --trials it extends a finished one.",
    )
    parser.add_argument(
        "search", help=f"a search that comes with cast_ray ({', '.join(search_names())}) or a YAML file of your own"
    )
    add_recipe_options(parser, of="search")
    add_teacher_option(parser)
    parser.add_argument(
        "--trials", type=positive, metavar="N", help="trials of each sampler, including those of earlier commands"
    )
    parser.add_argument(
        "--samplers", nargs="+", metavar="S", help="tpe, random; each has its study (default: the search's)"
    )
    parser.add_argument("--scheduler", metavar="S", help="asha: stop trials early; none (default: the search's)")
    parser.add_argument("--seed", type=random_seed, default=0, help="seed of the recipes (default: 0)")
    parser.add_argument(
        "--study",
        help=f"sqlite:///FILE, or path or URI of a journal (default: <out>/<name>/{STUDY}; in a Ray job and "
        f"with --storage s3://... <storage>/runs/<name>/{STUDY})",
    )
    add_run_options(parser, name="SEARCH-search-PRESET-SCALE")
    add_ray_options(parser)
    parser.add_argument("--budget-hours", type=amount, metavar="H", help="device-hours after which no stage is started")
    parser.add_argument(
        "--keep-going", action="store_true", help="continue even if the first three trials have all failed"
    )
    add_tracker_options(parser, what="trials")
    return parser
