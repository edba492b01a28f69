"""`cast-ray predict` runs a saved student over images: overlays and COCO results.

cast-ray predict PHOTOS --student runs/losses-shapes-demo/sup+semi+pxl --out OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from cast_ray.cli.options import (
    EXIT_FAILED,
    INTERRUPTED_IMAGES,
    STUDENT_HELP,
    Parser,
    add_device_options,
    add_image_options,
    exit_code,
    plain_console,
    positive,
    results_place,
)
from cast_ray.common.results_folder import ResultsFolder
from cast_ray.common.version import VERSION


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _predict(arguments, plain_console(stderr=True)), INTERRUPTED_IMAGES)


def _predict(arguments: argparse.Namespace, errors: Console) -> int:
    results_place(arguments.out)  # refused before what needs torch is loaded

    from cast_ray.cli.images import open_image_results

    with open_image_results(arguments.out, "predict") as results:
        return _run(arguments, results, errors)


def _run(arguments: argparse.Namespace, results: ResultsFolder, errors: Console) -> int:
    from cast_ray.cli.images import list_photos, run_images
    from cast_ray.cli.unfinished import weights_digest
    from cast_ray.data.reading.photos import IMAGES, OVERLAYS
    from cast_ray.engine.world import pick_device
    from cast_ray.inference.predictor import Predictor, in_batches, make_predictor
    from cast_ray.inference.result_files import shared_folder, write_predictions
    from cast_ray.models.student import CONFIG, WEIGHTS
    from cast_ray.runtime.store.models import open_student

    out = results.path
    paths = list_photos(arguments.images, errors, exclude=[results.at(out / OVERLAYS)])
    student, _ = open_student(arguments.student)
    options = {
        "threshold": arguments.threshold,
        "max_detections": arguments.max_detections,
        "amp": arguments.amp,
        "overlays": not arguments.no_overlays,
    }
    settings = {
        "version": VERSION,
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

    folder = shared_folder(paths)
    write = partial(write_predictions, folder=folder, categories=student.categories, out=out)
    done, _ = run_images(paths, settings, rows_of, write, out, errors)
    print(f"{done} of {len(paths)} images; results in {results.place}")
    if folder:
        print(f"file names in {IMAGES} are relative to {folder}")
    return 0 if done else EXIT_FAILED


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray predict",
        description="Finds instances in images with a saved student. Writes overlays/*.png, results.json (COCO "
        "results) and images.json (a COCO file with the same instances as annotations with scores, which other tools "
        "open as it is; its file names are relative to the folder that holds all images).",
    )
    parser.add_argument("--student", required=True, help=STUDENT_HELP)
    add_image_options(parser)
    parser.add_argument("--max-detections", type=positive, default=100, help="per image (default: %(default)s)")
    add_device_options(parser, amp="the one that the student was trained and measured in")
    return parser
