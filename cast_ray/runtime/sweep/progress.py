"""Live progress of a sweep: a table that redraws on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cast_ray.plan.graph import SweepPlan

POLL_S = 1.0
LINE_EVERY_S = 20.0


class Pace:
    """Time left at the pace so far, once that means something.

    The clock starts at the first progress seen, not before: start-up and the first batch say nothing about the rest.
    Until `min_s` have passed since then, and a fiftieth of the work or `enough_s`, there is no estimate.
    """

    def __init__(self, min_s: float = 20.0, enough_s: float = 300.0):
        self.min_s, self.enough_s = min_s, enough_s
        self.begun: int | None = None
        self.start: tuple[float, int] | None = None

    def left_s(self, now: float, done: int, total: int) -> float | None:
        """Seconds left after `done` of `total` units at time `now`; None while an estimate would be a guess."""
        if self.begun is None or done < self.begun:  # the first look, or a restart from an earlier checkpoint
            self.begun, self.start = done, None
        if self.start is None:
            if done > self.begun:
                self.start = (now, done)
            return None
        elapsed, moved = now - self.start[0], done - self.start[1]
        if moved <= 0 or elapsed < self.min_s or (moved < (total - self.begun) / 50 and elapsed < self.enough_s):
            return None
        return max(total - done, 0) * elapsed / moved


class ProgressDisplay:
    """Polls the broker's board while the sweep runs: row, stage, step, loss, images/s, time left.

    Use as a context manager around the sweep; it never raises into it.
    """

    def __init__(self, console: Console, broker: Any, plan: SweepPlan, row_names: list[str]):
        self.console, self.broker, self.plan, self.row_names = console, broker, plan, row_names
        self.began = time.monotonic()
        self.pace = Pace()
        self.stage_paces: dict[tuple[str, str], Pace] = {}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.seen: dict[str, str] = {}
        self.finished: list[str] = []
        """Fingerprints of the stages that were finished since the sweep began; the board tells of new ones only."""
        self.broker_id, self.num_read = "", 0
        """Whose board was seen last, and the number of the last notice on it."""
        self.lined = 0.0

    def __enter__(self) -> ProgressDisplay:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.thread.join(timeout=10)

    def _run(self) -> None:
        if self.console.is_terminal:
            with Live(console=self.console, auto_refresh=False, transient=True) as live:
                while not self.stopped.wait(POLL_S):
                    if (board := self._board()) is not None:
                        live.update(self._table(board), refresh=True)
        else:
            while not self.stopped.wait(POLL_S):
                if (board := self._board()) is not None:
                    self._lines(board)

    def _board(self) -> dict[str, Any] | None:
        try:
            board = ray.get(self.broker.board.remote(len(self.finished), self.num_read), timeout=5)
            if board["broker"] != self.broker_id:  # the first one, or one that has replaced another and counts anew
                board = ray.get(self.broker.board.remote(), timeout=5)
                self.broker_id, self.finished = board["broker"], []
        except Exception:  # Ray is starting or going down: there is nothing to show, and nothing to break
            return None
        self.finished += board["done"]
        for number, row, text in board["notices"]:
            self.num_read = number
            self._say(f"{row or 'sweep'}  {text}")
        return board | {"done": self.plan.stored.union(self.finished)}

    def _left(self, board: dict[str, Any]) -> str:
        """Overall share of optimiser steps and the time left at the pace so far."""
        unique = self.plan.unique
        done = sum(s.steps for f, s in unique.items() if f in board["done"])
        running = [p for p in board["posts"].values() if p["unit"] == "step" and p["fingerprint"] not in board["done"]]
        done += sum(p["step"] for p in running)
        total, now = self.plan.steps_unique, time.monotonic()
        left_s = self.pace.left_s(now, done, total)
        left = f", about {_clock(left_s)} left" if left_s is not None else ""
        return f"{done} of {total} steps, {_clock(now - self.began)} so far{left}"

    def _stage_left(self, name: str, post: dict[str, Any]) -> str:
        pace = self.stage_paces.setdefault((name, post["fingerprint"]), Pace(min_s=5.0, enough_s=60.0))
        left_s = pace.left_s(time.monotonic(), post["step"], post["steps"])
        return _clock(left_s) if left_s is not None else ""

    def _table(self, board: dict[str, Any]) -> Table:
        table = Table(title=self._left(board), title_justify="left", box=None, pad_edge=False)
        for column in ("row", "stage", "progress", "loss", "images/s", "stage left"):
            table.add_column(column, justify="left" if column in ("row", "stage") else "right")
        for name in self.row_names:
            post = board["posts"].get(name)
            if post is None:
                table.add_row(Text(name), Text(_state(name, board), "dim"), "", "", "", "")
            else:
                table.add_row(Text(name), *_cells(post), self._stage_left(name, post))
        return table

    def _lines(self, board: dict[str, Any]) -> None:
        due = time.monotonic() - self.lined > LINE_EVERY_S
        for name in self.row_names:
            post = board["posts"].get(name)
            left = self._stage_left(name, post) if post else ""  # asked at every look, printed when due
            room = board["rooms"].get(name)
            stage = post["stage"] if post else room["what"] if room else "ended" if name in board["ended"] else ""
            if stage and (stage != self.seen.get(name) or (due and (post or room))):
                self.seen[name] = stage
                cells = (*_cells(post), left and f"{left} left") if post else (_state(name, board) if room else stage,)
                self._say(f"{name}  " + "  ".join(c for c in cells if c))
        overall = self._left(board)
        if due:
            self.lined = time.monotonic()
            self._say(overall)

    def _say(self, text: str) -> None:
        """Prints a line with the time since the sweep began."""
        self.console.print(f"{_clock(time.monotonic() - self.began)}  {text}", markup=False, soft_wrap=True)


def _state(name: str, board: dict[str, Any]) -> str:
    """What a row does that runs no stage."""
    if room := board["rooms"].get(name):
        why = f" ({room['why']})" if room["why"] else ""
        return f"waits for {room['what']} since {_duration(room['seconds'])}{why}"
    return board["ended"].get(name) or ("waiting" if name in board["waiting"] else "starting")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _cells(post: dict[str, Any]) -> tuple[str, str, str, str]:
    unit = "img" if post["unit"] == "image" else ""
    rate = post.get("images_per_s")
    loss = post.get("loss")
    return (
        post["stage"],
        f"{post['step']}/{post['steps']} {unit}".strip(),
        f"{loss:.2f}" if loss is not None else "",
        f"{rate:.0f}" if rate is not None else "",
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
