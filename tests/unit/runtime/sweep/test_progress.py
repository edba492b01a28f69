"""Time left: no estimate from start-up and first steps, a good one after that."""

from __future__ import annotations

import pytest

from cast_ray.runtime.sweep.progress import Pace


def test_start_up_and_the_first_steps_give_no_estimate() -> None:
    """30 of 3240 steps after 41 s, most of them start-up, once promised another 1:13:55."""
    pace = Pace()
    for now, done in ((1.0, 0), (21.0, 0), (33.0, 10), (41.0, 30), (50.0, 200)):
        assert pace.left_s(now, done, 3240) is None


def test_the_clock_starts_at_the_first_progress() -> None:
    pace = Pace()
    for now, done in ((0.0, 0), (30.0, 0), (31.0, 10)):
        pace.left_s(now, done, 1010)
    assert pace.left_s(61.0, 310, 1010) == pytest.approx(70.0)  # 10 steps a second from 31 s on


def test_steps_that_were_stored_before_are_no_progress() -> None:
    pace = Pace()
    assert pace.left_s(0.0, 800, 1000) is None
    assert pace.left_s(40.0, 800, 1000) is None
    assert pace.left_s(50.0, 810, 1000) is None
    assert pace.left_s(80.0, 840, 1000) == pytest.approx(160.0)


def test_long_work_is_estimated_after_some_minutes_and_a_restart_begins_again() -> None:
    pace = Pace()
    pace.left_s(0.0, 100, 1_000_000)
    pace.left_s(10.0, 110, 1_000_000)
    assert pace.left_s(200.0, 300, 1_000_000) is None
    assert pace.left_s(310.0, 410, 1_000_000) == pytest.approx(999_590.0)
    assert pace.left_s(320.0, 50, 1_000_000) is None  # a checkpoint from before the first look
    assert pace.left_s(330.0, 60, 1_000_000) is None


def test_nothing_is_left_at_the_end() -> None:
    pace = Pace()
    for now, done in ((0.0, 0), (1.0, 1)):
        pace.left_s(now, done, 100)
    assert pace.left_s(50.0, 100, 100) == 0
