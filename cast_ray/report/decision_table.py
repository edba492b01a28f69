"""Decisions as a report tells them: a table, and a sentence for those who read no table."""

from __future__ import annotations

from collections.abc import Mapping

from cast_ray.common.text import first_of
from cast_ray.report.blocks import Column, Grid
from cast_ray.report.confidence_sequence import ERROR_RATE, MAX_FORECAST
from cast_ray.report.content import Answer, Decision, Report
from cast_ray.report.metrics import format_signed, format_value, label_of

MAX_NAMED = 8

ANSWERS: Mapping[Answer, str] = {
    "better": "better",
    "worse": "worse",
    "equal": "equal within {effect}",
    "same model": "same model",
    "undecided": "undecided",
}
"""Answers as they are told, in the order of telling."""


def decisions_grid(report: Report) -> Grid | None:
    """What the seeds decide about each row, at which of them, what that cost, and what an open row still needs."""
    decisions = [decision for decision in report.decisions if decision.num_seeds]
    if not decisions:
        return None
    names = ("decision", "decided at seed", "bounds of the difference", "own device-hours", "seeds still needed")
    columns = (Column("row", False), Column("paired seeds"), *(Column(n, n == "own device-hours") for n in names))
    body, marks = [], []
    for decision in decisions:
        body.append(
            (
                decision.row,
                str(decision.num_seeds),
                answer_text(decision, report),
                str(decision.decided_at or ""),
                bounds_text(decision, report.metric),
                format_value("device_hours", decision.device_hours) if decision.device_hours else "",
                more_seeds_text(decision),
            )
        )
        marks.append({"better": "better", "worse": "worse", "undecided": "noise"}.get(decision.answer, ""))
    caption = (
        f"{label_of(report.metric)} against {report.baseline}: decisions of which any is false with at most 5 %, "
        "however many rows there are and however often one looks"
    )
    return Grid(caption, columns, tuple(body), tuple(d.row for d in decisions), tuple(marks))


def bounds_text(decision: Decision, metric: str) -> str:
    """`+0.4 to +3.1`; empty while there are too few seeds for bounds."""
    if decision.low is None or decision.high is None or decision.answer == "same model":
        return ""
    return f"{format_signed(metric, decision.low)} to {format_signed(metric, decision.high)}"


def answer_text(decision: Decision, report: Report) -> str:
    """What is decided about a row: `better`, or `equal within 1.0`."""
    return ANSWERS[decision.answer].format(effect=format_value(report.metric, report.effect or 0.0))


def more_seeds_text(decision: Decision) -> str:
    """How many more seeds an undecided row needs: `about 4 (2 to 11)`, `at least 2`, `more than 90 (from 8 on)`."""
    if not decision.is_open:
        return ""
    forecast, most = decision.forecast, MAX_FORECAST - decision.num_seeds
    if forecast is None:
        return f"at least {decision.least_more}"
    if forecast.median is None:
        return f"more than {most}" + (f" (from {forecast.low} on)" if forecast.low is not None else "")
    high = f"{forecast.low} to {forecast.high}" if forecast.high is not None else f"{forecast.low} to over {most}"
    return f"about {forecast.median} ({high})"


def decision_notes(report: Report) -> list[str]:
    """What is decided about the rows, with one error rate for the whole table."""
    known = [decision for decision in report.decisions if decision.num_seeds > 1]
    if not known:
        return []
    words = []
    for answer in ANSWERS:
        if answer != "undecided" and (made := [decision for decision in known if decision.answer == answer]):
            named = first_of([f"{decision.row} ({decision.decided_at} seeds)" for decision in made], MAX_NAMED)
            words.append(f"{answer_text(made[0], report)}: {named}")
    if undecided := [decision for decision in known if decision.is_open]:
        named = first_of(
            [f"{decision.row} ({more_seeds_text(decision)} more seeds)" for decision in undecided], MAX_NAMED
        )
        words.append(f"undecided: {named}")
    return [
        f"Decisions against {report.baseline} in {label_of(report.metric)} (at most {100 * ERROR_RATE:g} % that any of "
        f"the table is false, at every number of seeds): {'; '.join(words)}."
    ]
