"""What a report consists of: plain data, made by `results`, laid out by `sections`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from cast_ray.contracts.row_result import Number, RowResult, Status, is_finite
from cast_ray.plan.prices import NO_PRICES, Prices
from cast_ray.report.metrics import PER_CLASS

UNREADABLE: Status = "unreadable"
"""Status of a result whose file cannot be read: its row says so, and all others are shown."""


class Result(RowResult):
    """One `result.json` of a run folder."""

    folder: Path | None = None
    """The folder with the file and what lies beside it; None: it was not read from one."""

    @property
    def is_unreadable(self) -> bool:
        return self.status == UNREADABLE

    @property
    def has_failed(self) -> bool:
        """Whether it ended without its numbers, for a reason that is known."""
        return not self.is_done and not self.is_unreadable

    @cached_property
    def measured(self) -> Mapping[str, Number | None]:
        """Its metrics, those of a class as `student/per_class/<name>`, and the last diagnostics as `distill/margin`."""
        found = dict(self.metrics)
        for role, values in self.per_class.items():
            found |= {f"{role}/{PER_CLASS}/{name}": value for name, value in values.items()}
        for stage, points in self.diagnostics.items():
            for point in reversed(points):  # not each point has each key: FNR needs labelled pixels among the anchors
                for key, value in point.items():
                    if key != "step" and is_finite(value):
                        found.setdefault(f"{stage}/{key}", value)
        return found


Resampled = Literal["images and seeds", "seeds", "images"]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and what varies in it.

    images and seeds: joint bootstrap; seeds: Student's t over seeds (no per-image data); images: bootstrap over
    images of a single seed, which says nothing about other seeds.
    """

    low: float
    high: float
    resampled: Resampled


@dataclass(frozen=True)
class Cell:
    """One metric of one row: mean over the finished seeds, sample standard deviation from two seeds on."""

    mean: float
    sd: float | None
    num_seeds: int
    interval: Interval | None = None


@dataclass(frozen=True)
class Difference:
    """A row minus another one in one metric, paired by seed and image. `paper`: the published difference.

    same_artifact: both rows were measured on the very same models (a shared stage), so that nothing differs.
    """

    row: str
    against: str
    metric: str
    mean: float
    interval: Interval | None
    num_seeds: int
    paper: float | None = None
    same_artifact: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0, over seeds; a single seed's interval cannot show that."""
        interval = self.interval
        return interval is not None and interval.resampled != "images" and (interval.low > 0 or interval.high < 0)


@dataclass(frozen=True)
class Forecast:
    """How many more seeds are likely to decide a row: the median, and the quantiles of 10 % and 90 %.

    None: more than `confidence_sequence.MAX_FORECAST` seeds in all.
    """

    median: int | None
    low: int | None
    high: int | None


Answer = Literal["better", "worse", "equal", "same model", "undecided"]
"""equal: within the smallest effect of interest; same model: the row was measured on the baseline's own models."""


@dataclass(frozen=True)
class Decision:
    """What the seeds of a row show against the baseline in the ranking metric, with one error rate for the whole table.

    low, high: bounds of the mean difference that hold at all numbers of seeds together; None while there are too few
    seeds for bounds. device_hours: of the stages that no other row uses, over all of its seeds.
    """

    row: str
    answer: Answer
    num_seeds: int
    """Seeds that the row and the baseline both have, on the same images."""
    decided_at: int | None
    """Number of seeds at which it was decided."""
    low: float | None
    high: float | None
    device_hours: float
    forecast: Forecast | None = None
    """How many more seeds are likely to decide it; None: decided, or nothing to forecast from."""
    least_more: int = 0
    """Seeds without which it cannot be decided, whatever they show."""

    @property
    def is_open(self) -> bool:
        return self.answer == "undecided"


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
    num_pending: int
    """Results that are still to come, or whose file cannot be read."""
    cells: Mapping[str, Cell]
    paper: Mapping[str, float]
    seconds: float | None
    device_hours: Mapping[str, float]
    """Model of the devices -> device-hours of the stages that this row's results ran."""
    num_unreadable: int = 0
    """How many of the pending results have a file that cannot be read."""

    @property
    def num_seeds(self) -> int:
        return len(self.seeds_done) + self.num_failed + self.num_pending

    @property
    def has_failed(self) -> bool:
        """Whether there is nothing to show but a failure."""
        return bool(self.num_failed) and not self.seeds_done

    @property
    def seeds_text(self) -> str:
        """How many seeds are done; * marks a single run.

        `1 seed*`, `3 seeds`, `2 of 3 seeds`, `FAILED, 1 seed`, `UNREADABLE, 1 seed`, `pending` or `not run`.
        """
        if not self.num_seeds:
            return "not run"
        total = f"{self.num_seeds} seed{'s' if self.num_seeds > 1 else ''}"
        if not self.seeds_done:
            if self.num_unreadable and not self.num_failed:
                return f"UNREADABLE, {total}"
            return f"FAILED, {total}" if self.num_failed else "pending"
        text = f"{len(self.seeds_done)} of {total}" if len(self.seeds_done) < self.num_seeds else total
        return f"{text}*" if len(self.seeds_done) == 1 else text


@dataclass(frozen=True)
class StageSummary:
    """One unique stage (by fingerprint) and the rows and seeds that used it.

    device: model of what computed it, see `contracts.compute_node.device_type`; was_stored: none of the rows ran it.
    """

    name: str
    kind: str
    fingerprint: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    num_uses: int
    steps: int
    seconds: float
    device_hours: float
    images_per_s: float | None
    was_stored: bool
    device: str


@dataclass(frozen=True)
class Compute:
    """What the stages cost: `scratch` if each row ran all of its own, `unique` each stage once, `ran` by these rows."""

    scratch: float
    unique: float
    ran: float

    @property
    def saved_percent(self) -> float:
        return 100 * (1 - self.unique / self.scratch) if self.scratch else 0.0


@dataclass(frozen=True)
class Report:
    """The report on the results of one table, before it is laid out."""

    table: str
    title: str
    metric: str
    baseline: str
    metrics: tuple[str, ...]
    """Shown in the main table, in this order."""
    rows: tuple[RowSummary, ...]
    differences: tuple[Difference, ...]
    """To the baseline, in every metric that is compared."""
    pairs: tuple[Difference, ...]
    """Differences of every two rows in the ranking metric; none in a large table."""
    decisions: tuple[Decision, ...]
    """What the seeds decide about each row but the baseline, in the ranking metric."""
    effect: float | None
    """Smallest effect of interest in the ranking metric; None: rows are never called equal."""
    failures: tuple[Failure, ...]
    stages: tuple[StageSummary, ...]
    steps: Compute
    device_hours: Mapping[str, Compute]
    """Model of the devices -> device-hours of the stages that they computed."""
    zero_shot: Mapping[str, float]
    paper_curves: Mapping[str, Mapping[float, float]]
    """What the paper's table has over a number: metric of ours, or its own column's name -> number -> value."""
    paper_dataset: str
    paper_metric: str
    """Which AP the published values are, as in `evaluation.metric`."""
    context: Mapping[str, str]
    notes: tuple[str, ...]
    prices: Prices = NO_PRICES
    """What a device-hour costs, where the reader has said so."""
    results: tuple[Result, ...] = field(repr=False, default=())

    @property
    def num_expected(self) -> int:
        return sum(row.num_seeds for row in self.rows)

    @property
    def num_pending(self) -> int:
        return sum(row.num_pending for row in self.rows)

    @property
    def has_one_seed(self) -> bool:
        """Whether no row has more than one finished seed, and one has that: such a report is no evidence for a row."""
        return max((len(row.seeds_done) for row in self.rows), default=0) == 1

    def differences_in(self, metric: str) -> dict[str, Difference]:
        """Row -> its difference to the baseline in one metric."""
        return self._by_metric.get(metric, {})

    @cached_property
    def _by_metric(self) -> dict[str, dict[str, Difference]]:
        by_metric: dict[str, dict[str, Difference]] = {}
        for difference in self.differences:
            by_metric.setdefault(difference.metric, {})[difference.row] = difference
        return by_metric
