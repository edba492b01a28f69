"""What all commands share: how they read and refuse their arguments, the options of several of them, how they end."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rich.console import Console

from cast_ray.common.outages import is_outage
from cast_ray.common.text import FOLDER_NAME_RULE, is_folder_name
from cast_ray.contracts.instance import SCORE_THRESHOLD

if TYPE_CHECKING:  # it loads pydantic, which the first page does without
    from cast_ray.plan.prices import Prices

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = {
    0: "done",
    EXIT_FAILED: "the result is bad or missing: a row failed, no image was read, a run would refuse the dataset",
    EXIT_BAD_INPUT: "the arguments or the files cannot be used",
    EXIT_STOPPED: "stopped by a limit such as --budget-hours",
    EXIT_INTERRUPTED: "stopped by Ctrl-C",
}
"""What the exit codes mean, of all commands."""
STORAGE_VARIABLE = "CAST_RAY_STORAGE"
INTERRUPTED_IMAGES = "stopped; the same command resumes with the images that are not finished"
TEACHER_CHOICES = {"permissive": {"teacher.kind": "grounded_sam"}}
"""What --teacher names -> the recipe keys that it sets. permissive: MM-Grounding-DINO and SAM2.1, both Apache-2.0."""
STUDENT_HELP = "folder of a saved student, a row runs/<name>/<row>, a URI or a hub name"
ADDRESS_HELP = "Ray cluster; 'local' starts one for this command alone (default: $RAY_ADDRESS, else local)"

N = TypeVar("N", int, float, tuple[str, float], tuple[int | None, int])


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments; what is wrong with them is one line, as with all other bad input.

    Every command ends its help with the exit codes, which are the same for all.
    """

    def __init__(self, **settings: Any):
        settings.setdefault("epilog", f"{exit_codes_text()} --verbose logs what happens inside.")
        super().__init__(**settings)
        self.register("type", None, not_empty)  # how values are read of which an option says nothing else

    def add_commands(self) -> argparse._SubParsersAction[Parser]:
        """Returns what the command's own commands are added to, one of which must be named."""
        commands = self.add_subparsers(dest="command", required=True)
        commands.type = str  # what follows the command is read, and refused, by the command's own parser
        return commands

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see {self.prog} --help)\n")


class _AppendOverride(argparse.Action):
    """Adds a --set to those before it; one of a word that is an option of the same command is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        key, _, value = str(values).partition("=")
        flag = f"--{key.strip().replace('_', '-')}"
        if flag in parser._option_string_actions:
            parser.error(f"argument --set: {key.strip()} is no recipe key: expected {flag} {value}".rstrip())
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def exit_codes_text() -> str:
    """Returns the sentence on exit codes that every command's help ends with."""
    return f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}."


def plain_console(width: int = 120, *, stderr: bool = False) -> Console:
    """Returns the console of a command: as wide as the terminal, or `width` where the output goes to a file or a pipe.

    Markup and emoji codes are off, because most of what is printed holds names and paths that users chose: `[a]` and
    `:car:` are text.
    """
    console = Console(markup=False, emoji=False, stderr=stderr)
    if not console.file.isatty():
        console.width = width
    return console


def exit_code(command: Callable[[], int], interrupted: str = "stopped") -> int:
    """Runs a command and returns its exit code.

    A ValueError reports bad input: it becomes one line on stderr and EXIT_BAD_INPUT; so does an object store that does
    not answer for minutes, with EXIT_FAILED. Ctrl-C: see `interruptible`.
    """

    def fail(message: str, code: int) -> int:
        plain_console(stderr=True).print(f"error: {message}", style="red", highlight=False, soft_wrap=True)
        return code

    def checked() -> int:
        try:
            return command()
        except ValueError as error:
            return fail(str(error), EXIT_BAD_INPUT)
        except OSError as error:
            if not is_outage(error):
                raise
            return fail(f"an object store does not answer, run the same command again later: {error}", EXIT_FAILED)

    return interruptible(checked, interrupted)


def interruptible(command: Callable[[], int], interrupted: str = "stopped") -> int:
    """Runs a command and returns its exit code; Ctrl-C prints `interrupted` on stderr and becomes EXIT_INTERRUPTED."""
    try:
        return command()
    except KeyboardInterrupt:
        plain_console(stderr=True).print(interrupted)
        return EXIT_INTERRUPTED


def add_recipe_options(
    parser: argparse.ArgumentParser, *, of: str = "", preset: str | None = None, scale: str | None = None
) -> None:
    """Adds the options that choose a recipe.

    Args:
        of: what gives the preset and the scale if the user names none (table or search), for the help.
        preset, scale: the defaults, where it is the command that has them.
    """
    from cast_ray.recipe import SCALES, preset_names  # not needed by `cast-ray --help`, which is to be quick

    defaults = [preset, scale] if preset and scale else [f"the {of}'s, else {name}" for name in ("shapes", "demo")]
    for flag, known, value, words in zip(("--preset", "--scale"), (preset_names(), SCALES), (preset, scale), defaults):
        parser.add_argument(flag, default=value, help=f"one of {', '.join(known)} (default: {words})")
    add_set_option(parser)


def add_teacher_option(parser: argparse.ArgumentParser) -> None:
    """Adds --teacher, a short form of --set teacher.kind; `recipe_overrides` reads it, `check_teacher` its rows."""
    parser.add_argument(
        "--teacher",
        choices=list(TEACHER_CHOICES),
        help="permissive: MM-Grounding-DINO and SAM2.1, under Apache-2.0; short for --set teacher.kind=grounded_sam",
    )


def check_teacher(teacher: str | None, kinds: Iterable[str]) -> None:
    """Checks that no row or trial has another teacher than the one that --teacher asks for.

    Args:
        teacher: value of --teacher; None: it was not given.
        kinds: `teacher.kind` of all rows or trials.

    Raises:
        ValueError: one is another.
    """
    for key, value in TEACHER_CHOICES.get(teacher or "", {}).items():
        if others := sorted(set(kinds) - {value}):
            raise ValueError(
                f"--teacher {teacher} and a row or trial with {key}={others[0]}: expected {key}={value} everywhere, or "
                "no --teacher"
            )


def add_set_option(parser: argparse._ActionsContainer, help_text: str = "override a recipe key") -> None:
    """Adds --set, which may be given several times; `parse_overrides` reads it."""
    parser.add_argument("--set", action=_AppendOverride, default=[], metavar="KEY=VALUE", help=help_text)


def add_run_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options that say where a run is kept; `name`: the form of its default name."""
    parser.add_argument("--name", type=run_name, help=f"name of the run (default: {name})")
    parser.add_argument(
        "--out", help="path or URI (s3://...) for results and reports (default: runs; in a Ray job STORAGE/runs)"
    )
    add_storage_option(parser)


def add_storage_option(parser: argparse.ArgumentParser) -> None:
    """Adds --storage; `storage_path` reads it."""
    parser.add_argument(
        "--storage",
        help="path or URI (s3://...) for artifacts and checkpoints, reachable from every node; default: "
        f"${STORAGE_VARIABLE}, else ./storage (in a Ray job ~/cast_ray/storage)",
    )


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say on which Ray, and on how much of it, stages run."""
    parser.add_argument("--address", help=ADDRESS_HELP)
    parser.add_argument("--num-cpus", type=positive, help="logical CPUs of a local Ray (default: the machine's)")
    parser.add_argument(
        "--max-concurrent",
        type=whole_number,
        metavar="N",
        help="stages at a time (default: what a local Ray holds; on a cluster what the rows need, at most 32)",
    )
    parser.add_argument(
        "--workers-per-trial",
        type=worker_counts,
        metavar="N",
        help="Train workers of a stage; A:B for one row and one seed: as many from A to B as find room (default: 1)",
    )


def recipe_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what --set and the options of `add_ray_options` and `add_teacher_option` change in a recipe.

    Raises:
        ValueError: a --set that is not key=value, or that contradicts --teacher.
    """
    from cast_ray.recipe import parse_overrides

    named = {
        "runtime.min_workers": arguments.workers_per_trial and arguments.workers_per_trial[0],
        "runtime.num_workers": arguments.workers_per_trial and arguments.workers_per_trial[1],
        "runtime.max_concurrent_stages": arguments.max_concurrent,
    }
    overrides = parse_overrides(arguments.set)
    for key, value in TEACHER_CHOICES.get(arguments.teacher, {}).items():
        if overrides.get(key, value) != value:
            given = f"--teacher {arguments.teacher} and --set {key}={overrides[key]}"
            raise ValueError(f"{given}: expected {key}={value}, or only one of the two")
        overrides[key] = value
    return overrides | {key: str(value) for key, value in named.items() if value is not None}


def add_tracker_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the options of experiment trackers; `what`: they are told of, for the help."""
    trackers = parser.add_argument_group("trackers")
    trackers.add_argument("--no-tensorboard", action="store_true", help="no event files in <run>/tensorboard")
    trackers.add_argument("--wandb", metavar="PROJECT", help=f"log {what} to this Weights & Biases project")
    trackers.add_argument("--mlflow", metavar="URI", help=f"log {what} to MLflow: http://SERVER, sqlite:///FILE")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that read images and write what a model finds in them."""
    parser.add_argument("images", nargs="+", help="files, folders, quoted patterns, local or s3://...")
    parser.add_argument("--out", required=True, help="path or URI of the folder for the results")
    parser.add_argument("--threshold", type=share, default=SCORE_THRESHOLD, help="least score (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument("--no-overlays", action="store_true", help="do not draw the instances over the images")
    parser.add_argument(
        "--workers", type=whole_number, default=0, help="processes of a Ray cluster (default: 0, this process)"
    )
    parser.add_argument("--address", help="Ray cluster of --workers (default: $RAY_ADDRESS, else a local one)")


def add_device_options(parser: argparse.ArgumentParser, amp: str) -> None:
    """Adds the options of commands that run a model in this process; `amp`: what `auto` means for them."""
    parser.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help=f"precision; auto: {amp} (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def not_empty(text: str) -> str:
    """Reads an argument that is any text; an empty one is mostly a variable of the shell that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a value, got {text!r}")
    return text


def whole_number(text: str) -> int:
    """Reads an argument that is 0, 1, 2, ..."""
    return _read(text, int, lambda number: number >= 0, "a whole number from 0 on")


def random_seed(text: str) -> int:
    """Reads an argument that is a seed of random numbers."""
    from cast_ray.recipe.part import END_OF_SEEDS  # not needed by `cast-ray --help`, which is to be quick

    return _read(text, int, lambda number: 0 <= number < END_OF_SEEDS, "a whole number from 0 on and below 2^63")


def positive(text: str) -> int:
    """Reads an argument that is 1, 2, ..."""
    return _read(text, int, lambda number: number >= 1, "a whole number, 1 or more")


def inner_share(text: str) -> float:
    """Reads an argument between 0 and 1, without these two."""
    return _read(text, float, lambda number: 0 < number < 1, "a number between 0 and 1")


def worker_counts(text: str) -> tuple[int | None, int]:
    """Reads a number of workers (`4`) or the least and the most of an elastic run (`1:8`) as (least, most)."""

    def read(given: str) -> tuple[int | None, int]:
        least, colon, most = given.rpartition(":")
        return int(least) if colon else None, int(most)

    expected = "a whole number, 1 or more, or the least and the most workers such as 1:8"
    return _read(text, read, lambda counts: 1 <= (counts[0] or counts[1]) <= counts[1] and counts[0] != 0, expected)


def share(text: str) -> float:
    """Reads an argument from 0 to 1, such as a score."""
    return _read(text, float, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def amount(text: str) -> float:
    """Reads an argument that is 0 or more, such as hours or a price."""
    return _read(text, float, lambda number: 0 <= number < math.inf, "a number from 0 on")


def positive_amount(text: str) -> float:
    """Reads an argument that is more than 0, such as the seconds between two looks."""
    return _read(text, float, lambda number: 0 < number < math.inf, "a number above 0")


def price(text: str) -> tuple[str, float]:
    """Reads a price of a device-hour, of all devices (`1.2`) or of one model (`A10G=1.01`)."""

    def read(given: str) -> tuple[str, float]:
        model, equals, number = given.rpartition("=")
        if equals and not model.strip():
            raise ValueError("no model")
        return model.strip(), float(number)

    return _read(text, read, lambda named: 0 <= named[1] < math.inf, "a price such as 1.2 or A10G=1.01")


def add_price_option(group: argparse._ActionsContainer) -> None:
    """Adds the prices by which plans and reports tell what device-hours cost."""
    group.add_argument(
        "--price-per-gpu-hour",
        nargs="+",
        type=price,
        metavar="[MODEL=]P",
        help="price of a device-hour, or of one model's as A10G=1.01 (words of what reports call it)",
    )


def prices_of(arguments: argparse.Namespace) -> Prices | None:
    """The prices that a command line names; None: it names none.

    Raises:
        ValueError: it names two for one model.
    """
    from cast_ray.plan.prices import Prices

    named = arguments.price_per_gpu_hour
    if named is None:
        return None
    models = [model.lower() for model, _ in named]
    if len(set(models)) < len(models):
        words = " ".join(f"{model}={number:g}" if model else f"{number:g}" for model, number in named)
        raise ValueError(f"--price-per-gpu-hour: expected one price for each model, got {words}")
    return Prices(dict(named))


def is_ray_job() -> bool:
    """Whether this command was submitted to a cluster: its folder is deleted when it ends."""
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def default_folder() -> Path:
    """Returns a folder of this machine that outlives the command: the current one or, inside a Ray job, of $HOME."""
    return Path.home() / "cast_ray" if is_ray_job() else Path()


def keep_wandb_here() -> None:
    """Has W&B keep its offline runs on this machine, where results are in an object store: they are sent from here
    after the command has ended."""
    os.environ.setdefault("WANDB_DIR", str(default_folder().absolute()))


def storage_path(text: str | None) -> str:
    """Returns the path or URI of the store that --storage names, else the variable, else the default folder."""
    return text or os.environ.get(STORAGE_VARIABLE) or str(default_folder() / "storage")


def run_name(text: str) -> str:
    """Returns the name of a run, which is that of its folder.

    Raises:
        argparse.ArgumentTypeError: it names a place elsewhere, or is too long.
    """
    if not is_folder_name(text):
        raise argparse.ArgumentTypeError(f"{FOLDER_NAME_RULE}, got {text!r}")
    return text


def runs_place(text: str | None, storage: str) -> str:
    """Returns the path or URI of the folder of all runs that --out names; by default `runs`, which lies in the current
    folder or, inside a Ray job, below the storage path, where it outlives the job and its cluster.

    Args:
        storage: path or URI of the store.

    Raises:
        ValueError: a URI of no known kind, a file, or a place that cannot be written.
    """
    from cast_ray.common.paths import below  # pyarrow, which --help does without

    return results_place(text or (below(storage, "runs") if is_ray_job() else "runs"))


def results_place(place: str) -> str:
    """Returns the path or URI of the folder that `--out` names, which may be missing yet.

    Raises:
        ValueError: a URI of no known kind, a file, or a place that cannot be written.
    """
    from cast_ray.common.paths import local_path

    try:
        local = local_path(place)
    except (ValueError, OSError) as error:
        raise ValueError(f"--out {place}: {str(error).removeprefix(f'{place}: ')}") from None
    return place if local is None else str(output_folder(local))


def tell_report_command(run: str, is_remote: bool, console: Console) -> None:
    """Says, at the end of a job or where the results are in an object store, how a user gets the report of a run.

    Args:
        run: path or URI of its folder.
        is_remote: whether that is a URI.
    """
    if is_remote or is_ray_job():
        console.print(f"Write it again: cast-ray report {shlex.quote(run)}", soft_wrap=True, highlight=False)
    if is_remote:
        fetch = f"cast-ray report {shlex.quote(run)} --out {shlex.quote(run.partition('?')[0].rpartition('/')[2])}"
        console.print(f"Fetch it to your machine: {fetch}", soft_wrap=True, highlight=False)


def output_folder(text: str) -> Path:
    """Returns the folder that `--out` names, which may be missing yet.

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
    """Returns the file that `--out` names; it may be there already.

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
