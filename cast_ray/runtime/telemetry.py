"""Live progress of a sweep: a table that redraws on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cast_ray.stages.graph import SweepPlan

POLL_S = 1.0
LINE_EVERY_S = 20.0


class ProgressDisplay:
    """Polls the broker's board while the sweep runs: row, stage, step, loss, images/s, time left.

    Use as a context manager around the sweep; it never raises into it.
    """

    def __init__(self, console: Console, broker: Any, plan: SweepPlan, row_names: list[str]):
        self.console, self.broker, self.plan, self.row_names = console, broker, plan, row_names
        self.began = time.monotonic()
        self.steps_found = sum(s.steps for f, s in plan.unique.items() if f in plan.stored)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.seen: dict[str, str] = {}
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
            return ray.get(self.broker.board.remote(), timeout=5)
        except Exception:  # Ray is starting or going down: there is nothing to show, and nothing to break
            return None

    def _left(self, board: dict[str, Any]) -> str:
        """Overall share of optimiser steps and the time left at the pace so far."""
        unique = self.plan.unique
        done = sum(s.steps for f, s in unique.items() if f in board["done"])
        running = [p for p in board["posts"].values() if p["unit"] == "step" and p["fingerprint"] not in board["done"]]
        done += sum(p["step"] for p in running)
        new, total = done - self.steps_found, self.plan.steps_unique
        elapsed = time.monotonic() - self.began
        left = f", about {_clock((total - done) * elapsed / new)} left" if new > 0 else ""
        return f"{done} of {total} steps, {_clock(elapsed)} so far{left}"

    def _table(self, board: dict[str, Any]) -> Table:
        table = Table(title=self._left(board), title_justify="left", box=None, pad_edge=False)
        for column in ("row", "stage", "progress", "loss", "images/s", "stage left"):
            table.add_column(column, justify="left" if column in ("row", "stage") else "right")
        for name in self.row_names:
            post = board["posts"].get(name)
            if post is None:
                state = "done" if name in board["ended"] else "waiting" if name in board["waiting"] else "starting"
                table.add_row(name, f"[dim]{state}[/dim]", "", "", "", "")
            else:
                table.add_row(name, *_cells(post))
        return table

    def _lines(self, board: dict[str, Any]) -> None:
        due = time.monotonic() - self.lined > LINE_EVERY_S
        for name in self.row_names:
            post = board["posts"].get(name)
            stage = post["stage"] if post else "ended" if name in board["ended"] else ""
            if stage and (stage != self.seen.get(name) or (due and post)):
                self.seen[name] = stage
                cells = _cells(post) if post else (stage,)
                self.console.print(
                    f"{_clock(time.monotonic() - self.began)}  {name}  " + "  ".join(c for c in cells if c)
                )
        if due:
            self.lined = time.monotonic()
            self.console.print(f"{_clock(time.monotonic() - self.began)}  {self._left(board)}")


def _cells(post: dict[str, Any]) -> tuple[str, str, str, str, str]:
    unit = "img" if post["unit"] == "image" else ""
    rate = post.get("images_per_s")
    loss = post.get("loss")
    step = post["step"]
    pace = (step - post["first_step"]) / max(post["stage_s"], 1e-9)
    left = _clock((post["steps"] - step) / pace) if pace > 0 else ""
    return (
        post["stage"],
        f"{step}/{post['steps']} {unit}".strip(),
        f"{loss:.2f}" if loss is not None else "",
        f"{rate:.0f}" if rate is not None else "",
        left,
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
