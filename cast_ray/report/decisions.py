"""What the seeds of a table decide: which rows are better or worse than the baseline, or equal within an effect.

Computed from stored results alone, and the same for a sweep that adds seeds until its rows are decided
(`cast-ray ablate --until decided`) as for the report of any run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cast_ray.report.confidence_sequence import Side, decide, least_seeds
from cast_ray.report.content import Answer, Decision, Result, StageSummary
from cast_ray.report.metrics import is_ap, is_lower_better, split_metric
from cast_ray.report.statistics import images_of, value_of

DEFAULT_EFFECT_AP = 1.0
"""Smallest effect of interest where a metric is an AP, in percent."""


def default_effect(metric: str) -> float | None:
    """The smallest effect of interest of a metric where nobody names one; None: rows are never called equal."""
    return DEFAULT_EFFECT_AP if is_ap(metric) else None


def decide_rows(
    done: Mapping[str, Mapping[int, Result]],
    rows: Sequence[str],
    baseline: str,
    metric: str,
    effect: float | None,
    stages: Sequence[StageSummary] = (),
) -> tuple[Decision, ...]:
    """A decision for each row but the baseline.

    A row that was measured on the very models of the baseline at all seeds needs no statistics. The others share one
    error rate, those that have not run yet included, so that more rows of the table may follow.

    Args:
        done: row -> seed -> finished result.
        rows: of the table, in the order of the report.
        effect: smallest effect of interest, in the metric's unit; None: rows are never called equal.
        stages: unique stages of the results, for what each row cost.
    """
    others = [row for row in rows if row != baseline]
    pairs = {row: _paired(done.get(row, {}), done.get(baseline, {}), metric) for row in others}
    same = {row for row, of_seed in pairs.items() if of_seed and all(is_same for _, is_same in of_seed.values())}
    differences = {row: [value for value, _ in pairs[row].values()] for row in others if row not in same}
    found = decide(differences, effect)
    decisions = []
    for row in others:
        cost = _own_hours(row, stages)
        if row in same:
            num_seeds = len(pairs[row])
            decisions.append(Decision(row, "same model", num_seeds, num_seeds, 0.0, 0.0, cost))
            continue
        made, least = found[row], least_seeds(len(found))
        decisions.append(
            Decision(
                row=row,
                answer=_answer(made.side, metric),
                num_seeds=made.num_seeds,
                decided_at=made.decided_at,
                low=made.low if math.isfinite(made.low) else None,
                high=made.high if math.isfinite(made.high) else None,
                device_hours=cost,
                forecast=made.forecast,
                least_more=0 if made.decided_at else max(1, least - made.num_seeds),
            )
        )
    return tuple(decisions)


def _paired(ours: Mapping[int, Result], theirs: Mapping[int, Result], metric: str) -> dict[int, tuple[float, bool]]:
    """Seed -> (difference, whether both results are of the same models), of the seeds measured on the same images."""
    pairs = {}
    role = split_metric(metric)[0]
    for seed in sorted(ours.keys() & theirs.keys()):
        a, b = value_of(ours[seed], metric), value_of(theirs[seed], metric)
        if a is None or b is None or images_of(ours[seed]) != images_of(theirs[seed]):
            continue
        model = ours[seed].evaluations.get(role)
        pairs[seed] = (a - b, model is not None and model == theirs[seed].evaluations.get(role))
    return pairs


def _answer(side: Side, metric: str) -> Answer:
    if side in ("above", "below"):
        return "better" if (side == "above") != is_lower_better(metric) else "worse"
    return "equal" if side == "equal" else "undecided"


def _own_hours(row: str, stages: Sequence[StageSummary]) -> float:
    """Device-hours of the stages that no other row of the table uses."""
    return sum(stage.device_hours for stage in stages if stage.rows == (row,))
