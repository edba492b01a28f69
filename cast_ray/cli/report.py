"""`cast-ray report` writes the report of a run folder again; it needs neither Ray nor a table file.

cast-ray report runs/losses-shapes-demo
cast-ray report runs/losses-shapes-demo --watch     # in a second terminal while the sweep runs
cast-ray report s3://bucket/storage/runs/losses-shapes-demo --out losses     # of a job on a cluster
cast-ray report runs/losses-shapes-demo --price-per-gpu-hour A10G=1.01 L4=0.71
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cast_ray.cli.options import (
    EXIT_FAILED,
    Parser,
    add_price_option,
    exit_code,
    output_folder,
    plain_console,
    positive_amount,
    prices_of,
)
from cast_ray.common.results_folder import ResultsFolder

WATCH_EVERY_S = 5


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 when every row is done, 1 when one failed or is missing."""
    parser = Parser(prog="cast-ray report", description="Writes the report of a run folder again.")
    parser.add_argument(
        "run_dir",
        help="path or URI of a folder with <table>__<row>__s<seed>/result.json files, such as runs/NAME or "
        "s3://bucket/storage/runs/NAME",
    )
    parser.add_argument("--out", metavar="DIR", help="local folder: copy the run there and write the report there")
    parser.add_argument(
        "--watch", action="store_true", help="rewrite the report after each new result until all results exist"
    )
    parser.add_argument(
        "--every",
        type=positive_amount,
        default=WATCH_EVERY_S,
        metavar="S",
        help="seconds between two looks (default: %(default)s)",
    )
    add_price_option(parser)
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _report(arguments, plain_console()))


def _report(arguments: argparse.Namespace, console: Console) -> int:
    """Writes the report, once or until all results are there.

    Raises:
        ValueError: the folder holds neither results nor a plan, or a file that is not one.
    """
    # Imported here, because it loads SciPy's statistics and Matplotlib, which --help does without.
    from cast_ray.common.paths import is_uri, parent_and_name
    from cast_ray.common.results_folder import copy_results, open_results
    from cast_ray.report.run_choice import fetch_known, without_digest

    if arguments.out is not None:
        out = output_folder(arguments.out)
        copy_results(arguments.run_dir, out)
        return _report_of(ResultsFolder(str(out.parent), out.parent), out, arguments, console)
    if not is_uri(arguments.run_dir):
        run_dir = Path(arguments.run_dir)
        return _report_of(ResultsFolder(str(run_dir.parent), run_dir.parent), run_dir, arguments, console)
    parent, name = parent_and_name(arguments.run_dir)
    with open_results(parent) as results:
        fetch_known(results, without_digest(name))
        results.fetch([name])
        code = _report_of(results, results.path / name, arguments, console)
        results.send()
    return code


def _report_of(results: ResultsFolder, run_dir: Path, arguments: argparse.Namespace, console: Console) -> int:
    """Writes the report of a run folder of this machine, which may be the copy of another one."""
    from cast_ray.report.run_choice import named, runs_beside
    from cast_ray.report.write import rebuild_report, show, watch_report

    prices = prices_of(arguments)
    if (run_dir / "search.json").is_file():
        return _search_report(results, run_dir, arguments.watch, arguments.every, console)
    for folder, differences in runs_beside(run_dir):
        console.print(
            f"Beside it: {results.at(folder)} holds the same table with other settings: {named(differences)}",
            soft_wrap=True,
            highlight=False,
        )
    if not arguments.watch:
        return show(rebuild_report(run_dir, console, prices), console, results.at)
    try:
        written = watch_report(run_dir, console, arguments.every, on_written=results.send, at=results.at, prices=prices)
    except KeyboardInterrupt:
        console.print("Watching has stopped. The report remains as last written.")
        return EXIT_FAILED
    return show(written, console, results.at) if written else EXIT_FAILED


def _search_report(results: ResultsFolder, run_dir: Path, is_watched: bool, every_s: float, console: Console) -> int:
    """Writes the report of a search; its trials are read from its study."""
    from cast_ray.publish.search import rebuild_search_report, show_search, watch_search

    if not is_watched:
        return show_search(rebuild_search_report(run_dir), console, results.at)
    return show_search(watch_search(run_dir, console, every_s, results.at, results.send), console, results.at)
