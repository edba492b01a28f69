"""Figures of a report as plain data: what is drawn, not how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np

from cast_ray.contracts.label_audit import LabelAudit
from cast_ray.contracts.row_result import CurvePoint, is_finite
from cast_ray.report.blocks import Figure, Panel, Series
from cast_ray.report.content import Cell, Interval, Report, Result
from cast_ray.report.metrics import is_ap, label_of, split_metric

SHARED = "shared by rows"
CurvesOf = Callable[[Result], Mapping[str, Sequence[CurvePoint]]]
"""Which curves of a result are drawn: its losses or its diagnostics."""
MAX_ROWS = 12
"""More lines than that cannot be told apart."""
MAX_POINTS = 200
MAX_INTERVALS = 40
MAX_CLASSES = 25
"""Most classes that are drawn; of more, those with most objects."""
NOT_AN_AXIS = ("preset", "scale", "runtime")


def learning_curves(report: Report) -> Figure | None:
    """Loss of each training stage over its steps, and the validation AP where a stage measured it."""
    stages = dict.fromkeys(s for r in report.results for s, points in r.curves.items() if points)
    panels = []
    for stage in stages:
        points = [p for r in report.results for p in r.curves.get(stage, ())]
        keys = dict.fromkeys(k for p in points for k in p if k == "loss" or k.startswith("val/"))
        for key in keys:
            title = f"{stage}: loss" if key == "loss" else f"{stage}: validation {label_of(key.removeprefix('val/'))}"
            panels.append(_curve_panel(report, attrgetter("curves"), stage, key, title))
    return _figure(
        "curves",
        "Each stage's loss over its steps. A loss sums a row's own terms, so compare shapes, not heights",
        panels,
    )


def margin_curves(report: Report) -> Figure | None:
    """Empirical margin, false-negative rate and raw loss of the pixel contrast while the student learns.

    Source: paper, Fig. 3 (there p = 1 - FNR).
    """
    panels = [
        _curve_panel(report, attrgetter("diagnostics"), "distill", key, title)
        for key, title in (
            ("margin", "margin: mean positive - mean negative cosine"),
            ("fnr", "FNR: negatives of the anchor's own instance"),
            ("raw_loss", "pixel contrast before its weight"),
        )
    ]
    return _figure("margins", "Margin and false negatives of the pixel contrast", panels)


def comparison(report: Report) -> Figure | None:
    """Each row's ranking metric, and its difference to the baseline, with 95 % intervals."""
    metric = report.metric
    cells = {row.name: row.cells[metric] for row in report.rows if metric in row.cells}
    differences = report.differences_in(metric)
    if len(cells) < 2:
        return None
    rows = list(cells)[:MAX_INTERVALS]
    values = {row: (cells[row].mean, cells[row].interval) for row in rows}
    panels = [Panel(label_of(metric), "", _measured(values), kind="intervals", names=tuple(rows))]
    compared = {row: differences[row] for row in rows if row in differences}
    if compared:
        series = _measured({row: (d.mean, d.interval) for row, d in compared.items()})
        paper = {row: d.paper for row, d in compared.items() if d.paper is not None}
        if paper:
            series = (*series, _published("paper", tuple(paper), tuple(paper.values())))
        title = f"{label_of(metric)}: difference to {report.baseline}"
        panels.append(Panel(title, "", series, kind="intervals", names=tuple(compared), zero_line=True))
    caption = f"{label_of(metric)} of the rows, with 95 % intervals"
    if report.has_one_seed:
        caption += " of resampled images alone, which say nothing about other seeds"
    if len(cells) > len(rows):
        caption += f"; the first {len(rows)} of {len(cells)} rows"
    return _figure("comparison", caption, panels)


def compute_bars(report: Report) -> Figure | None:
    """What sharing stages saves, in training steps and in device-hours."""
    panels = []
    of_devices = [
        ("device-hours" if len(report.device_hours) == 1 else f"device-hours of {device}", compute)
        for device, compute in report.device_hours.items()
    ]
    for title, compute in (("training steps", report.steps), *of_devices):
        if compute.scratch:
            names = ("each row from scratch", "each stage once")
            bars = (
                Series(names[0], names[:1], (compute.scratch,), colour="shared"),
                Series(names[1], names[1:], (compute.unique,)),
            )
            panels.append(Panel(title, "", bars, kind="bars", names=names))
    return _figure("compute", "Compute with and without sharing", panels)


def audit_curves(report: Report) -> Figure | None:
    """How far the scores of pseudo-labels can be trusted, and their precision and recall by class."""
    audits = _last_audits(report)
    if not audits:
        return None
    lines = [Series("as sure as right", (0.0, 1.0), (0.0, 1.0), colour="shared", is_dashed=True)]
    panels: list[Panel] = []
    for i, (rows, audit) in enumerate(audits.items()):
        points = audit.calibration
        known = [(s, p) for s, p in zip(points.score, points.precision) if s is not None and p is not None]
        if known:
            x, y = zip(*known)
            lines.append(Series(rows, x, y, colour=i, has_markers=True))
    panels.append(Panel("reliability of pseudo-labels", "score", tuple(lines), y_label="share that is right"))
    counts: dict[str, int] = {}
    for audit in audits.values():
        for name, rates in audit.per_class.items():
            counts[name] = max(counts.get(name, 0), rates.num_objects)
    names = tuple(sorted(counts, key=lambda name: -counts[name])[:MAX_CLASSES])
    for key, value_of in (("precision", attrgetter("precision")), ("recall", attrgetter("recall"))):
        series = []
        for i, (rows, audit) in enumerate(audits.items()):
            values = {n: value_of(audit.per_class[n]) for n in names if n in audit.per_class}
            there = {name: value for name, value in values.items() if value is not None}
            if there:
                series.append(Series(rows, tuple(there), tuple(there.values()), colour=i, has_markers=True))
        if series:
            panels.append(Panel(f"{key} by class (%)", "", tuple(series), kind="intervals", names=names))
    return _figure("pseudo_labels", "Pseudo-labels against the hidden ground truth", panels)


def _last_audits(report: Report) -> dict[str, LabelAudit]:
    """Rows that share it -> audit of each row's last labelling stage, of its first seed."""
    shared: dict[Any, tuple[dict[str, None], LabelAudit]] = {}
    seen: set[str] = set()
    for i, result in enumerate(report.results):
        if not result.pseudo_labels or result.row in seen:
            continue
        seen.add(result.row)
        name = list(result.pseudo_labels)[-1]
        stage = result.stage(name)
        rows, _ = shared.setdefault(stage.fingerprint if stage else i, ({}, result.pseudo_labels[name]))
        rows[result.row] = None
    chosen = list(shared.values())[:MAX_ROWS]
    return {" & ".join(rows) if len(rows) < 3 else SHARED: audit for rows, audit in chosen}


@dataclass(frozen=True)
class Axis:
    """A recipe key that rows differ in by number: each row's value, and lines of rows that differ in nothing else."""

    key: str
    values: Mapping[str, float]
    lines: Mapping[str, Sequence[str]]

    @property
    def label(self) -> str:
        return "labelled images (%)" if self.is_fraction else self.key.removeprefix("data.")

    @property
    def is_fraction(self) -> bool:
        return self.key == "data.label_fraction"

    def x(self, row: str) -> float:
        return self.scale(self.values[row])

    def scale(self, value: float) -> float:
        return 100 * value if self.is_fraction else value


def axis_of(report: Report) -> Axis | None:
    """The number that a table's rows sweep over (label fraction, lambda_pxl, images, ...); None where there is none."""
    recipes = {r.row: _flat(r.recipe) for r in reversed(report.results) if r.recipe}
    recipes = {row.name: recipes[row.name] for row in report.rows if row.name in recipes}
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    varied = {key: [recipe.get(key) for recipe in recipes.values()] for key in keys}
    varied = {key: values for key, values in varied.items() if len({repr(v) for v in values}) > 1}
    numeric = [
        key
        for key, values in varied.items()
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values) and len(set(values)) > 2
    ]
    if not numeric:
        return None
    key = max(numeric, key=lambda k: (k == "data.label_fraction", len(set(varied[k]))))
    values = {row: float(recipe[key]) for row, recipe in recipes.items()}
    others = [k for k in varied if k not in numeric] or [k for k in varied if k != key]
    lines: dict[str, list[str]] = {}
    if len(set(values.values())) == len(values):
        lines[""] = list(values)
    else:
        for row, recipe in recipes.items():
            lines.setdefault(", ".join(f"{k.rpartition('.')[2]} {recipe.get(k)}" for k in others), []).append(row)
    if max(map(len, lines.values())) < 3:
        return None
    return Axis(key, values, {_common_name(rows) or name: rows for name, rows in lines.items()})


def _common_name(rows: Sequence[str]) -> str:
    """What all names of a line's rows say: `supervised` of `5 %, supervised` and `10 %, supervised`."""
    parts = [row.split(", ") for row in rows]
    return ", ".join(part for part in parts[0] if all(part in each for each in parts)) if len(rows) > 1 else rows[0]


def axis_curves(report: Report, axis: Axis) -> Figure | None:
    """Metrics over the number that rows sweep, with a band of one standard deviation, and the paper's curves."""
    panels = []
    for metric in report.metrics:
        if is_ap(metric) and split_metric(metric)[1] != "mask_ap":
            continue
        lines = [
            _axis_series(report, axis, name or "measured", metric, rows, i)
            for i, (name, rows) in enumerate(axis.lines.items())
        ]
        there = [line for line in lines if line is not None]
        if there:
            with_rivals = axis.is_fraction and metric == report.metric
            paper = _paper_series(report, axis, metric, len(axis.lines) if with_rivals else None)
            xs = [x for line in (*there, *paper) for x in line.x]
            is_log = min(xs) > 0 and max(xs) / min(xs) >= 20
            panels.append(Panel(label_of(metric), axis.label, (*there, *paper), is_log=is_log))
    caption = f"Along {axis.label}; band: one standard deviation over seeds"
    if any(series.is_dashed for panel in panels for series in panel.series):
        caption += f"; dashed: published{f' ({report.paper_dataset})' if report.paper_dataset else ''}"
    return _figure("axis", caption, panels)


def _axis_series(report: Report, axis: Axis, name: str, metric: str, rows: Sequence[str], colour: int) -> Series | None:
    cells = {row.name: row.cells[metric] for row in report.rows if row.name in rows and metric in row.cells}
    points: list[tuple[float, Cell]] = sorted(((axis.x(row), cell) for row, cell in cells.items()), key=lambda p: p[0])
    if not points:
        return None
    spread = [cell.sd or 0.0 for _, cell in points]
    values = [cell.mean for _, cell in points]
    band = any(spread)
    return Series(
        name,
        tuple(x for x, _ in points),
        tuple(values),
        low=tuple(v - s for v, s in zip(values, spread)) if band else (),
        high=tuple(v + s for v, s in zip(values, spread)) if band else (),
        colour=colour,
        has_markers=True,
    )


def _paper_series(report: Report, axis: Axis, metric: str, first_rival: int | None) -> list[Series]:
    """The paper's curve over the same axis; `first_rival`: colour from which those of other methods are drawn too."""
    series = []
    for name, points in report.paper_curves.items():
        is_rival = "/" not in name  # columns beside a metric of ours are called by it
        if name != metric and not (is_rival and first_rival is not None):
            continue
        x, y = zip(*sorted((axis.scale(x), y) for x, y in points.items()))
        label = f"paper: {name.replace('_', ' ')}" if is_rival else "paper"
        colour: int | Literal["paper"] = "paper"
        if is_rival and first_rival is not None:
            colour = first_rival
            first_rival += 1
        series.append(_published(label, x, y, colour, is_dashed=True))
    return series


def _published(
    name: str,
    x: tuple[Any, ...],
    y: tuple[float, ...],
    colour: int | Literal["paper"] = "paper",
    is_dashed: bool = False,
) -> Series:
    return Series(name, x, y, colour=colour, is_dashed=is_dashed, has_markers=True, is_published=True)


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if (not prefix and key in NOT_AN_AXIS) or key.endswith("seed"):
            continue
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _measured(values: Mapping[str, tuple[float, Interval | None]]) -> tuple[Series, ...]:
    """Draws points with their intervals. Those of a single seed, whose intervals are of the images alone, look
    different."""
    series = []
    for name, is_alone in (("measured", False), ("measured, 1 seed: interval of the images alone", True)):
        chosen = {r: v for r, v in values.items() if (v[1] is not None and v[1].resampled == "images") == is_alone}
        if chosen:
            lows = tuple(interval.low if interval else mean for mean, interval in chosen.values())
            highs = tuple(interval.high if interval else mean for mean, interval in chosen.values())
            means = tuple(mean for mean, _ in chosen.values())
            series.append(Series(name, tuple(chosen), means, lows, highs, is_dashed=is_alone, has_markers=True))
    return tuple(series)


def _curve_panel(report: Report, curves_of: CurvesOf, stage: str, key: str, title: str) -> Panel | None:
    names = [row.name for row in report.rows][:MAX_ROWS]
    series = []
    for rows, runs in _runs(report.results, curves_of, stage, key).items():
        shown = [row for row in rows if row in names]
        if not shown:
            continue
        is_shared = len(rows) > 2
        name = SHARED if is_shared else " & ".join(rows)
        colour: int | Literal["shared"] = "shared" if is_shared else names.index(shown[0])
        series += [
            Series(name, x, y, low, high, colour, is_dashed=len(rows) == 2, has_markers=len(x) < 12)
            for x, y, low, high in _over_seeds(runs)
        ]
    return Panel(title, "step", tuple(series)) if series else None


def _runs(
    results: Sequence[Result], curves_of: CurvesOf, stage: str, key: str
) -> dict[tuple[str, ...], list[tuple[list[int], list[float]]]]:
    """(rows that shared them) -> (steps, values) of each run of a stage, one per seed; shared runs once."""
    by_print: dict[Any, tuple[dict[str, None], list[dict[str, Any]]]] = {}
    for i, result in enumerate(results):
        points = [p for p in curves_of(result).get(stage, ()) if is_finite(p.get(key))]
        if points:
            record = result.stage(stage)
            rows, _ = by_print.setdefault(record.fingerprint if record else i, ({}, points))
            rows[result.row] = None
    runs: dict[tuple[str, ...], list[tuple[list[int], list[float]]]] = {}
    for rows, points in by_print.values():
        runs.setdefault(tuple(rows), []).append(([p["step"] for p in points], [p[key] for p in points]))
    return runs


def _over_seeds(
    runs: Sequence[tuple[list[int], list[float]]],
) -> Iterator[tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]]:
    """(steps, mean, lowest, highest) of runs that were logged at the same steps; of others each by itself."""
    if len({tuple(steps) for steps, _ in runs}) > 1:
        for run in runs:
            yield from _over_seeds([run])
        return
    steps, values_SN = np.array(runs[0][0]), np.array([values for _, values in runs], float)
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    values_SN = values_SN[:, chosen]
    band = (values_SN.min(0), values_SN.max(0)) if len(runs) > 1 else ((), ())
    yield tuple(steps[chosen].tolist()), tuple(values_SN.mean(0).tolist()), tuple(band[0]), tuple(band[1])


def _figure(name: str, caption: str, panels: Sequence[Panel | None]) -> Figure | None:
    there = tuple(panel for panel in panels if panel is not None)
    if any(series.low and panel.x_label == "step" for panel in there for series in panel.series):
        caption += "; line: mean over seeds, band: lowest to highest"
    return Figure(name, caption, there) if there else None
