"""Local files that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ending of a file that is being written; what a killed process leaves behind can be deleted."""


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Gives the path of a file to write, beside `path`, and renames it to `path` when the block ends without an error.

    Until then, and for good where the block fails, whatever `path` held before stays there. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes one file: who reads it meanwhile, such as a browser that reloads, sees the old content or the new."""
    with replaced(path) as partial:
        # Half of a surrogate pair, which JSON can hold, is no character.
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
