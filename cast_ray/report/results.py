"""From `result.json` files to what a report says: means over seeds, differences, failures, compute saved.

Everything a report shows comes from the files of one run folder, so that it can be rebuilt on any machine, without
Ray, after the cluster is gone.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from cast_ray.contracts.compute_node import device_type
from cast_ray.contracts.row_result import StageRecord
from cast_ray.plan.ablation import Table, load_table
from cast_ray.plan.metrics import is_latency
from cast_ray.plan.prices import NO_PRICES, Prices
from cast_ray.report.content import Compute, Difference, Failure, Report, Result, RowSummary, StageSummary
from cast_ray.report.decisions import decide_rows, default_effect
from cast_ray.report.metrics import metric_on, split_metric
from cast_ray.report.notes import context_of, notes_of
from cast_ray.report.run_folder import Run
from cast_ray.report.settings import averageable, mixed_settings
from cast_ray.report.statistics import NUM_REPLICATES, Resampling, cell_of, value_of

MAIN_METRICS = tuple(f"{role}/{ap}" for role in ("teacher", "student", "refined") for ap in ("mask_ap", "ap50"))

MAX_PAIRED_ROWS = 8
MAX_RESAMPLED = 500
"""Results whose images are resampled: half a second each on 200 images, a quarter of a minute on 5,000."""


def summarise_run(
    run: Run, tell: Callable[[str], None] = lambda text: None, prices: Prices | None = None
) -> list[Report]:
    """One report for each table of a run folder, in the order of the plan.

    Args:
        tell: see `Resampling`.
        prices: of a device-hour; None: those that the sweep was started with.
    """
    prices = run.plan.prices if prices is None else prices
    num_replicates = NUM_REPLICATES if len(run.results) <= MAX_RESAMPLED else 0
    resampling = Resampling(run.folder, num_replicates, tell)
    reports = []
    for name in run.table_names:
        results = [r for r in run.results if r.table == name]
        pending = [(row, seed) for _, row, seed in run.pending(name)]
        reports.append(
            summarise(
                results,
                run.plan.table(name),
                name=name,
                pending=pending,
                resampling=resampling,
                effect=run.plan.effects.get(name),
                prices=prices,
            )
        )
    resampling.save()
    return reports


def summarise(
    results: Sequence[Result],
    table: Table | None = None,
    *,
    name: str | None = None,
    pending: Iterable[tuple[str, int]] = (),
    resampling: Resampling | None = None,
    effect: float | None = None,
    prices: Prices = NO_PRICES,
) -> Report:
    """Everything the report of some results says.

    Args:
        results: results of one table, as `read_results` returns them.
        table: title, order of rows, baseline and paper values; None: the table that the results name, if it is one of
            `sweeps/tables`, else the rows in the order they come with the first as baseline.
        name: name of the table; None: the one that the results name.
        pending: (row, seed) that are still to come.
        resampling: per-image data of the results; None: intervals are over seeds alone.
        effect: smallest effect of interest in the ranking metric; None: see `decisions.default_effect`.
        prices: of a device-hour.

    Raises:
        ValueError: results of more than one table.
    """
    names = sorted({r.table for r in results} | ({name} if name else set()))
    if len(names) != 1:
        raise ValueError(f"expected the results of one table, got {', '.join(names) or 'none'}")
    if table is None:
        table = _table_of(names[0])
    pending = list(dict.fromkeys([*pending, *((r.row, r.seed) for r in results if r.is_unreadable)]))
    found = [*(r.row for r in results), *(row for row, _ in pending)]
    order = list(dict.fromkeys([*(table.rows if table else ()), *found]))
    place = {row: i for i, row in enumerate(order)}
    results = sorted(results, key=lambda r: (place[r.row], r.seed))
    preset = next((str(r.setting("preset")) for r in results if r.recipe), "")
    paper = table.paper_values(preset) if table else {}
    results, warnings = averageable(results)
    warnings += mixed_settings(results, table)
    results = [_told_apart(result, _measured_on_several(results)) for result in results]
    by_row: dict[str, list[Result]] = {row: [] for row in order}
    for result in results:
        by_row[result.row].append(result)
    num_pending = Counter(row for row, _ in pending)
    metric = table.metric if table else "student/mask_ap"
    baseline = table.baseline if table else order[0]
    resampling = resampling or Resampling(None)

    done = {row: {r.seed: r for r in each if r.is_done} for row, each in by_row.items()}
    known = {m for by_seed in done.values() for r in by_seed.values() for m in r.measured}
    extra = list(dict.fromkeys(m for m in (metric, *paper) if m not in MAIN_METRICS))
    metrics = tuple(m for m in (*MAIN_METRICS, *extra) if m in known) or tuple(dict.fromkeys((*paper, metric)))
    compared = [m for m in metrics if m == metric or m in paper or split_metric(m)[1] == "mask_ap"]
    compared = sorted(compared, key=lambda m: m != metric)  # the ranking one first

    rows = tuple(
        _summarise_row(
            row,
            by_row[row],
            num_pending[row],
            {m: values[row] for m, values in paper.items() if row in values},
            resampling,
        )
        for row in order
    )
    others = [row for row in order if row != baseline]
    differences = [d for m in compared for row in others if (d := _difference(row, baseline, m, done, resampling))]
    finished = [row for row in order if done[row]]
    pairs = [
        d
        for row, against in itertools.permutations(finished if 2 < len(finished) <= MAX_PAIRED_ROWS else [], 2)
        if (d := _difference(row, against, metric, done, resampling))
    ]
    stages = _unique_stages(results)
    effect = default_effect(metric) if effect is None else effect
    report = Report(
        table=names[0],
        title=table.title if table else names[0],
        metric=metric,
        baseline=baseline,
        metrics=metrics,
        rows=rows,
        differences=tuple(replace(d, paper=_paper_difference(d, paper)) for d in differences),
        pairs=tuple(pairs),
        decisions=decide_rows(done, order, baseline, metric, effect, stages),
        effect=effect,
        failures=tuple(Failure(r.row, r.seed, _one_line(r.error), r.log) for r in results if r.has_failed),
        stages=stages,
        steps=_compute([(s.steps if s.kind == "train" else 0, s) for s in stages]),
        device_hours={
            device: _compute([(s.device_hours, s) for s in stages if s.device == device])
            for device in dict.fromkeys(s.device for s in stages if s.device_hours)
        },
        zero_shot=_zero_shot(results),
        paper_curves=table.paper_curves() if table else {},
        paper_dataset=table.paper_dataset(preset) if table else "",
        paper_metric=table.paper_metric(preset) if table else "",
        context=context_of(results),
        notes=(),
        prices=prices,
        results=tuple(results),
    )
    return replace(report, notes=(*warnings, *notes_of(report)))


def _table_of(name: str) -> Table | None:
    try:
        return load_table(name)
    except ValueError:  # a table of the user's own, whose file may be gone
        return None


def _one_line(text: str | None) -> str:
    """The telling line of an error: the last one of a traceback."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason recorded"


def _summarise_row(
    row: str, results: Sequence[Result], num_pending: int, paper: Mapping[str, float], resampling: Resampling
) -> RowSummary:
    done = [r for r in results if r.is_done]
    cells = {}
    for metric in dict.fromkeys(m for r in done for m in r.measured):
        by_seed = {r.seed: r for r in done if value_of(r, metric) is not None}
        values = [v for r in by_seed.values() if (v := value_of(r, metric)) is not None]
        if values:
            is_ap = split_metric(metric)[1] == "mask_ap"
            cells[metric] = cell_of(values, resampling.interval(by_seed, metric) if is_ap else None)
    seconds = [r.seconds for r in done if r.seconds is not None]
    return RowSummary(
        name=row,
        seeds_done=tuple(sorted(r.seed for r in done)),
        num_failed=sum(r.has_failed for r in results),
        num_pending=num_pending,
        cells=cells,
        paper=paper,
        seconds=statistics.fmean(seconds) if seconds else None,
        device_hours=_sum_by_key(r.hours_by_type for r in results),
        num_unreadable=sum(r.is_unreadable for r in results),
    )


def _difference(
    row: str, against: str, metric: str, done: Mapping[str, Mapping[int, Result]], resampling: Resampling
) -> Difference | None:
    ours = {seed: r for seed, r in done[row].items() if value_of(r, metric) is not None}
    theirs = {seed: r for seed, r in done.get(against, {}).items() if value_of(r, metric) is not None}
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    pairs = [(value_of(ours[s], metric) or 0.0) - (value_of(theirs[s], metric) or 0.0) for s in seeds]
    models = [(_evaluated(ours[s], metric), _evaluated(theirs[s], metric)) for s in seeds]
    same = all(a is not None and a == b for a, b in models)
    interval = None
    if not same:
        interval = resampling.difference({s: ours[s] for s in seeds}, {s: theirs[s] for s in seeds}, metric)
    return Difference(row, against, metric, statistics.fmean(pairs), interval, len(pairs), same_artifact=same)


def _evaluated(result: Result, metric: str) -> str | None:
    """Fingerprint of the evaluation that a metric comes from, where the result says so."""
    return result.evaluations.get(split_metric(metric)[0])


def _paper_difference(difference: Difference, paper: Mapping[str, Mapping[str, float]]) -> float | None:
    values = paper.get(difference.metric, {})
    if difference.row not in values or difference.against not in values:
        return None
    return values[difference.row] - values[difference.against]


def _unique_stages(results: Sequence[Result]) -> tuple[StageSummary, ...]:
    users: dict[str, list[tuple[Result, StageRecord]]] = {}
    for result in results:
        for stage in result.stages:
            users.setdefault(stage.fingerprint, []).append((result, stage))
    summaries = []
    for fingerprint, entries in users.items():
        # the row that ran it knows how long it took; a row that reused it waited or copied numbers
        result, ran = next(((r, s) for r, s in entries if not s.reused), entries[0])
        summaries.append(
            StageSummary(
                name=ran.name,
                kind=ran.kind,
                fingerprint=fingerprint,
                rows=tuple(dict.fromkeys(r.row for r, _ in entries)),
                seeds=tuple(sorted({r.seed for r, _ in entries})),
                num_uses=len(entries),
                steps=max(s.steps for _, s in entries),
                seconds=ran.seconds or 0.0,
                device_hours=_device_hours(result, ran),
                images_per_s=ran.images_per_s,
                was_stored=all(s.reused for _, s in entries),
                device=device_type(ran.computed_on),
            )
        )
    return tuple(summaries)


def _measured_on_several(results: Sequence[Result]) -> set[str]:
    """Metrics that depend on the device and were measured on several types of devices, or on some that nobody knows."""
    devices: dict[str, set[str]] = {}
    for result in results:
        for metric in filter(is_latency, result.metrics):
            devices.setdefault(metric, set()).add(_device_of(result, metric))
    return {metric for metric, found in devices.items() if len(found) > 1}


def _device_of(result: Result, metric: str) -> str:
    node = result.measured_on.get(metric)
    return device_type([node] if node else [])


def _told_apart(result: Result, mixed: set[str]) -> Result:
    """A result whose metrics of unlike devices have names of their own, so that no mean or difference mixes them."""
    metrics = {metric_on(m, _device_of(result, m)) if m in mixed else m: value for m, value in result.metrics.items()}
    return result if metrics.keys() == result.metrics.keys() else result.model_copy(update={"metrics": metrics})


def _sum_by_key(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for value in values:
        for key, number in value.items():
            total[key] = total.get(key, 0.0) + number
    return total


def _device_hours(result: Result, stage: StageRecord) -> float:
    asked = result.setting("runtime.num_labellers" if stage.kind == "label" else "runtime.num_workers")
    devices = stage.num_devices or stage.num_workers or (asked if isinstance(asked, int) else 1)
    return (stage.stage_seconds or stage.seconds or 0.0) * devices / 3600


def _compute(costs: Sequence[tuple[float, StageSummary]]) -> Compute:
    return Compute(
        scratch=sum(cost * stage.num_uses for cost, stage in costs),
        unique=sum(cost for cost, _ in costs),
        ran=sum(cost for cost, stage in costs if not stage.was_stored),
    )


def _zero_shot(results: Sequence[Result]) -> dict[str, float]:
    """Metrics of the teacher before adaptation, which most tables have one of; none where rows have different ones."""
    done = [r for r in results if r.is_done]
    names = sorted({m for r in done for m in r.metrics if m.startswith("zero_shot/")})
    if len({_evaluated(r, names[0]) for r in done if r.metrics.get(names[0]) is not None} if names else ()) > 1:
        return {}
    values = {m: [v for r in done if (v := value_of(r, m)) is not None] for m in names}
    return {m: statistics.fmean(v) for m, v in values.items() if v}
