"""Progress of a long read: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 20.0
"""A read that is over before the first line is due leaves none."""


@contextmanager
def track(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the progress that is reported to the function it gives: (done, total)."""
    if not console.is_terminal:
        yield _Lines(console, what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, console: Console, what: str):
        self.console, self.what = console, what
        self.began = self.lined = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.lined < LINE_EVERY_S:
            return
        self.lined = now
        left = f", about {(now - self.began) * (total - done) / done:.0f} s left" if done else ""
        self.console.print(f"{self.what}: {done:,} of {total:,}{left}", highlight=False)
