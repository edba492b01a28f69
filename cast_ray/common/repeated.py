"""A look at something from time to time, beside what a block of code does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(look: Callable[[], bool], every_s: float) -> Iterator[None]:
    """Calls `look` on a thread every `every_s` seconds until it returns True or the block ends.

    The block's end waits for a call that is under way.
    """
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_s):
            if look():
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
