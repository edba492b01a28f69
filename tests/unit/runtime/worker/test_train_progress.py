"""The pace that a training stage posts: steps per second, and the share of the time spent waiting for batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cast_ray.runtime.worker import train_progress as module
from cast_ray.runtime.worker.train_progress import TimedBatches, TrainProgress

ENTRY = {"loss": 1.0, "images_per_s": 8.0, "lr": 0.1}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test moves."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: found.now)
    return found


def progress(batches: Any, rank: int = 0, start_step: int = 0) -> tuple[TrainProgress, list[dict[str, Any]], Any]:
    posts: list[dict[str, Any]] = []
    post = SimpleNamespace(remote=lambda owner, facts, entries=(): posts.append(facts))
    broker = SimpleNamespace(post=post, begin=post)
    segment: Any = SimpleNamespace(broker=broker, owner="row")
    stage: Any = SimpleNamespace(name="distill", fingerprint="f", steps=100)
    timed = TimedBatches(iter(batches))
    return TrainProgress(segment, stage, rank, None, timed, start_step), posts, timed


def test_pace_and_waiting_are_those_since_the_last_post(clock: SimpleNamespace) -> None:
    def batches() -> Any:
        for seconds in (1.0, 0.0, 3.0):
            clock.now += seconds
            yield seconds

    shown, posts, timed = progress(batches(), start_step=20)
    shown.start()
    next(timed)
    clock.now += 4.0  # a step's own work
    shown.on_log(ENTRY | {"step": 30})
    next(timed)
    clock.now += 0.5
    shown.on_log(ENTRY | {"step": 31})  # too soon after the last: not posted, and counted with the next
    next(timed)
    clock.now += 6.5
    shown.on_log(ENTRY | {"step": 50})
    assert [post["step"] for post in posts] == [20, 30, 50]
    assert "steps_per_s" not in posts[0]
    assert (posts[1]["steps_per_s"], posts[1]["data_wait"]) == (pytest.approx(2.0), pytest.approx(0.2))
    assert (posts[2]["steps_per_s"], posts[2]["data_wait"]) == (pytest.approx(2.0), pytest.approx(0.3))


def test_only_the_first_worker_posts_and_the_stream_ends_as_it_did(clock: SimpleNamespace) -> None:
    shown, posts, timed = progress([1, 2], rank=1)
    shown.start()
    shown.on_log(ENTRY | {"step": 10})
    assert posts == [] and list(timed) == [1, 2] and next(timed, None) is None
