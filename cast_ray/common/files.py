"""Local files that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cast_ray.common.text import first_of

MAX_NAMED = 3
"""Foreign files that a message names."""
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


@contextmanager
def replaced_together(path: str | Path) -> Iterator[Path]:
    """Gives the path of a file to write in a new folder, and moves all files of the folder beside `path` at the end.

    For a file with companions, such as the weights of a model that is larger than one file may be: the file itself
    comes last. Where the block fails, whatever was there before stays. The folder of `path` is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=PARTIAL) as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))


def check_replaceable(
    folder: str | Path, names: Sequence[str], is_ours: Callable[[], bool], what: str, expected: str
) -> None:
    """Checks, before anything is computed, that results do not replace the files of somebody else.

    Args:
        folder: the output folder, which may be missing yet.
        names: of the files in it that would be replaced; those that are missing count for nothing.
        is_ours: whether an earlier run of the same command has written them. An OSError or a ValueError means no.
        what: the command writes, for the message.
        expected: the end of the message.

    Raises:
        ValueError: one of the files is there, and something else has written it.
    """
    found = [name for name in names if (Path(folder) / name).exists()]
    if not found:
        return
    try:
        if is_ours():
            return
    except (OSError, ValueError):
        pass
    raise ValueError(
        f"{folder} holds something other than {what} ({first_of(sorted(found), MAX_NAMED)}): expected {expected}"
    )


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes one file: who reads it meanwhile, such as a browser that reloads, sees the old content or the new."""
    with replaced(path) as partial:
        # Half of a surrogate pair, which JSON can hold, is no character.
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
