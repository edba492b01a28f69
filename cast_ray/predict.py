"""Runs a saved student over images: overlays and COCO results.

python -m cast_ray.predict PHOTOS --student runs/losses-shapes-demo/sup+semi+pxl --out OUT
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cast_ray.console import exit_code
from cast_ray.datasets.images import read_image
from cast_ray.datasets.photos import describe_left_out, find_photos, output_names
from cast_ray.engine.loop import amp_dtype
from cast_ray.engine.world import pick_device
from cast_ray.models.drawing import draw_instances
from cast_ray.models.student import CONFIG, WEIGHTS, Student
from cast_ray.records import Category
from cast_ray.runtime.models import open_student
from cast_ray.stages.evaluate import coco_result
from cast_ray.views import fit_image

EXIT_NOTHING = 1
NUM_THREADS = 4
"""That read and draw the images of a batch beside the model."""
MAX_REPORTED = 10


class InstanceModel(Protocol):
    """What finds instances: a student, or a teacher."""

    categories: tuple[Category, ...]
    image_px: tuple[int, int]

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
        amp: as `runtime.amp`.
        overlays: whether rows carry the drawn image.
    """

    def __init__(
        self, model: InstanceModel, *, threshold: float, max_detections: int, amp: str = "auto", overlays: bool = True
    ):
        self.model, self.threshold, self.max_detections = model, threshold, max_detections
        self.overlays = overlays
        kind = model.device.type
        dtype = amp_dtype(amp, model.device)
        self.autocast = partial(torch.autocast, kind, dtype) if dtype else nullcontext
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
        fitted = [fit_image(image, self.model.image_px) for image in images]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in fitted]))
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        with self.autocast():
            found = self.ask(pixels, sizes, [size for _, size in fitted])
        return [self.choose(instances) for instances in found]

    def ask(
        self, pixels: torch.Tensor, image_hw: list[tuple[int, int]], resized_hw: list[tuple[int, int]]
    ) -> list[list[dict[str, Any]]]:
        """The model's instances, as of `Teacher.predict`."""
        return self.model.predict(pixels, image_hw, resized_hw, self.max_detections, self.threshold)

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
    """The pixels of an image, or why it has none."""
    try:
        return read_image(path)
    except (ValueError, OSError) as error:
        return str(error)


def write_predictions(
    rows: Iterator[dict[str, Any]], names: dict[str, str], student: Student, out: Path, advance: Callable[[], None]
) -> list[tuple[str, str]]:
    """Writes rows as they come: `results.json` (COCO results), `images.json` (the COCO file that they belong to) and
    `overlays/<name>.png`. Image ids count from 1 in the order of the rows.

    Returns:
        (path, reason) of every image that was skipped.
    """
    skipped = []
    out.mkdir(parents=True, exist_ok=True)
    categories = json.dumps([{"id": c.id, "name": c.name} for c in student.categories])
    head = f'{{"categories": {categories}, "annotations": [], "images": ['
    with JsonList(out / "results.json") as results, JsonList(out / "images.json", head, "]}") as images:
        for number, row in enumerate(rows, 1):
            advance()
            if row["error"]:
                skipped.append((row["path"], row["error"]))
                continue
            images.add({"id": number, "file_name": row["path"], "height": row["height"], "width": row["width"]})
            for result in json.loads(row["results"]):
                results.add({"image_id": number, **result})
            write_overlay(row, names, out)
    return skipped


def write_overlay(row: dict[str, Any], names: dict[str, str], out: Path) -> None:
    """`overlays/<name>.png` of a row that has one."""
    if row["overlay"]:
        path = out / "overlays" / f"{names[row['path']]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["overlay"])


class JsonList:
    """A JSON list written element by element, so that a million results never meet in memory."""

    def __init__(self, path: Path, head: str = "[", tail: str = "]"):
        self.path, self.head, self.tail = path, head, tail
        self.num = 0

    def __enter__(self) -> JsonList:
        self.file: IO[str] = self.path.open("w")
        self.file.write(self.head)
        return self

    def add(self, element: Any) -> None:
        self.file.write((",\n" if self.num else "\n") + json.dumps(element))
        self.num += 1

    def __exit__(self, *_: object) -> None:
        self.file.write("\n" + self.tail + "\n")
        self.file.close()


def make_predictor(config: bytes, weights: bytes, device: str, **settings: Any) -> Predictor:
    """A predictor from the contents of a student's files, in whichever process calls it."""
    torch.set_num_threads(1)
    student = Student.from_files(config, weights, source="student").to(pick_device(device))
    return Predictor(student, **settings)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments, Console(stderr=True)))


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    paths = list_photos(arguments.images, errors)
    names = dict(zip(paths, output_names(paths)))
    student, _ = open_student(arguments.student)
    out = Path(arguments.out)
    settings = {
        "threshold": arguments.threshold,
        "max_detections": arguments.max_detections,
        "amp": arguments.amp,
        "overlays": not arguments.no_overlays,
    }
    if arguments.workers:
        from cast_ray.runtime.prediction import map_files

        files = student.files()
        make = partial(make_predictor, files[CONFIG], files[WEIGHTS], arguments.device, **settings)
        rows = map_files(make, paths, batch=arguments.batch, num_workers=arguments.workers, address=arguments.address)
    else:
        predictor = Predictor(student.to(pick_device(arguments.device)), **settings)
        starts = range(0, len(paths), arguments.batch)
        rows = (row for a in starts for row in predictor(paths[a : a + arguments.batch]))
    done = write_with_progress(paths, partial(write_predictions, rows, names, student, out), errors)
    print(f"{done} of {len(paths)} images; results in {out}")
    return 0 if done else EXIT_NOTHING


def write_with_progress(
    paths: Sequence[str], write: Callable[[Callable[[], None]], list[tuple[str, str]]], errors: Console
) -> int:
    """Runs `write(advance)`, which gives (path, reason) of the images that it skipped, under a progress bar.

    Returns:
        Number of images that were not skipped; the others are reported.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task("images", total=len(paths))
        skipped = write(lambda: progress.advance(task))
    for path, reason in skipped[:MAX_REPORTED]:
        errors.print(f"skipped {path}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(skipped) > MAX_REPORTED:
        errors.print(f"... and {len(skipped) - MAX_REPORTED} more")
    return len(paths) - len(skipped)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cast_ray.predict",
        description="Finds instances in images with a saved student. Writes overlays/*.png, results.json (COCO "
        "results) and images.json (the COCO file that they belong to).",
    )
    parser.add_argument("images", nargs="+", help="files, folders, quoted patterns, local or s3://...")
    parser.add_argument(
        "--student", required=True, help="folder of a saved student, a row runs/<name>/<row>, a URI or a hub name"
    )
    parser.add_argument("--out", required=True, help="folder, made where missing")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score (default: %(default)s)")
    parser.add_argument("--max-detections", type=positive, default=100, help="per image (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--no-overlays", action="store_true", help="results only")
    parser.add_argument("--workers", type=int, default=0, help="processes of a Ray cluster (default: this one)")
    parser.add_argument("--address", help="Ray cluster of --workers (default: $RAY_ADDRESS, else a local one)")
    return parser


if __name__ == "__main__":
    from cast_ray.predict import main as main_by_name  # so that Ray's workers find `make_predictor` by its name

    sys.exit(main_by_name())
