"""From `result.json` files to what a report says: means over seeds, differences, failures, compute saved.

Everything a report shows comes from the files of one run folder (`<table>__<row>__s<seed>/result.json`) and the table's
YAML, so that it can be rebuilt on any machine, without Ray, after the cluster is gone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy import stats

from cast_ray.report.content import METRIC_LABELS, Cell, Difference, Failure, Report, Result, RowSummary, StageSummary
from cast_ray.report.notes import context_of, notes_of
from cast_ray.stages.table import Table, load_table


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
    metrics = tuple(m for m in shown if any(m in row.cells for row in rows)) or tuple(dict.fromkeys((*paper, metric)))
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
        context=context_of(results),
        notes=(),
        results=tuple(results),
    )
    return replace(report, notes=tuple(notes_of(report)))


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
