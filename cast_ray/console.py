"""What the commands share: how they refuse bad input and end when they are interrupted."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def plain_console(width: int = 120, *, stderr: bool = False) -> Console:
    """The console of a command: as wide as the terminal, or `width` where the output goes to a file or a pipe.

    Markup is off, because most of what is printed holds names and paths that users chose: `[a]` is text, not a style.
    """
    console = Console(markup=False, stderr=stderr)
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
