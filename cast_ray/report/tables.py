"""One report, three forms: a table for the terminal, `report.md` for people, `report.json` for programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from cast_ray.report.content import Cell, Difference, Failure, Report, RowSummary, StageSummary, label_of
from cast_ray.report.overlays import CONTACT_SHEET
from cast_ray.report.plots import curves_figure, margins_figure
from cast_ray.report.results import read_results, summarise
from cast_ray.stages.table import Table

TERMINAL_COLUMNS = 100
# Left out of the terminal first when the table gets too wide; the files always have all.
DISPENSABLE = ("refined/ap50", "teacher/ap50", "student/ap50", "refined/mask_ap")


def terminal_table(report: Report, width: int = TERMINAL_COLUMNS) -> RenderableType:
    """The table with its notes, for a terminal of `width` columns."""
    metrics = list(report.metrics)
    table = _rich_table(report, metrics)
    probe = Console(width=10 * width)
    for name in DISPENSABLE:
        if Measurement.get(probe, probe.options, table).maximum <= width:
            break
        if name in metrics and name != report.metric:
            metrics.remove(name)
            table = _rich_table(report, metrics)
    lines: list[RenderableType] = [table, ""]
    lines += [Text(f"FAILED  {_failure_text(f)}", style="bold red") for f in report.failures]
    lines += [Text(note) for note in report.notes]
    lines += [Text(f"  {_difference_text(d, report)}") for d in report.differences]
    return Group(*lines)


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the table and its notes."""
    console = console or Console()
    console.print(terminal_table(report, min(console.width, TERMINAL_COLUMNS)))


def markdown_page(report: Report, figures: dict[str, str] | None = None) -> str:
    """`report.md`: the table, what to know about it, the stages behind it, the figures (caption -> file name)."""
    lines = [f"# {report.title}", ""]
    lines += [
        f"- {name}: `{text}`" if name == "command" else f"- {name}: {text}" for name, text in report.context.items()
    ]
    lines += ["", *_markdown_rows(*_grid(report, list(report.metrics), line_break=" ")), ""]
    lines += [f"**FAILED** {_failure_text(f)}\n" for f in report.failures]
    lines += [f"{note}\n" for note in report.notes]
    if report.differences:
        lines += [f"## {label_of(report.metric)} against `{report.baseline}`", ""]
        lines += [f"- {_difference_text(d, report)}" for d in report.differences] + [""]
    if report.stages:
        lines += ["## Stages", "", *_markdown_rows(*_stage_grid(report)), ""]
    for caption, file in (figures or {}).items():
        lines += [f"## {caption}", "", f"![{caption}]({file})", ""]
    return "\n".join(lines).rstrip() + "\n"


def json_page(report: Report) -> dict[str, Any]:
    """`report.json`: the same as plain data, without the raw results it was made from."""
    page = dataclasses.asdict(dataclasses.replace(report, results=()))
    page.pop("results")
    return page


def write_report(run_dir: str | Path, table: Table | None = None) -> dict[str, Path]:
    """Writes `report.md`, `report.json` and the figures of a run folder, from its `result.json` files alone.

    Args:
        run_dir: holds `<table>__<row>__s<seed>/result.json`; the report is written into it. A contact sheet that
            lies there under its usual name is shown in the report.
        table: see `summarise`.

    Returns:
        what was written: `markdown`, `json`, and where there is something to draw `margins` and `curves`.

    Raises:
        ValueError: as `read_results` and `summarise`.
    """
    run_dir = Path(run_dir)
    report = summarise(read_results(run_dir), table)
    written: dict[str, Path] = {}
    figures = {}
    if (run_dir / CONTACT_SHEET).is_file():
        figures["Images, ground truth, pseudo-labels, student"] = CONTACT_SHEET
    for key, caption, draw in (
        ("margins", "Margin and false negatives of the pixel contrast", margins_figure),
        ("curves", "Learning curves", curves_figure),
    ):
        path = run_dir / f"{key}.png"
        if draw(report.results, path):
            written[key] = path
            figures[caption] = path.name
    written["markdown"], written["json"] = run_dir / "report.md", run_dir / "report.json"
    written["markdown"].write_text(markdown_page(report, figures))
    written["json"].write_text(json.dumps(json_page(report), indent=1, allow_nan=False) + "\n")
    return written


def _rich_table(report: Report, metrics: list[str]) -> RichTable:
    head, body = _grid(report, metrics, line_break="\n")
    table = RichTable(
        title=report.title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left"
    )
    for i, name in enumerate(head):
        table.add_column(
            name, justify="left" if i < 2 else "right", no_wrap=True, style="dim" if name == "paper" else ""
        )
    for row, cells in zip(report.rows, body):
        table.add_row(*cells, style="red" if row.num_failed and not row.seeds_done else "")
    return table


def _grid(report: Report, metrics: list[str], line_break: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a metric that the paper has is followed by the paper's value."""
    with_paper = {m for row in report.rows for m in row.paper}
    head = ["row", "seeds"]
    for metric in metrics:
        head.append(label_of(metric).replace(" ", line_break))
        if metric in with_paper:
            head.append("paper")
    head.append("seconds")
    body = []
    for row in report.rows:
        cells = [row.name, row.seeds_text]
        for metric in metrics:
            cells.append(_cell_text(row, metric))
            if metric in with_paper:
                cells.append(_number(metric, row.paper[metric]) if metric in row.paper else "")
        cells.append(f"{row.seconds:.0f}" if row.seconds is not None else "")
        body.append(cells)
    return head, body


def _stage_grid(report: Report) -> tuple[list[str], list[list[str]]]:
    """Unique stages, those of one name that the same rows use (one per seed, or per model evaluated) on one line."""
    groups: dict[tuple[str, tuple[str, ...]], list[StageSummary]] = {}
    for stage in report.stages:
        groups.setdefault((stage.name, stage.rows), []).append(stage)
    num_rows = sum(bool(row.num_seeds) for row in report.rows)
    body = []
    for (name, rows), stages in groups.items():
        speeds = [s.images_per_s for s in stages if s.images_per_s]
        steps = sum(s.steps for s in stages)
        body.append(
            [
                name,
                "all" if len(rows) == num_rows > 1 else ", ".join(rows),
                str(len(stages)),
                str(sum(s.was_stored for s in stages)),
                f"{steps:,}" if steps else "",
                f"{sum(s.seconds for s in stages):.0f}",
                f"{fmean(speeds):.0f}" if speeds else "",
            ]
        )
    return ["stage", "rows", "unique", "of them stored before", "steps", "seconds", "images/s"], body


def _cell_text(row: RowSummary, metric: str) -> str:
    cell: Cell | None = row.cells.get(metric)
    if cell is None:
        return ""
    spread = f" ±{_number(metric, cell.sd)}" if cell.sd is not None else ""
    return _number(metric, cell.mean) + spread


def _number(metric: str, value: float) -> str:
    return f"{value:.1f}" if metric.endswith(("ap", "ap50")) else f"{value:.2f}"


def _difference_text(difference: Difference, report: Report) -> str:
    def signed(value: float) -> str:
        return ("+" if value >= 0 else "-") + _number(report.metric, abs(value))

    mean, low, high = difference.mean, difference.low, difference.high
    text = f"{difference.row} against {report.baseline}: {signed(mean)} {label_of(report.metric)}"
    if low is None or high is None:
        return f"{text} (1 seed)"
    verdict = "" if low > 0 or high < 0 else ": not distinguishable from seed noise"
    return f"{text}, 95 % interval {signed(low)} to {signed(high)} ({difference.num_seeds} seeds){verdict}"


def _failure_text(failure: Failure) -> str:
    log = f" (log: {failure.log})" if failure.log else ""
    return f"{failure.row}, seed {failure.seed}: {failure.reason}{log}"


def _markdown_rows(head: list[str], body: list[list[str]]) -> list[str]:
    rule = ["---" if i < 2 else "---:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
