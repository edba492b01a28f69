"""From `result.json` files to what a report says: means over seeds, differences, failures, compute saved.

Everything a report shows comes from the files of one run folder (`<table>__<row>__s<seed>/result.json`) and the table's
YAML, so that it can be rebuilt on any machine, without Ray, after the cluster is gone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from cast_ray.stages.table import Table, load_table

Result = dict[str, Any]

METRIC_LABELS = {
    "teacher/mask_ap": "teacher AP",
    "teacher/ap50": "teacher AP50",
    "student/mask_ap": "student AP",
    "student/ap50": "student AP50",
    "refined/mask_ap": "refined AP",
    "refined/ap50": "refined AP50",
    "distill/margin": "margin",
    "distill/fnr": "FNR",
}
NEAR_ZERO_AP = 1.0
DATASET_COUNTS = {"num_labelled": "labelled", "num_unlabelled": "unlabelled", "num_val": "validation"}


@dataclass(frozen=True)
class Cell:
    """One metric of one row: mean over the finished seeds, sample standard deviation from two seeds on."""

    mean: float
    sd: float | None
    num_seeds: int


@dataclass(frozen=True)
class Difference:
    """A row minus the baseline row, paired by seed; the 95 % interval (Student's t) needs two seeds."""

    row: str
    mean: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Failure:
    row: str
    seed: int
    reason: str
    log: str | None


@dataclass(frozen=True)
class RowSummary:
    """One row of the table. `seconds`: mean wall time, waiting for shared stages included; None: nothing finished."""

    name: str
    seeds_done: tuple[int, ...]
    num_failed: int
    cells: Mapping[str, Cell]
    paper: Mapping[str, float]
    seconds: float | None
    device_hours: float

    @property
    def num_seeds(self) -> int:
        return len(self.seeds_done) + self.num_failed

    @property
    def seeds_text(self) -> str:
        """`1 seed`, `3 seeds`, `2 of 3 seeds` or `not run`."""
        if not self.num_seeds:
            return "not run"
        done = f"{len(self.seeds_done)} of " if self.num_failed else ""
        return f"{done}{self.num_seeds} seed{'s' if self.num_seeds > 1 else ''}"


@dataclass(frozen=True)
class StageSummary:
    """One unique stage (by fingerprint) and the rows and seeds that used it. `was_stored`: none of them ran it."""

    name: str
    kind: str
    fingerprint: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    seconds: float
    images_per_s: float | None
    was_stored: bool


@dataclass(frozen=True)
class Report:
    """All that the renderers print."""

    table: str
    title: str
    metric: str
    baseline: str
    metrics: tuple[str, ...]
    rows: tuple[RowSummary, ...]
    differences: tuple[Difference, ...]
    failures: tuple[Failure, ...]
    stages: tuple[StageSummary, ...]
    steps_unique: int
    steps_from_scratch: int
    zero_shot: Mapping[str, float]
    paper_dataset: str
    context: Mapping[str, str]
    notes: tuple[str, ...]
    results: tuple[Result, ...] = field(repr=False, default=())


def read_results(run_dir: str | Path) -> list[Result]:
    """The results of one run folder, in the order in which they were started.

    Raises:
        ValueError: no result in the folder, or a file that is not a result (the message names it and the missing key).
    """
    paths = sorted(Path(run_dir).glob("*/result.json"))
    if not paths:
        raise ValueError(f"{run_dir}: expected <table>__<row>__s<seed>/result.json files, found none")
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from None
        missing = [key for key in ("table", "row", "seed", "status") if key not in result]
        if missing:
            raise ValueError(f"{path}: not a result: no {', '.join(missing)}")
        results.append(_with_final_diagnostics(result))
    return sorted(results, key=lambda r: (r.get("started") or "", r["seed"]))


def summarise(results: Sequence[Result], table: Table | None = None) -> Report:
    """Everything the report of some results says.

    Args:
        results: as from `read_results`, all of one table.
        table: title, order of rows, baseline and paper values; None: the table that the results name, if it is one of
            `sweeps/tables`, else the rows in the order they come with the first as baseline.

    Raises:
        ValueError: results of more than one table.
    """
    names = sorted({r["table"] for r in results})
    if len(names) != 1:
        raise ValueError(f"expected the results of one table, got {', '.join(names) or 'none'}")
    if table is None:
        table = _table_of(names[0])
    found = list(dict.fromkeys(r["row"] for r in results))
    order = [*table.rows, *(row for row in found if row not in table.rows)] if table else found
    results = sorted(results, key=lambda r: (order.index(r["row"]), r["seed"]))
    paper = table.paper_values() if table else {}
    metric = table.metric if table else "student/mask_ap"
    baseline = table.baseline if table else order[0]

    rows = tuple(_summarise_row(row, [r for r in results if r["row"] == row], paper) for row in order)
    extra = [
        m for m in (metric, *paper) if m not in METRIC_LABELS or not m.startswith(("teacher", "student", "refined"))
    ]
    shown = [m for m in METRIC_LABELS if m.startswith(("teacher", "student", "refined"))] + list(dict.fromkeys(extra))
    metrics = tuple(m for m in shown if any(m in row.cells for row in rows))
    failures = tuple(
        Failure(r["row"], r["seed"], _one_line(r.get("error")), r.get("log")) for r in results if not _is_done(r)
    )
    stages = _unique_stages(results)
    zero_shot = _agreed_metrics(results, "zero_shot/")
    report = Report(
        table=names[0],
        title=table.title if table else names[0],
        metric=metric,
        baseline=baseline,
        metrics=metrics,
        rows=rows,
        differences=_differences(results, order, baseline, metric),
        failures=failures,
        stages=stages,
        steps_unique=sum(s.steps for s in stages if s.kind == "train"),
        steps_from_scratch=sum(
            s.get("steps") or 0 for r in results for s in r.get("stages", []) if s["kind"] == "train"
        ),
        zero_shot=zero_shot,
        paper_dataset=table.paper_dataset() if table else "",
        context=_context(results),
        notes=(),
        results=tuple(results),
    )
    return Report(**{**report.__dict__, "notes": tuple(_notes(report))})


def label_of(metric: str) -> str:
    """How a metric is called in a heading."""
    return METRIC_LABELS.get(metric, metric)


def _table_of(name: str) -> Table | None:
    try:
        return load_table(name)
    except ValueError:  # a table of the user's own, whose file may be gone
        return None


def _is_done(result: Result) -> bool:
    return result["status"] == "done"


def _one_line(text: str | None) -> str:
    """The telling line of an error: the last one of a traceback."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason recorded"


def _with_final_diagnostics(result: Result) -> Result:
    """Adds the last diagnostics of a stage to the metrics: `distill/margin`, `distill/fnr`."""
    metrics = dict(result.get("metrics") or {})
    for stage, points in (result.get("diagnostics") or {}).items():
        for point in reversed(points):  # not each point has each key: FNR needs labelled pixels among the anchors
            for key, value in point.items():
                if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                    metrics.setdefault(f"{stage}/{key}", value)
    return {**result, "metrics": metrics}


def _value(result: Result, metric: str) -> float | None:
    value = result["metrics"].get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _summarise_row(row: str, results: Sequence[Result], paper: Mapping[str, Mapping[str, float]]) -> RowSummary:
    done = [r for r in results if _is_done(r)]
    cells = {}
    for metric in dict.fromkeys(m for r in done for m in r["metrics"]):
        values = [v for r in done if (v := _value(r, metric)) is not None]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else None
            cells[metric] = Cell(statistics.fmean(values), sd, len(values))
    seconds = [r["seconds"] for r in done if r.get("seconds") is not None]
    return RowSummary(
        name=row,
        seeds_done=tuple(sorted(r["seed"] for r in done)),
        num_failed=len(results) - len(done),
        cells=cells,
        paper={metric: values[row] for metric, values in paper.items() if row in values},
        seconds=statistics.fmean(seconds) if seconds else None,
        device_hours=sum(r.get("device_hours") or 0.0 for r in results),
    )


def _differences(results: Sequence[Result], order: Sequence[str], baseline: str, metric: str) -> tuple[Difference, ...]:
    values = {(r["row"], r["seed"]): v for r in results if _is_done(r) for v in [_value(r, metric)] if v is not None}
    differences = []
    for row in order:
        pairs = [
            v - values[baseline, seed]
            for (name, seed), v in values.items()
            if name == row and (baseline, seed) in values
        ]
        if row == baseline or not pairs:
            continue
        mean, low, high = statistics.fmean(pairs), None, None
        if len(pairs) > 1:
            half = float(stats.t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
            low, high = mean - half, mean + half
        differences.append(Difference(row, mean, low, high, len(pairs)))
    return tuple(differences)


def _unique_stages(results: Sequence[Result]) -> tuple[StageSummary, ...]:
    users: dict[str, list[tuple[Result, dict[str, Any]]]] = {}
    for result in results:
        for stage in result.get("stages") or []:
            users.setdefault(stage["fingerprint"], []).append((result, stage))
    summaries = []
    for fingerprint, entries in users.items():
        # the row that ran it knows how long it took; a row that reused it waited or copied numbers
        ran = next((s for _, s in entries if not s.get("reused")), entries[0][1])
        summaries.append(
            StageSummary(
                name=ran["name"],
                kind=ran["kind"],
                fingerprint=fingerprint,
                rows=tuple(dict.fromkeys(r["row"] for r, _ in entries)),
                seeds=tuple(sorted({r["seed"] for r, _ in entries})),
                steps=max(s.get("steps") or 0 for _, s in entries),
                seconds=float(ran.get("seconds") or 0.0),
                images_per_s=ran.get("images_per_s"),
                was_stored=all(s.get("reused") for _, s in entries),
            )
        )
    return tuple(summaries)


def _agreed_metrics(results: Sequence[Result], prefix: str) -> dict[str, float]:
    """Metrics under a prefix, averaged over the finished results (the zero-shot teacher is the same in all rows)."""
    done = [r for r in results if _is_done(r)]
    names = sorted({m for r in done for m in r["metrics"] if m.startswith(prefix)})
    values = {m: [v for r in done if (v := _value(r, m)) is not None] for m in names}
    return {m: statistics.fmean(v) for m, v in values.items() if v}


def _context(results: Sequence[Result]) -> dict[str, str]:
    """What was run, where and when, in words."""
    context: dict[str, str] = {}
    first = results[0]
    if commands := {r["command"] for r in results if r.get("command")}:
        context["command"] = "; ".join(sorted(commands))
    if starts := sorted(r["started"] for r in results if r.get("started")):
        context["started"] = starts[0]
    if hardware := first.get("hardware"):
        gpu = hardware.get("gpu") or "no GPU"
        context["machine"] = (
            f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('num_cpus', '?')} CPUs, {gpu}, "
            f"{hardware.get('memory_gb', 0):.0f} GB memory"
        )
    if versions := {str(r["code_version"]) for r in results if r.get("code_version")}:
        context["code"] = ", ".join(sorted(versions))
    if recipe := first.get("recipe"):
        context["recipe"] = f"preset {recipe.get('preset')}, scale {recipe.get('scale')}"
    if data := first.get("dataset"):
        context["dataset"] = (
            ", ".join(f"{data[key]} {what}" for key, what in DATASET_COUNTS.items() if data.get(key) is not None)
            + f" images, {len(data['classes'])} classes"
            + (f", {data['skipped']} unusable skipped" if data.get("skipped") else "")
        )
    return context


def _notes(report: Report) -> list[str]:
    """What a reader must know before believing the table, in plain words."""
    notes = []
    done = [row for row in report.rows if row.seeds_done]
    aps = [cell.mean for row in done for name, cell in row.cells.items() if name.endswith("/mask_ap")]
    if aps and max(aps) < NEAR_ZERO_AP:
        steps = max(sum(s.get("steps") or 0 for s in r.get("stages") or []) for r in report.results)
        notes.append(
            f"AP near 0: {steps:,} training steps are too few to learn; this run only proves that the path works."
        )
    most = max((len(row.seeds_done) for row in done), default=0)
    if most == 1 and len(done) > 1:
        notes.append("1 seed per row: differences below are single runs and may be seed noise.")
    elif most == 1:
        notes.append("1 seed: a single run, whose seed noise is unknown.")
    elif most > 1:
        notes.append(
            f"Up to {most} seeds per row: mean ± standard deviation over seeds; differences are paired by seed."
        )
    if any(row.paper for row in report.rows):
        where = f" ({report.paper_dataset})" if report.paper_dataset else ""
        notes.append(f"The paper's values{where} are single runs on other data and models: compare order, not size.")
    if report.zero_shot:
        ap, ap50 = report.zero_shot.get("zero_shot/mask_ap"), report.zero_shot.get("zero_shot/ap50")
        parts = [f"AP {ap:.1f}" if ap is not None else "", f"AP50 {ap50:.1f}" if ap50 is not None else ""]
        notes.append(f"Teacher before adaptation (zero-shot): {', '.join(p for p in parts if p)}.")
    if report.steps_from_scratch:
        stored = sum(s.was_stored for s in report.stages)
        saved = 100 * (1 - report.steps_unique / report.steps_from_scratch)
        notes.append(
            f"Compute: {report.steps_unique:,} training steps in {len(report.stages)} unique stages"
            f"{f' ({stored} found in the store)' if stored else ''}; each row alone from scratch: "
            f"{report.steps_from_scratch:,} ({saved:.0f} % saved)."
        )
    for what, values in (
        ("datasets", {(r.get("dataset") or {}).get("content_hash") for r in report.results} - {None}),
        ("code versions", {r.get("code_version") for r in report.results} - {None}),
        ("scales", {(r.get("recipe") or {}).get("scale") for r in report.results} - {None}),
    ):
        if len(values) > 1:
            notes.append(f"WARNING: results of {len(values)} different {what} are mixed in this table.")
    return notes
