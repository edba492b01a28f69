"""The tables of a report as text, and the one that fits a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from cast_ray.contracts.row_result import DatasetFacts
from cast_ray.report.blocks import Column, Grid
from cast_ray.report.content import Difference, Report, Result, RowSummary, StageSummary
from cast_ray.report.metrics import (
    MEASURES,
    PER_CLASS,
    ROLES,
    format_signed,
    format_spread,
    format_value,
    is_lower_better,
    label_of,
    paper_label,
    split_metric,
)
from cast_ray.report.notes import failure_text, status_text

TERMINAL_COLUMNS = 100
MAX_TERMINAL_ROWS = 60
# Left out of the terminal first when the table gets too wide; the files always have all.
DISPENSABLE = (
    "refined/ap50",
    "teacher/ap50",
    "student/ap50",
    "seconds",
    "refined/mask_ap",
    "teacher/mask_ap paper",
    "student/mask_ap",
    "teacher/mask_ap",
)
MIN_ROW_NAME = 16


def main_grid(report: Report) -> Grid:
    """Every main metric of every row, the paper's value beside those that it has."""
    keys = _main_keys(report)
    return Grid(
        "Mean over seeds ± standard deviation",
        tuple(Column(_heading(key, report), is_number=key not in ("row", "seeds")) for key in keys),
        tuple(tuple(_cell(key, row, report) for key in keys) for row in report.rows),
        tuple(row.name for row in report.rows),
        tuple("failed" if row.has_failed else "" for row in report.rows),
    )


def comparison_grid(report: Report, metric: str) -> Grid | None:
    """One metric against the baseline: paper, measured, differences, 95 % interval, seeds."""
    differences = report.differences_in(metric)
    if not any(metric in row.cells for row in report.rows) or len(report.rows) < 2:
        return None
    paper = {row.name: row.paper[metric] for row in report.rows if metric in row.paper}
    base = paper.get(report.baseline)
    columns = [Column("row", False), Column("seeds", False), Column("measured")]
    columns += [Column(f"difference to {report.baseline}"), Column("95 % interval", False)]
    columns += [Column(paper_label(metric, report.paper_metric)), Column("paper's difference")] if paper else []
    body, marks = [], []
    for row in report.rows:
        difference, cell = differences.get(row.name), row.cells.get(metric)
        line = [row.name, row.seeds_text, format_spread(metric, cell.mean, cell.sd) if cell else ""]
        line += [difference_text(difference, row, report), interval_text(difference)]
        if paper:
            value = paper.get(row.name)
            line += [format_value(metric, value) if value is not None else ""]
            line += [format_signed(metric, value - base) if value is not None and base not in (None, value) else ""]
        body.append(tuple(line))
        marks.append("failed" if row.has_failed else verdict_of(difference))
    caption = f"{label_of(metric)} against {report.baseline}, paired by seed and image"
    return Grid(caption, tuple(columns), tuple(body), tuple(row.name for row in report.rows), tuple(marks))


def pairs_grid(report: Report) -> Grid | None:
    """Every row against every other in the ranking metric, with intervals."""
    if not report.pairs:
        return None
    by_pair = {(d.row, d.against): d for d in report.pairs}
    names = list(dict.fromkeys(d.row for d in report.pairs))

    def cell(row: str, against: str) -> str:
        difference = by_pair.get((row, against))
        interval = interval_text(difference)
        if difference is None:
            return ""
        return format_signed(report.metric, difference.mean) + (f" ({interval})" if interval else "")

    columns = (Column("row", False), *(Column(f"against {name}", False) for name in names))
    body = tuple((row, *(cell(row, against) for against in names)) for row in names)
    return Grid(f"{label_of(report.metric)}: every row against every other", columns, body, tuple(names))


def verdict_of(difference: Difference | None) -> str:
    """`better`, `worse` or `noise`: what an interval lets one say; empty where there is none."""
    if difference is None or difference.interval is None:
        return ""
    if not difference.is_clear:
        return "noise"
    return "better" if (difference.mean > 0) != is_lower_better(difference.metric) else "worse"


def difference_text(difference: Difference | None, row: RowSummary, report: Report) -> str:
    if difference is None:
        return "baseline" if row.name == report.baseline and row.seeds_done else ""
    return format_signed(difference.metric, difference.mean)


def interval_text(difference: Difference | None) -> str:
    """`+5.4 to +9.1`; a single seed's is marked: it is about two trained models on other images, not about rows."""
    if difference is None or difference.interval is None:
        return "same model" if difference is not None and difference.same_artifact else ""
    low, high = (format_signed(difference.metric, v) for v in (difference.interval.low, difference.interval.high))
    marked = " (these two models, other images)" if difference.interval.resampled == "images" else ""
    return f"{low} to {high}{marked}"


def measures_grid(report: Report, role: str) -> Grid | None:
    """AP, AP50, AP75, AP by size and the recalls of one of the models that rows evaluate."""
    measures = {measure: label for measure, label in MEASURES.items() if measure.startswith(("mask_ap", "ap", "ar"))}
    return _metrics_grid(
        report,
        [f"{role}/{measure}" for measure in measures],
        f"{ROLES[role]}: AP and AR at more thresholds and by size",
        [
            label_of(f"{role}/{m}").removeprefix(f"{ROLES[role]} ")
            for m in MEASURES
            if m.startswith(("mask_ap", "ap", "ar"))
        ],
    )


def classes_grid(report: Report) -> Grid | None:
    """AP of each class, of the model that rows are ranked by."""
    role = split_metric(report.metric)[0]
    prefix = f"{role}/{PER_CLASS}/"
    known = dict.fromkeys(m for row in report.rows for m in row.cells if m.startswith(prefix))
    label = ROLES.get(role, role)
    return _metrics_grid(report, list(known), f"{label}: AP of each class", [m.removeprefix(prefix) for m in known])


def other_grid(report: Report) -> Grid | None:
    """Whatever else the models were measured by (latency, size, detections), and the contrast's last diagnostics."""
    shown = {"mask_ap", "num_images", *(m for m in MEASURES if m.startswith(("ap", "ar")))}
    known = dict.fromkeys(
        metric
        for row in report.rows
        for metric in row.cells
        for role, measure in [split_metric(metric)]
        if (
            role in ROLES
            and role not in ("zero_shot", "final")
            and measure not in shown
            and not measure.startswith(PER_CLASS)
        )
        or metric in ("distill/margin", "distill/fnr")
    )
    return _metrics_grid(report, list(known), "Other measures: latency, size, last diagnostics of the pixel contrast")


def _metrics_grid(
    report: Report, metrics: Sequence[str], caption: str, names: Sequence[str] | None = None
) -> Grid | None:
    there = [(m, n) for m, n in zip(metrics, names or map(label_of, metrics)) if any(m in r.cells for r in report.rows)]
    if not there:
        return None
    rows = [row for row in report.rows if row.seeds_done]
    columns = (Column("row", False), Column("seeds", False), *(Column(name) for _, name in there))
    body = tuple((row.name, row.seeds_text, *(_value(row, metric) for metric, _ in there)) for row in rows)
    return Grid(caption, columns, body, tuple(row.name for row in rows))


def device_grid(report: Report) -> Grid | None:
    """Device-hours of each type of device, and what they cost where prices were named."""
    if not report.device_hours:
        return None
    names = ["stages", "device-hours, each row from scratch", "each stage once", "saved (%)", "run here"]
    priced = {device: price for device in report.device_hours if (price := report.prices.of(device)) is not None}
    names += ["price of an hour", "cost, each row from scratch", "cost, each stage once"] if priced else []
    body = []
    for device, hours in report.device_hours.items():
        line = [device, str(sum(stage.device == device for stage in report.stages))]
        line += [format_value("device_hours", value) for value in (hours.scratch, hours.unique)]
        line += [f"{hours.saved_percent:.0f}", format_value("device_hours", hours.ran)]
        if priced:
            price = priced.get(device)
            costs = ("", "", "") if price is None else (price, price * hours.scratch, price * hours.unique)
            line += [cost if cost == "" else f"{cost:,.2f}" for cost in costs]
        body.append(tuple(line))
    if len(priced) > 1:  # money adds up, hours of unlike devices do not
        sums = [sum(p * getattr(report.device_hours[d], n) for d, p in priced.items()) for n in ("scratch", "unique")]
        body.append(("all with a price", *[""] * 6, *(f"{total:,.2f}" for total in sums)))
    columns = (Column("device", False), *(Column(name) for name in names))
    return Grid("What computed the stages, and for how long", columns, tuple(body))


def stage_grid(report: Report) -> Grid | None:
    """Unique stages, those of one name, rows and device (one per seed, or per model evaluated) on one line."""
    groups: dict[tuple[str, tuple[str, ...], str], list[StageSummary]] = {}
    for stage in report.stages:
        groups.setdefault((stage.name, stage.rows, stage.device), []).append(stage)
    if not groups:
        return None
    num_rows = sum(bool(row.seeds_done or row.num_failed) for row in report.rows)
    names = ("unique", "found in the store", "steps", "seconds", "device-hours", "images/s")
    with_device = len({device for _, _, device in groups}) > 1
    body = []
    for (name, rows, device), stages in groups.items():
        speeds = [s.images_per_s for s in stages if s.images_per_s]
        steps, hours = sum(s.steps for s in stages), sum(s.device_hours for s in stages)
        body.append(
            (
                name,
                "all" if len(rows) == num_rows > 1 else ", ".join(rows),
                *([device] if with_device else []),
                str(len(stages)),
                str(sum(s.was_stored for s in stages)),
                f"{steps:,}" if steps else "",
                f"{sum(s.seconds for s in stages):,.0f}",
                format_value("device_hours", hours),
                f"{fmean(speeds):.0f}" if speeds else "",
            )
        )
    texts = ("stage", "used by", *(["computed on"] if with_device else []))
    columns = (*(Column(name, False) for name in texts), *(Column(name) for name in names))
    return Grid("Every stage that rows needed, once", columns, tuple(body))


def results_grid(report: Report) -> Grid | None:
    """One line a result: what it was made from, where, when, how long."""
    if not report.results:
        return None
    columns = (
        Column("row", False),
        Column("seed"),
        Column("status", False),
        Column(label_of(report.metric)),
        Column("labelled"),
        Column("unlabelled"),
        Column("wall time (s)"),
        Column("device-hours"),
        Column("started", False),
        Column("code", False),
        Column("data hash", False),
    )
    body = tuple(_result_line(result, report.metric) for result in report.results)
    marks = tuple("" if r.is_done else "failed" for r in report.results)
    return Grid("Every result", columns, body, tuple(r.row for r in report.results), marks)


def _result_line(result: Result, metric: str) -> tuple[str, ...]:
    dataset = result.dataset or DatasetFacts()
    value = result.measured.get(metric)
    return (
        result.row,
        str(result.seed),
        status_text(result),
        format_value(metric, value) if value is not None else "",
        *("" if count is None else str(count) for count in (dataset.num_labelled, dataset.num_unlabelled)),
        f"{result.seconds:,.0f}" if result.seconds is not None else "",
        _hours_text(result),
        (result.started or "")[:19].replace("T", " "),
        result.code_version or "",
        (dataset.content_hash or "")[:12],
    )


def _hours_text(result: Result) -> str:
    """Device-hours, those of unlike devices apart: `0.31 NVIDIA A10G + 0.12 NVIDIA L4`."""
    by_type = result.hours_by_type
    if len(by_type) > 1:
        return " + ".join(f"{format_value('device_hours', hours)} {device}" for device, hours in by_type.items())
    return format_value("device_hours", result.device_hours) if result.device_hours is not None else ""


def terminal_table(report: Report, width: int = TERMINAL_COLUMNS) -> RenderableType:
    """The table with its notes, for a terminal of `width` columns."""
    keys = _main_keys(report)
    if differences := report.differences_in(report.metric):
        at = keys.index(report.metric) + 1
        # An interval of images alone is no uncertainty of a row.
        has_intervals = any(d.interval for d in differences.values()) and not report.has_one_seed
        keys[at:at] = ["difference", "interval"] if has_intervals else ["difference"]
    table = _rich_table(report, keys)
    probe = Console(width=10 * width)
    for key in DISPENSABLE:
        if Measurement.get(probe, probe.options, table).maximum <= width:
            break
        if key in keys and key != report.metric:
            keys = [k for k in keys if k not in (key, f"{key} paper")]
            table = _rich_table(report, keys)
    lines: list[RenderableType] = [table]
    if len(report.rows) > MAX_TERMINAL_ROWS:
        lines.append(Text(f"{len(report.rows) - MAX_TERMINAL_ROWS} more rows: see the report", style="dim"))
    lines.append("")
    lines += [Text(f"FAILED  {text}", style="bold red") for text in failure_text(report)]
    lines += [Text(note) for note in report.notes]
    return Group(*lines)


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the table and its notes."""
    console = console or Console()
    width = min(console.width, TERMINAL_COLUMNS)
    console.print(terminal_table(report, width), width=width)


def _rich_table(report: Report, keys: Sequence[str]) -> RichTable:
    table = RichTable(
        title=Text(report.title), box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left"
    )
    for key in keys:
        heading = _heading(key, report)
        if key not in ("row", "interval"):
            heading = heading.replace(" ", "\n", -1 if key.endswith(" paper") else 1)
        table.add_column(
            Text(heading),
            justify="left" if key in ("row", "seeds") else "right",
            no_wrap=key != "row",
            overflow="fold",
            min_width=min(MIN_ROW_NAME, max(len(row.name) for row in report.rows)) if key == "row" else None,
            style="dim" if key.endswith(" paper") else "",
        )
    for row in report.rows[:MAX_TERMINAL_ROWS]:
        table.add_row(*(Text(_cell(key, row, report)) for key in keys), style="red" if row.has_failed else "")
    return table


def _main_keys(report: Report) -> list[str]:
    with_paper = {m for row in report.rows for m in row.paper}
    keys = ["row", "seeds"]
    for metric in report.metrics:
        keys += [metric, f"{metric} paper"] if metric in with_paper else [metric]
    return [*keys, "seconds"]


def _heading(key: str, report: Report) -> str:
    fixed = {"row": "row", "seeds": "seeds", "seconds": "wall time (s)", "interval": "95 % interval"}
    if key == "difference":
        return f"to {report.baseline}" if len(report.baseline) < 10 else "difference"
    if key.endswith(" paper"):
        return paper_label(key.removesuffix(" paper"), report.paper_metric)
    return fixed.get(key) or label_of(key)


def _cell(key: str, row: RowSummary, report: Report) -> str:
    if key == "row":
        return row.name
    if key == "seeds":
        return row.seeds_text
    if key == "seconds":
        return f"{row.seconds:,.0f}" if row.seconds is not None else ""
    difference = report.differences_in(report.metric).get(row.name) if key in ("difference", "interval") else None
    if key == "difference":
        return difference_text(difference, row, report)
    if key == "interval":
        is_of_images = difference is not None and difference.interval and difference.interval.resampled == "images"
        return "" if is_of_images else interval_text(difference)
    metric = key.removesuffix(" paper")
    if metric != key:
        return format_value(metric, row.paper[metric]) if metric in row.paper else ""
    return _value(row, metric)


def _value(row: RowSummary, metric: str) -> str:
    cell = row.cells.get(metric)
    return format_spread(metric, cell.mean, cell.sd) if cell else ""
