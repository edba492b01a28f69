"""What a report consists of: plain data, made by `results`, printed by `tables`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Result = dict[str, Any]
"""One `result.json`."""

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
        """`1 seed`, `3 seeds`, `2 of 3 seeds`, `FAILED, 1 seed` or `not run`."""
        if not self.num_seeds:
            return "not run"
        total = f"{self.num_seeds} seed{'s' if self.num_seeds > 1 else ''}"
        if not self.seeds_done:
            return f"FAILED, {total}"
        return f"{len(self.seeds_done)} of {total}" if self.num_failed else total


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


def label_of(metric: str) -> str:
    """How a metric is called in a heading."""
    return METRIC_LABELS.get(metric, metric)
