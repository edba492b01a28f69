"""What `predict` and `label` share: which images they are asked for, and a run over them that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cast_ray.cli.options import results_place
from cast_ray.cli.unfinished import FinishedImages
from cast_ray.common.results_folder import ResultsFolder, open_resumed_results
from cast_ray.data.reading.photos import (
    IMAGES,
    INSTANCES,
    OVERLAYS,
    RESULTS,
    describe_left_out,
    find_photos,
    output_names,
)
from cast_ray.inference.result_files import Rows, check_overlays, check_results, write_overlay

MAX_REPORTED = 10
Written = TypeVar("Written")


def list_photos(sources: Sequence[str], errors: Console, exclude: Sequence[str] = ()) -> list[str]:
    """Lists the images that a command was asked for; says on `errors` what it leaves out. See `find_photos`."""
    found = find_photos(sources, exclude)
    if found.left_out:
        errors.print(f"left out: {describe_left_out(found.left_out)}", markup=False, highlight=False, soft_wrap=True)
    return found.paths


@contextmanager
def open_image_results(place: str, command: Literal["label", "predict"]) -> Iterator[ResultsFolder]:
    """Gives the folder that `--out` names, once it is clear that a command replaces nothing but its own results.

    Of a folder in an object store a copy is written, which is sent when the block ends without an error; one that was
    stopped is resumed from the copy.

    Raises:
        ValueError: something else lies in the folder, or it cannot be read or written.
    """
    with open_resumed_results(results_place(place)) as results:
        own = (RESULTS, IMAGES, INSTANCES)
        results.fetch([""], own.__contains__)
        check_results(results.path, command)
        is_own = any((results.path / name).exists() for name in own)
        if results.is_remote and not is_own and OVERLAYS in results.names():  # they are sent after the results
            raise ValueError(f"{results.place} holds {OVERLAYS} of something else: expected another folder")
        yield results
        results.send()


def run_images(
    paths: Sequence[str],
    settings: Mapping[str, Any],
    rows_of: Callable[[list[str]], Iterator[dict[str, Any]]],
    write: Callable[[Rows], Written],
    out: Path,
    errors: Console,
) -> tuple[int, Written]:
    """Finds the instances of every image under a progress bar, then writes the results; resumes a stopped run.

    Results that the folder held before stay until the new ones are whole. Overlays are written as they come.

    Args:
        paths: paths or URIs of the images.
        settings: what decides which instances are found, and `overlays`, whether they are drawn; a stopped run is
            resumed under equal settings only.
        rows_of: gives the rows of images, in the order of the paths that it is given; see `Predictor.__call__`.
        write: writes the results of all images; may return something about them.
        out: the output folder.
        errors: where skipped images are reported.

    Returns:
        Number of images that were read, and what `write` returned.

    Raises:
        ValueError: an unfinished run of other settings or overlays of something else lie in the folder, or another
            process is writing to it.
    """
    names = dict(zip(paths, output_names(paths)))
    if settings["overlays"]:
        check_overlays(names.values(), out)
    skipped: list[tuple[str, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with FinishedImages(out, settings, names) as finished:
        missing = finished.missing
        num_before = len(paths) - len(missing)
        if num_before:
            errors.print(f"resumed: {num_before} of {len(paths)} images are finished", highlight=False)
        with Progress(*columns, console=errors) as progress:
            task = progress.add_task("images", total=len(paths), completed=num_before)
            for row in rows_of(missing) if missing else ():
                if row["error"]:
                    skipped.append((row["path"], row["error"]))
                else:
                    write_overlay(row, names, out)
                    finished.add(row)
                progress.advance(task)
        written = write(finished.rows)
        finished.remove()
    for path, reason in skipped[:MAX_REPORTED]:
        errors.print(f"skipped {path}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(skipped) > MAX_REPORTED:
        errors.print(f"... and {len(skipped) - MAX_REPORTED} more")
    return len(paths) - len(skipped), written
