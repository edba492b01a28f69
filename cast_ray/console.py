"""What the commands share: how they read and refuse their arguments, and how they end when they are interrupted."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130

N = TypeVar("N", int, float)


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments; what is wrong with them is one line, as with all other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see {self.prog} --help)\n")


def plain_console(width: int = 120, *, stderr: bool = False) -> Console:
    """The console of a command: as wide as the terminal, or `width` where the output goes to a file or a pipe.

    Markup and emoji codes are off, because most of what is printed holds names and paths that users chose: `[a]` and
    `:car:` are text.
    """
    console = Console(markup=False, emoji=False, stderr=stderr)
    if not console.file.isatty():
        console.width = width
    return console


def exit_code(command: Callable[[], int], interrupted: str = "stopped") -> int:
    """Runs a command and returns its exit code.

    A ValueError is the user's: one line on stderr and EXIT_BAD_INPUT. Ctrl-C: `interrupted` and EXIT_INTERRUPTED.
    """
    errors = plain_console(stderr=True)
    try:
        return command()
    except ValueError as error:
        errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        errors.print(interrupted)
        return EXIT_INTERRUPTED


def whole_number(text: str) -> int:
    """Reads an argument that is 0, 1, 2, ..."""
    return _read(text, int, lambda number: number >= 0, "a whole number from 0 on")


def positive(text: str) -> int:
    """Reads an argument that is 1, 2, ..."""
    return _read(text, int, lambda number: number >= 1, "a whole number, 1 or more")


def share(text: str) -> float:
    """Reads an argument from 0 to 1, such as a score."""
    return _read(text, float, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def amount(text: str) -> float:
    """Reads an argument that is 0 or more, such as hours or a price."""
    return _read(text, float, lambda number: 0 <= number < math.inf, "a number from 0 on")


def positive_amount(text: str) -> float:
    """Reads an argument that is more than 0, such as the seconds between two looks."""
    return _read(text, float, lambda number: 0 < number < math.inf, "a number above 0")


def output_folder(text: str) -> Path:
    """The folder that `--out` names, which may be missing yet.

    Raises:
        ValueError: a URI, a file, or a place that cannot be written.
    """
    if "://" in text:
        raise ValueError(f"--out {text}: expected a local path; copy the results to an object store afterwards")
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"--out {text}: expected a folder, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {text}: the folder {there} cannot be written")
    return path


def output_file(text: str) -> Path:
    """The file that `--out` names; it may be there already.

    Raises:
        ValueError: a URI, a folder, or a place that cannot be written.
    """
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"--out {text}: expected a file, found a folder")
    output_folder(text if "://" in text else str(path.parent))
    return path


def _read(text: str, read: Callable[[str], N], is_valid: Callable[[N], bool], expected: str) -> N:
    try:
        number = read(text)
    except ValueError:
        number = None
    if number is None or not is_valid(number):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number
