"""The package's log: silent by default, on stderr with `cast-ray --verbose`.

Modules log with `logging.getLogger(__name__)` where something happens that no table shows: a claim is taken, a segment
granted, a checkpoint written, a stream given up, a worker started again.
"""

from __future__ import annotations

import logging
import os
from functools import cache

VARIABLE = "CAST_RAY_VERBOSE"
"""Environment variable that `--verbose` sets, so that the processes of a Ray that is started afterwards log as well."""
FORMAT = "%(asctime)s %(process)d %(name)s: %(message)s"


def is_verbose() -> bool:
    """Returns whether this process is to log what it does."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


@cache
def configure_logging() -> None:
    """Writes the package's log to stderr if the user asked for it; every process of a sweep calls it."""
    if not is_verbose():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    logger = logging.getLogger("cast_ray")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
