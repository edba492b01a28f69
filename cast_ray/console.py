"""What the commands share: how they read and refuse their arguments, and how they end when they are interrupted."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def exit_code(command: Callable[[], int], interrupted: str = "stopped") -> int:
    """Runs a command and returns its exit code.

    A ValueError is the user's: one line on stderr and EXIT_BAD_INPUT. Ctrl-C: `interrupted` and EXIT_INTERRUPTED.
    """
    errors = Console(stderr=True)
    try:
        return command()
    except ValueError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        errors.print(interrupted)
        return EXIT_INTERRUPTED


def whole_number(text: str) -> int:
    """An argument that is 0 or more."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """An argument that is 1 or more."""
    return _at_least(1, text)


def share(text: str) -> float:
    """An argument from 0 to 1, such as a score."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")
    return number


def output_folder(text: str) -> Path:
    """The folder that `--out` names, which may be missing yet.

    Raises:
        ValueError: a URI, a file, or a place that cannot be written.
    """
    if "://" in text:
        raise ValueError(f"--out {text}: expected a local folder; copy it to an object store afterwards")
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"--out {text}: expected a folder, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {text}: {there} cannot be written")
    return path


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text}: expected {least} or more")
    return number
