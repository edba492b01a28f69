"""What the commands share: how they refuse bad input and end when they are interrupted."""

from __future__ import annotations

from collections.abc import Callable

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
