"""Requests to an object store that does not answer for a while are sent again, after longer and longer pauses.

pyarrow itself repeats a request for about 6 seconds, which bridges a lost connection. A store that throttles, restarts
or is cut off needs minutes.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cast_ray.common.text import first_line

R = TypeVar("R")

logger = logging.getLogger(__name__)

PATIENCE_S = 180.0
"""Seconds after its first failure for which a request is tried again."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 20.0
_OUTAGE = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|THROTTLING"
    r"|HTTP status (429|5\d\d)|curlCode|[Tt]imed? ?out|UNAVAILABLE|Connection (reset|refused)"
)
"""What pyarrow's filesystems say of a store that cannot answer now. Other errors (no permission, no such bucket) would
come again."""


class _Patience(threading.local):
    is_off = False


_patience = _Patience()


def is_outage(error: OSError) -> bool:
    """Returns whether an error says that an object store cannot answer now, and not that the request is wrong."""
    # Errors of local files have a number.
    return error.errno is None and _OUTAGE.search(str(error)) is not None


def patiently(request: Callable[[], R], on_failure: Callable[[], None] = lambda: None) -> R:
    """Returns what a request to a store returns, and repeats it while the store cannot answer.

    Args:
        request: may be repeated, because it leads to the same state however often it is carried out.
        on_failure: called after every failure that is an error of the store.

    Raises:
        OSError: the store did not answer for PATIENCE_S, or the error is another one.
    """
    began, pause_s = None, FIRST_PAUSE_S
    while True:
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            on_failure()
            now = time.monotonic()
            began = now if began is None else began
            if _patience.is_off or not is_outage(error) or now - began >= PATIENCE_S:
                raise
            logger.warning("a store does not answer, the request is sent again: %s", first_line(error))
            # Processes that met the outage together do not come back together.
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


@contextmanager
def without_patience() -> Iterator[None]:
    """Inside the block, requests of this thread are not repeated: who has mistyped an address is told at once."""
    before, _patience.is_off = _patience.is_off, True
    try:
        yield
    finally:
        _patience.is_off = before
