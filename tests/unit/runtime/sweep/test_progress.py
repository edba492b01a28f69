"""Time left: no estimate from start-up and first steps, a good one after that."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cast_ray.plan.graph import plan_sweep
from cast_ray.runtime.sweep.progress import Pace, ProgressDisplay


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


def board_of(**room: Any) -> dict[str, Any]:
    rooms = {"row": room} if room else {}
    return {"posts": {}, "waiting": [], "rooms": rooms, "ended": {}, "done": set(), "device_s": 0.0, "stop": None}


def test_what_a_stage_waits_for_is_said() -> None:
    """On a terminal and in a log; a stage that found no room once waited for ever without a word."""
    console = Console(file=io.StringIO(), width=160)
    display = ProgressDisplay(console, None, plan_sweep([], []), ["row"])
    why = "the autoscaler says: No available node types can fulfill resource requests"
    waits = board_of(what="2 x {CPU 1, GPU 1}", why=why, seconds=190.0)
    console.print(display._table(waits))
    display._lines(waits)
    display._lines(waits)  # not again, until a while has passed
    display._lines(board_of())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count(f"waits for 2 x {{CPU 1, GPU 1}} since 3 min ({why})") == 2
    short = board_of(what="{CPU 1}", why="", seconds=12.0)
    console.print(display._table(short))
    assert "waits for {CPU 1} since 12 s  " in console.file.getvalue()  # type: ignore[attr-defined]
