"""The command `cast-ray`: lists the commands and runs the one that was named.

A command's module is imported when it is run, so that `cast-ray --help` needs neither torch nor Ray. The module itself
imports what takes long when the command does its work, so that `cast-ray COMMAND --help` does not wait for it either.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from cast_ray.cli.options import EXIT_BAD_INPUT, EXIT_CODES, interruptible, plain_console
from cast_ray.common.logs import VARIABLE, configure_logging
from cast_ray.common.version import VERSION

COMMANDS = {
    "ablate": "Runs ablation tables: all rows and seeds, and each shared stage once.",
    "search": "Searches recipe keys with Optuna; its trials share stages with each other and with tables.",
    "report": "Writes the report of a run folder again, from the files in it.",
    "store": "Lists, shows, compares and prunes the artifacts of earlier runs; their licences; runs one stage again.",
    "label": "Labels images with a teacher and writes one COCO file.",
    "predict": "Finds instances in images with a saved student.",
    "annotate": "Takes labels to an annotation tool with masks drawn, and brings the corrections back.",
    "export": "Takes a student out of a run, as a folder, an ONNX file or a model on the hub.",
    "inspect": "Shows what a dataset holds before anything is trained on it.",
    "efficiency": "Measures what teachers and students cost on this device, without training.",
}
"""Name of each command and what it does; `cast_ray/cli/<name>.py` holds it."""
VERBOSE = "--verbose"
OPTIONS = ("--help", "--version", VERBOSE)
"""What can stand in place of a command, or beside one."""

_HELP = """usage: cast-ray COMMAND [ARGUMENTS]
       cast-ray COMMAND --help

CAST (semi-supervised distillation for instance segmentation) as an ablation and sweep system on Ray.

commands:
{commands}

options:
  -h, --help   show this help and exit
  --version    show the version and exit
  --verbose    with any command: log what happens inside (claims, checkpoints, restarts) on stderr

first steps:
  cast-ray ablate losses --dry-run                 what a table would run and cost
  cast-ray ablate losses                           the demo on drawn scenes, minutes on a laptop
  cast-ray inspect DIR                             look into your own dataset
  cast-ray ablate losses --preset coco --set data.root=DIR --scale smoke

exit codes:
{exit_codes}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, see `options.EXIT_CODES`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if VERBOSE in arguments:  # wherever it stands: no command has an option of that name
        arguments.remove(VERBOSE)
        os.environ[VARIABLE] = "1"
    configure_logging()
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if name == "--version":
        print(f"cast_ray {VERSION}")
        return 0
    if name not in COMMANDS:
        if name.startswith("-"):
            message = f"unknown option {name!r}: expected a command, or one of {', '.join(OPTIONS)}"
        else:
            message = f"unknown command {name!r}: expected one of {', '.join(_nearest_first(name))}"
        message = f"error: {message} (see cast-ray --help)"
        plain_console(stderr=True).print(message, style="red", highlight=False, soft_wrap=True)
        return EXIT_BAD_INPUT
    # So that a recipe may name a reader in the user's own folder; last, so that nothing there hides a package.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    # Importing a command may take seconds, in which Ctrl-C must end without a traceback as well. Bad input is each
    # command's own to report: one of them runs code whose errors must keep their traceback.
    return interruptible(lambda: import_module(f"cast_ray.cli.{name}").main(arguments[1:]))


def help_text() -> str:
    """Returns what `cast-ray --help` prints."""
    lines = (f"  {name:<12}{sentence}" for name, sentence in COMMANDS.items())
    codes = (f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
    return _HELP.format(commands="\n".join(lines), exit_codes="\n".join(codes))


def run_renamed(old: str, new: str, argv: Sequence[str] | None = None) -> int:
    """Runs a command that was called by its former name, and says the present one on stderr.

    Args:
        old: what the user typed, for example `python -m cast_ray.predict`.
        new: the command's name.
        argv: its arguments; None: those of this process.
    """
    message = f"note: `{old}` is now `cast-ray {new}`"
    plain_console(stderr=True).print(message, highlight=False, soft_wrap=True)
    return main([new, *(sys.argv[1:] if argv is None else argv)])


def _nearest_first(word: str) -> list[str]:
    """Returns the names of all commands, those that are most like `word` first."""
    return sorted(COMMANDS, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())
