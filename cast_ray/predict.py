"""Runs a saved student over images: overlays and COCO results.

python -m cast_ray.predict PHOTOS --student runs/losses-shapes-demo/sup+semi+pxl --out OUT
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import cast_ray
from cast_ray.common.files import replaced
from cast_ray.console import Parser, exit_code, output_folder, plain_console, positive, share, whole_number
from cast_ray.contracts.records import Category
from cast_ray.data.reading.images import ImageError, read_image
from cast_ray.data.reading.photos import OVERLAYS, describe_left_out, find_photos, output_names
from cast_ray.data.views import fit_image
from cast_ray.engine.world import pick_device
from cast_ray.evaluation.coco_results import coco_result
from cast_ray.models.autocast import require_precision
from cast_ray.models.drawing import draw_instances
from cast_ray.models.postprocess import predict_in_groups
from cast_ray.models.student import CONFIG, WEIGHTS, Student
from cast_ray.recipe import InputSize, Precision
from cast_ray.runtime.store.models import open_student
from cast_ray.unfinished import FinishedImages, weights_digest

EXIT_NOTHING = 1
NUM_THREADS = 4
"""That read and draw the images of a batch beside the model."""
MAX_REPORTED = 10
INTERRUPTED = "stopped; the same command resumes with the images that are not finished"

Rows = Callable[[], Iterator[tuple[int, dict[str, Any]]]]
"""Gives, as often as it is called, (image id, row) of every image that was read; ids count from 1 over all images."""


class InstanceModel(Protocol):
    """What finds instances: a student, or a teacher."""

    categories: tuple[Category, ...]
    input_size: InputSize
    precision: Precision

    @property
    def class_names(self) -> list[str]: ...

    @property
    def colours(self) -> list[tuple[int, int, int]]: ...

    @property
    def device(self) -> torch.device: ...

    def predict(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[list[dict[str, Any]]]: ...


class Predictor:
    """A model with its settings: image files in, rows out.

    Args:
        model: on its device.
        threshold: least score of an instance.
        max_detections: at most so many per image.
        amp: precision; auto: the model's own, which for a student of a run is that of its table.
        overlays: whether rows carry the drawn image.
    """

    def __init__(
        self, model: InstanceModel, *, threshold: float, max_detections: int, amp: str = "auto", overlays: bool = True
    ):
        self.model, self.threshold, self.max_detections = model, threshold, max_detections
        self.overlays = overlays
        if amp != "auto":
            model.precision = cast(Precision, amp)
        require_precision(model.precision, model.device, "--amp")
        self.threads = ThreadPoolExecutor(NUM_THREADS)

    def __call__(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """One row per path, in order.

        Returns:
            path; height, width (pixels, 0 of a bad image); error ("" or why the image was skipped); results (JSON of
            COCO results without an image_id); overlay (PNG bytes, b"" without).
        """
        read = list(self.threads.map(read_or_reason, paths))
        good = [image for image in read if isinstance(image, np.ndarray)]
        found = iter(self._predict(good) if good else [])
        work = [(path, image, next(found) if isinstance(image, np.ndarray) else []) for path, image in zip(paths, read)]
        return list(self.threads.map(self._row, work))

    def _predict(self, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        fitted = [fit_image(image, self.model.input_size) for image in images]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        inside = [size for _, size in fitted]
        found = predict_in_groups(
            self.ask,
            [pixels for pixels, _ in fitted],
            sizes,
            inside,
            self.max_detections,
            min_score=self.threshold,
        )
        return [self.choose(instances) for instances in found]

    def ask(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[list[dict[str, Any]]]:
        """The model's instances, as of `Teacher.predict`."""
        return self.model.predict(images, image_hw, resized_hw, max_detections, min_score)

    def choose(self, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of an image that are kept."""
        return [i for i in instances if i["score"] >= self.threshold]

    def _row(self, work: tuple[str, np.ndarray | str, list[dict[str, Any]]]) -> dict[str, Any]:
        path, image, instances = work
        if isinstance(image, str):
            return {"path": path, "height": 0, "width": 0, "error": image, "results": "[]", "overlay": b""}
        overlay = b""
        if self.overlays:
            buffer = io.BytesIO()
            names, colours = self.model.class_names, self.model.colours
            draw_instances(Image.fromarray(image), instances, names, colours).save(buffer, "PNG", compress_level=1)
            overlay = buffer.getvalue()
        results = json.dumps([coco_result(i, self.model.categories) for i in instances])
        height, width = image.shape[:2]
        return {"path": path, "height": height, "width": width, "error": "", "results": results, "overlay": overlay}


def list_photos(sources: Sequence[str], errors: Console, exclude: Sequence[str] = ()) -> list[str]:
    """The images that a command was asked for; says on `errors` what it leaves out. See `find_photos`."""
    found = find_photos(sources, exclude)
    if found.left_out:
        errors.print(f"left out: {describe_left_out(found.left_out)}", markup=False, highlight=False, soft_wrap=True)
    return found.paths


def read_or_reason(path: str) -> np.ndarray | str:
    """The pixels of an image, or why it has none, without the path."""
    try:
        return read_image(path)
    except ImageError as error:
        return error.reason
    except (ValueError, OSError) as error:
        return str(error)


def write_predictions(rows: Rows, categories: Sequence[Category], out: Path) -> None:
    """Writes `results.json` (COCO results) and `images.json` (the COCO file that they belong to), each whole."""
    classes = json.dumps([{"id": c.id, "name": c.name} for c in categories])
    head = f'{{"categories": {classes}, "annotations": [], "images": ['
    with (
        replaced(out / "results.json") as results_path,
        replaced(out / "images.json") as images_path,
        results_path.open("w") as results_file,
        images_path.open("w") as images_file,
        JsonList(results_file) as results,
        JsonList(images_file, head, "]}") as images,
    ):
        for number, row in rows():
            images.add({"id": number, "file_name": row["path"], "height": row["height"], "width": row["width"]})
            for result in json.loads(row["results"]):
                results.add({"image_id": number, **result})


class JsonList:
    """A JSON list written element by element, so that a million results never meet in memory.

    `head` and `tail` stand around its elements; a block that fails leaves the tail out, so that nobody reads the rest
    for the whole.
    """

    def __init__(self, file: IO[str], head: str = "[", tail: str = "]"):
        self.file, self.head, self.tail = file, head, tail
        self.num = 0

    def __enter__(self) -> JsonList:
        self.file.write(self.head)
        return self

    def add(self, element: Any) -> None:
        self.file.write((",\n" if self.num else "\n") + json.dumps(element))
        self.num += 1

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.file.write("\n" + self.tail + "\n")


def make_predictor(config: bytes, weights: bytes, device: str, **settings: Any) -> Predictor:
    """A predictor from the contents of a student's files, in whichever process calls it."""
    torch.set_num_threads(1)
    student = Student.from_files(config, weights, source="student").to(pick_device(device))
    return Predictor(student, **settings)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments, plain_console(stderr=True)), INTERRUPTED)


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    out = output_folder(arguments.out)
    paths = list_photos(arguments.images, errors, exclude=[str(out / OVERLAYS)])
    student, _ = open_student(arguments.student)
    options = {
        "threshold": arguments.threshold,
        "max_detections": arguments.max_detections,
        "amp": arguments.amp,
        "overlays": not arguments.no_overlays,
    }
    settings = {
        "version": cast_ray.__version__,
        **options,
        "student": student.config(),
        "weights": weights_digest(student.segmenter),
    }

    # On its device before anything is written: a device that is not there is refused here.
    predictor = None if arguments.workers else Predictor(student.to(pick_device(arguments.device)), **options)

    def rows_of(missing: list[str]) -> Iterator[dict[str, Any]]:
        if predictor is None:
            from cast_ray.runtime.worker.prediction import map_files

            files = student.files()
            make = partial(make_predictor, files[CONFIG], files[WEIGHTS], arguments.device, **options)
            return map_files(
                make, missing, batch=arguments.batch, num_workers=arguments.workers, address=arguments.address
            )
        return in_batches(predictor, missing, arguments.batch)

    write = partial(write_predictions, categories=student.categories, out=out)
    done = run_images(paths, settings, rows_of, write, out, errors)
    print(f"{done} of {len(paths)} images; results in {out}")
    return 0 if done else EXIT_NOTHING


def in_batches(predictor: Predictor, paths: Sequence[str], batch: int) -> Iterator[dict[str, Any]]:
    """Rows of all images in order, `batch` of them at a time through the model."""
    for start in range(0, len(paths), batch):
        yield from predictor(paths[start : start + batch])


def run_images(
    paths: Sequence[str],
    settings: Mapping[str, Any],
    rows_of: Callable[[list[str]], Iterator[dict[str, Any]]],
    write: Callable[[Rows], None],
    out: Path,
    errors: Console,
) -> int:
    """Finds the instances of every image under a progress bar, then writes the results; resumes a stopped run.

    Results that the folder held before stay until the new ones are whole. Overlays are written as they come.

    Args:
        paths: of the images.
        settings: what decides which instances are found; a stopped run is resumed under equal settings only.
        rows_of: gives the rows of images, in the order of the paths that it is given; see `Predictor.__call__`.
        write: writes the results of all images.
        out: the output folder.
        errors: where skipped images are reported.

    Returns:
        Number of images that were read.

    Raises:
        ValueError: an unfinished run of other settings lies in the folder, or another process is writing to it.
    """
    names = dict(zip(paths, output_names(paths)))
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
        write(finished.rows)
        finished.remove()
    for path, reason in skipped[:MAX_REPORTED]:
        errors.print(f"skipped {path}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(skipped) > MAX_REPORTED:
        errors.print(f"... and {len(skipped) - MAX_REPORTED} more")
    return len(paths) - len(skipped)


def write_overlay(row: dict[str, Any], names: Mapping[str, str], out: Path) -> None:
    """`overlays/<name>.png` of a row that has one."""
    if row["overlay"]:
        path = out / OVERLAYS / f"{names[row['path']]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["overlay"])


def _parser() -> Parser:
    parser = Parser(
        prog="python -m cast_ray.predict",
        description="Finds instances in images with a saved student. Writes overlays/*.png, results.json (COCO "
        "results) and images.json (the COCO file that they belong to).",
    )
    parser.add_argument("images", nargs="+", help="files, folders, quoted patterns, local or s3://...")
    parser.add_argument(
        "--student", required=True, help="folder of a saved student, a row runs/<name>/<row>, a URI or a hub name"
    )
    parser.add_argument("--out", required=True, help="folder, made where missing")
    parser.add_argument("--threshold", type=share, default=0.3, help="least score (default: %(default)s)")
    parser.add_argument("--max-detections", type=positive, default=100, help="per image (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="precision; auto: the one that the student was trained and measured in (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--no-overlays", action="store_true", help="results only")
    parser.add_argument(
        "--workers", type=whole_number, default=0, help="processes of a Ray cluster (default: 0, this process)"
    )
    parser.add_argument("--address", help="Ray cluster of --workers (default: $RAY_ADDRESS, else a local one)")
    return parser


if __name__ == "__main__":
    from cast_ray.predict import main as main_by_name  # so that Ray's workers find `make_predictor` by its name

    sys.exit(main_by_name())
