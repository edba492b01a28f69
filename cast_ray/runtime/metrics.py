"""What an operator watches while a sweep runs: metrics that Ray's nodes offer to Prometheus.

The sweep's broker knows nearly all of them, because running stages post their progress to it anyway (about once a
second, never from inside a step): it refreshes the gauges with every heartbeat of a row. A gauge that is not refreshed
any more, such as the loss of a stage that has ended, disappears after two report intervals of Ray. Errors of the store
are counted in the process that meets them.

The number of series is bounded: a sweep has one set of its own, and of at most MAX_ROWS rows one set each.
`cluster/grafana/cast_ray.json` and `cluster/prometheus/rules.yml` query these names; a test compares them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

from cast_ray.common.outages import patiently

P = ParamSpec("P")
R = TypeVar("R")

MAX_ROWS = 200
"""Rows of a sweep that have series of their own, in the order in which they first run a stage."""
REFRESH_S = 2.0
OF_SWEEP, OF_STAGE = ("sweep",), ("sweep", "row", "seed", "stage", "node")


@dataclass(frozen=True)
class Metric:
    """A metric's name, without the `ray_` that Ray puts before it and the `_total` that it puts after a counter."""

    name: str
    description: str
    tags: tuple[str, ...] = OF_SWEEP
    kind: Literal["gauge", "counter"] = "gauge"


STAGES = Metric("cast_ray_stages", "Stages that are waiting, running, done or failed", ("sweep", "state"))
ROWS = Metric("cast_ray_rows", "Rows that run, wait for room, wait for a stage, or have ended", ("sweep", "state"))
WAITING = Metric("cast_ray_room_wait_seconds", "Longest time that a stage has been waiting for room")
PROGRESS_TIME = Metric("cast_ray_progress_timestamp_seconds", "When a step, an image or a stage was last finished")
CLAIMS = Metric("cast_ray_claims", "Stages that this sweep claims in the store")
BUDGET = Metric("cast_ray_budget_device_seconds", "Device-seconds that the sweep may spend")
SPENT = Metric("cast_ray_device_seconds", "Device-seconds spent")
SAVED = Metric("cast_ray_saved_device_seconds", "Device-seconds of stages that rows took over finished")
RESTARTS = Metric("cast_ray_worker_group_restarts", "Worker groups that started again after a loss", kind="counter")
PROGRESS = Metric("cast_ray_stage_progress_ratio", "Share of the stage's steps or images that is done", OF_STAGE)
STEPS_RATE = Metric("cast_ray_steps_per_second", "Optimiser steps per second", OF_STAGE)
IMAGES_RATE = Metric("cast_ray_images_per_second", "Images per second", OF_STAGE)
LOSS = Metric("cast_ray_loss", "Weighted loss J, the mean of the last steps", OF_STAGE)
DATA_WAIT = Metric(
    "cast_ray_data_wait_ratio", "Share of the time in which training waited for its next batch", OF_STAGE
)
CHECKPOINT_TIME = Metric(
    "cast_ray_checkpoint_timestamp_seconds", "When the stage's last checkpoint was saved", OF_STAGE
)
VALIDATION_AP = Metric("cast_ray_validation_ap", "Mask AP in percent, of the last validation", OF_STAGE[:-1])
LABELLED = Metric("cast_ray_labelled_images", "Images that a teacher has labelled", OF_STAGE[:-1], "counter")
PSEUDO_LABELS = Metric("cast_ray_pseudo_labels", "Instances on these images", OF_STAGE[:-1], "counter")
STORE_ERRORS = Metric("cast_ray_store_errors", "Requests to the store that failed", ("operation",), "counter")

OF_POSTS = {
    STEPS_RATE: "steps_per_s",
    IMAGES_RATE: "images_per_s",
    LOSS: "loss",
    DATA_WAIT: "data_wait",
    CHECKPOINT_TIME: "checkpoint_time",
}
"""Metric -> the fact of a stage's post that it shows."""


@dataclass(frozen=True)
class Sample:
    """A value of a metric; of a counter, what it has come to."""

    metric: Metric
    value: float
    tags: tuple[str, ...]


class Outlet:
    """Hands samples to Ray.

    Args:
        make: makes Ray's gauge or counter of a metric.
    """

    def __init__(self, make: Callable[[Metric], Any] | None = None):
        self.make = make or _make
        self.made: dict[Metric, Any] = {}
        self.counted: dict[tuple[Metric, tuple[str, ...]], float] = {}

    def show(self, samples: Iterable[Sample]) -> None:
        """Refreshes gauges, and adds to counters what has come since they were last shown."""
        for sample in samples:
            metric, tags = sample.metric, dict(zip(sample.metric.tags, sample.tags, strict=True))
            if metric not in self.made:
                self.made[metric] = self.make(metric)
            if metric.kind == "gauge":
                self.made[metric].set(sample.value, tags)
                continue
            more = sample.value - self.counted.get((metric, sample.tags), 0.0)
            if more > 0:  # Ray refuses to add nothing
                self.made[metric].inc(more, tags)
                self.counted[metric, sample.tags] = sample.value


def _make(metric: Metric) -> Any:
    from ray.util import metrics

    kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
    return kind(metric.name, description=metric.description, tag_keys=metric.tags)


@dataclass(frozen=True)
class SweepState:
    """What a broker knows of its sweep at one moment."""

    stages: Mapping[str, int]
    """State -> number of stages."""
    rows: Mapping[str, int]
    """State -> number of rows."""
    posts: Mapping[str, Mapping[str, Any]]
    """Owner -> what its running stage has told, see `Broker.post`."""
    nodes: Mapping[str, str]
    """Owner -> types of the nodes that it runs on."""
    claims: int
    room_wait_s: float
    device_s: float
    budget_s: float | None


@dataclass
class SweepMetrics:
    """The part of a sweep's metrics that no other bookkeeping holds, and all of them as samples.

    sweep: its name. The rest is counted as the sweep goes.
    """

    sweep: str
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Owner -> its row and seed, of those with series of their own."""
    totals: dict[tuple[Metric, tuple[str, ...]], float] = field(default_factory=lambda: {(SAVED, ()): 0.0})
    """(metric, its tags after the sweep) -> what it has come to."""
    validation_ap: dict[tuple[str, str], float] = field(default_factory=dict)
    """(owner, stage) -> its last AP."""
    makers: dict[str, str] = field(default_factory=dict)
    """Fingerprint of a finished stage -> owner that ran it."""
    device_s: dict[str, float] = field(default_factory=dict)
    """Fingerprint of a finished stage -> device-seconds that it took."""
    taken: set[tuple[str, str]] = field(default_factory=set)
    """(owner, fingerprint) of the stages that rows have taken over."""
    progressed: float = field(default_factory=time.time)
    """When anything was last finished."""
    shown: float = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether the samples are to be shown again at time `now` (time.monotonic())."""
        if now - self.shown < REFRESH_S:
            return False
        self.shown = now
        return True

    def moved(self) -> None:
        """A step, an image or a stage is finished."""
        self.progressed = time.time()

    def labelled(self, owner: str, stage: str, num_images: int, num_labels: int) -> None:
        """A teacher has labelled images in `owner`'s stage."""
        self.moved()
        tags = (*self._row_of(owner), stage)
        self._add(LABELLED, tags, num_images)
        self._add(PSEUDO_LABELS, tags, num_labels)

    def finished(self, owner: str, fingerprint: str, device_s: float) -> None:
        """`owner` has committed a stage, which took so many device-seconds."""
        self.moved()
        self.makers[fingerprint] = owner
        self.device_s[fingerprint] = device_s

    def took_over(self, owner: str, fingerprints: Iterable[str]) -> None:
        """`owner` was told that these stages are done; those that it did not run itself are saved."""
        for fingerprint in fingerprints:
            if self.makers.get(fingerprint) == owner or (owner, fingerprint) in self.taken:
                continue
            self.taken.add((owner, fingerprint))
            self._add(SAVED, (), self.device_s.get(fingerprint, 0.0))

    def restarted(self) -> None:
        """A worker group has started again after it lost a worker."""
        self._add(RESTARTS, (), 1)

    def _add(self, metric: Metric, tags: tuple[str, ...], more: float) -> None:
        self.totals[metric, tags] = self.totals.get((metric, tags), 0.0) + more

    def _row_of(self, owner: str) -> tuple[str, str]:
        if owner not in self.rows:
            if len(self.rows) >= MAX_ROWS:
                return "others", ""
            row, _, seed = owner.rpartition("__s")
            self.rows[owner] = (row or owner, seed)
        return self.rows[owner]

    def samples(self, state: SweepState) -> Iterator[Sample]:
        """All that is to be shown now."""
        of_sweep = (self.sweep,)
        for name, count in state.stages.items():
            yield Sample(STAGES, count, (self.sweep, name))
        for name, count in state.rows.items():
            yield Sample(ROWS, count, (self.sweep, name))
        yield Sample(WAITING, state.room_wait_s, of_sweep)
        yield Sample(PROGRESS_TIME, self.progressed, of_sweep)
        yield Sample(CLAIMS, state.claims, of_sweep)
        yield Sample(SPENT, state.device_s, of_sweep)
        if state.budget_s is not None:
            yield Sample(BUDGET, state.budget_s, of_sweep)
        for owner, post in state.posts.items():
            yield from self._of_stage(owner, post, state.nodes.get(owner, ""))
        for (owner, stage), ap in self.validation_ap.items():
            if owner in self.rows:
                yield Sample(VALIDATION_AP, ap, (self.sweep, *self.rows[owner], stage))
        for (metric, tags), total in self.totals.items():
            yield Sample(metric, total, (self.sweep, *tags))

    def _of_stage(self, owner: str, post: Mapping[str, Any], node: str) -> Iterator[Sample]:
        row = self._row_of(owner)
        if owner not in self.rows:
            return
        tags = (self.sweep, *row, str(post["stage"]), node)
        yield Sample(PROGRESS, post["step"] / max(post["steps"], 1), tags)
        for metric, fact in OF_POSTS.items():
            if (value := post.get(fact)) is not None:
                yield Sample(metric, float(value), tags)


_of_process = Outlet()
_store_errors: Counter[str] = Counter()


def store_request(operation: Callable[P, R]) -> Callable[P, R]:
    """Decorates a request to the store: it is repeated while the store cannot answer (`outages.patiently`), and every
    failure is counted, unless it is only that there is no such file."""

    @functools.wraps(operation)
    def call(*args: P.args, **options: P.kwargs) -> R:
        request = functools.partial(operation, *args, **options)
        return patiently(request, lambda: _count_store_error(operation.__name__))

    return call


def _count_store_error(operation: str) -> None:
    _store_errors[operation] += 1
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # a command that uses the store without Ray: nobody would read it
        return
    _of_process.show([Sample(STORE_ERRORS, _store_errors[operation], (operation,))])
