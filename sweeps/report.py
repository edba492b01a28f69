"""`ablate.py report RUN_DIR`: writes a run folder's report again; needs no Ray and no table file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cast_ray.console import Parser, positive_amount
from cast_ray.report.run_choice import named, runs_beside
from cast_ray.report.write import WATCH_EVERY_S, rebuild_report, show, watch_report


def main(argv: list[str], console: Console) -> int:
    """Runs the sub-command; returns its exit code: 0 when every row is done, 1 when one failed or is missing.

    Raises:
        ValueError: the folder holds neither results nor a plan, or a file that is not one.
    """
    parser = Parser(prog="ablate.py report", description="Writes the report of a run folder again.")
    parser.add_argument("run_dir", help="folder with <table>__<row>__s<seed>/result.json files, such as runs/NAME")
    parser.add_argument("--watch", action="store_true", help="again whenever a result is new, until all are there")
    parser.add_argument(
        "--every", type=positive_amount, default=WATCH_EVERY_S, metavar="S", help="seconds between two looks"
    )
    arguments = parser.parse_args(argv)
    if (Path(arguments.run_dir) / "search.json").is_file():
        return _search_report(Path(arguments.run_dir), arguments.watch, arguments.every, console)
    for folder, differences in runs_beside(Path(arguments.run_dir)):
        console.print(
            f"Beside it: {folder} holds the same table with other settings: {named(differences)}",
            soft_wrap=True,
            highlight=False,
        )
    if not arguments.watch:
        return show(rebuild_report(arguments.run_dir, console), console)
    try:
        written = watch_report(arguments.run_dir, console, every_s=arguments.every)
    except KeyboardInterrupt:
        console.print("no longer watched; the page stays as it is")
        return 1
    return show(written, console) if written else 1


def _search_report(run_dir: Path, is_watched: bool, every_s: float, console: Console) -> int:
    """The same of a search's folder, whose trials are in its study."""
    from cast_ray.publish.search import rebuild_search_report, show_search, watch_search

    if not is_watched:
        return show_search(rebuild_search_report(run_dir), console)
    return show_search(watch_search(run_dir, console, every_s=every_s), console)
