"""A run folder's report, written from its files alone, once or again and again while a sweep runs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
from rich.console import Console

from cast_ray.common.files import write_atomically
from cast_ray.common.paths import absolute, resolve
from cast_ray.plan.prices import Prices
from cast_ray.report.blocks import Article, Picture
from cast_ray.report.content import Report
from cast_ray.report.exports import csv_page, figure_file, json_page, latex_page, markdown_page
from cast_ray.report.notes import progress_of
from cast_ray.report.results import summarise_run
from cast_ray.report.run_folder import PLAN, RESULT, read_plan, read_run
from cast_ray.report.sections import sections_of
from cast_ray.report.tables import print_report

PAGE_CODE = {".py", ".j2", ".css", ".js"}
HEAD_BYTES = 512


@dataclass(frozen=True)
class Written:
    """What was written: one report a table, and the files (`html`, `markdown`, `csv`, `latex`, `json`)."""

    reports: tuple[Report, ...]
    files: dict[str, Path]

    @property
    def is_complete(self) -> bool:
        return not any(report.num_pending for report in self.reports)

    @property
    def has_failures(self) -> bool:
        return any(report.failures for report in self.reports)


def write_report(
    run_dir: str | Path,
    refresh_s: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
    prices: Prices | None = None,
) -> Written:
    """Writes `report.html`, `.md`, `.csv`, `.tex`, `.json` and the figures of a run folder, from its files alone.

    Args:
        run_dir: holds `<table>__<row>__s<seed>/result.json` and, where a sweep left them, `sweep.json`, per-image data
            and pictures (see `run_folder`); the report is written into it.
        refresh_s: the page reloads itself every so many seconds while results are missing.
        tell: called with a line now and then while it takes long.
        prices: of a device-hour; None: those that the sweep was started with.

    Raises:
        ValueError: the run folder cannot be read, see `read_run`.
    """
    run = read_run(run_dir)
    reports = summarise_run(run, tell, prices)
    articles = [Article(r.table, r.title, r.context, sections_of(r, run.folder)) for r in reports]
    expected, pending = (sum(getattr(r, name) for r in reports) for name in ("num_expected", "num_pending"))
    state = progress_of(expected, pending, sum(len(r.failures) for r in reports), refresh_s)
    pages = {
        "markdown": ("report.md", markdown_page(articles)),
        "csv": ("report.csv", csv_page(reports)),
        "latex": ("report.tex", latex_page(reports)),
        "json": ("report.json", json.dumps(json_page(reports), indent=1, allow_nan=False) + "\n"),
    }
    for name, text in pages.values():
        write_atomically(run.folder / name, text)
    html = write_page(run.folder, articles, state, refresh_s if pending else None)
    return Written(tuple(reports), {"html": html} | {kind: run.folder / name for kind, (name, _) in pages.items()})


def show(written: Written, console: Console, at: Callable[[Path], str] = str) -> int:
    """Prints the tables of a written report and where it lies; returns the command's exit code.

    Args:
        at: what a user knows a file by, see `ResultsFolder.at`.
    """
    for report in written.reports:
        print_report(report, console)
    console.print(f"\nReport: {at(written.files['html'])}", soft_wrap=True, highlight=False)
    others = ", ".join(path.name for kind, path in written.files.items() if kind != "html")
    console.print(f"  beside it: {others}, figures", soft_wrap=True, highlight=False)
    return 1 if written.has_failures or not written.is_complete else 0


def write_page(folder: Path, articles: Sequence[Article], state: tuple[str, str], refresh_s: int | None = None) -> Path:
    """Writes `report.html`, and draws the figures that stand beside `report.md`; see `page.html_page`.

    A page that shows the same already, with its figures beside it, is left as it is: drawing takes longer than all
    else that a command does whose results are in the store.

    Returns:
        Where the page is.
    """
    page = folder / "report.html"
    figures = {folder / figure_file(a, figure, len(articles)): figure for a in articles for figure in a.figures}
    contents = _contents(articles, state, refresh_s)
    if _shows(page, contents) and all(path.is_file() for path in figures):
        return page
    from cast_ray.report.page import html_page  # loads Matplotlib
    from cast_ray.report.plots import draw_png

    for path, figure in figures.items():
        draw_png(figure, path)
    write_atomically(page, html_page(articles, state, refresh_s, contents))  # last: it vouches for the figures
    return page


def _contents(articles: Sequence[Article], state: tuple[str, str], refresh_s: int | None) -> str:
    """Digest of all that a page is made of: what it shows, files that it holds, and the code that draws it."""
    digest = hashlib.sha256(repr((articles, state, refresh_s)).encode())
    pictures = [block.path for article in articles for block in article.blocks if isinstance(block, Picture)]
    code = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in PAGE_CODE)
    for path in [*pictures, *code]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _shows(page: Path, contents: str) -> bool:
    """Whether a page was written of these contents, which it names in its head."""
    try:
        with page.open("rb") as file:
            return contents.encode() in file.read(HEAD_BYTES)
    except FileNotFoundError:
        return False


def rebuild_report(run_dir: str | Path, console: Console, prices: Prices | None = None) -> Written:
    """Writes the report of a run folder again; of a sweep that was stopped, with the results that its store has.

    Raises:
        ValueError: the run folder cannot be read, see `read_run`.
    """
    run = read_run(run_dir)
    if run.pending() and run.plan.results_uri:
        console.print(f"Asking {run.plan.results_uri} for results that are not here yet", soft_wrap=True)
        try:
            fetch_results(run_dir)
        except (OSError, pa.ArrowException) as error:  # the cluster may be gone
            console.print(
                f"The sweep's store cannot be read, so the report holds only the results in its folder: {error}",
                soft_wrap=True,
            )
    return write_report(run_dir, tell=console.print, prices=prices)


def watch_report(
    run_dir: str | Path,
    console: Console,
    every_s: float,
    stopped: threading.Event | None = None,
    on_written: Callable[[], None] = lambda: None,
    at: Callable[[Path], str] = str,
    prices: Prices | None = None,
) -> Written | None:
    """Writes the report again whenever a result is new, until all that the sweep was asked for are there.

    Results are taken from the run folder and, while the sweep runs, from the store that it writes to.

    Args:
        every_s: how often to look, and how often the page reloads itself.
        stopped: ends the watch early; None: only the last result does.
        on_written: called after every report.
        at: what a user knows a file by, see `ResultsFolder.at`.
        prices: see `write_report`.

    Returns:
        The last report; None when there was never one.
    """
    stopped = stopped or threading.Event()
    written: Written | None = None
    seen: dict[Path, int] | None = None
    told = ""
    while True:
        try:
            fetch_results(run_dir)
            files = _stamps(Path(run_dir))
            if files != seen:
                written = write_report(run_dir, refresh_s=max(1, round(every_s)), prices=prices)
                seen = files
                on_written()
                told = _tell(console, told, f"{_progress(written)}: {at(written.files['html'])}")
        except (ValueError, OSError, pa.ArrowException) as error:  # nothing there yet, or a store that does not answer
            told = _tell(console, told, f"waiting: {error}")
        if (written is not None and written.is_complete) or stopped.wait(every_s):
            return written


def _tell(console: Console, before: str, now: str) -> str:
    if now != before:
        console.print(now, markup=False, highlight=False, soft_wrap=True)
    return now


def _progress(written: Written) -> str:
    expected = sum(report.num_expected for report in written.reports)
    there = expected - sum(report.num_pending for report in written.reports)
    failed = sum(len(report.failures) for report in written.reports)
    return f"{there} of {expected} results{f', {failed} FAILED' if failed else ''}"


def _stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder / PLAN, *folder.glob("*/*.*")] if path.is_file()}


def fetch_results(run_dir: str | Path) -> int:
    """Copies results that a sweep has put into its store but not yet into the run folder; returns how many."""
    plan = read_plan(run_dir)
    if not plan.results_uri:
        return 0
    filesystem, root = resolve(absolute(plan.results_uri))
    selector = pa.fs.FileSelector(root, recursive=True, allow_not_found=True)
    num_new = 0
    for info in filesystem.get_file_info(selector):
        target = Path(run_dir) / info.path.rsplit("/", 2)[-2] / RESULT
        if info.base_name != RESULT or (target.is_file() and target.stat().st_mtime_ns >= (info.mtime_ns or 0)):
            continue
        with filesystem.open_input_file(info.path) as file:
            write_atomically(target, file.read())
        num_new += 1
    return num_new
