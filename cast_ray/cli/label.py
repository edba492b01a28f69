"""`cast-ray label` labels images with a teacher: instances of the classes asked for, as one COCO JSON.

cast-ray label PHOTOS --teacher grounded_sam --classes "person, traffic light" --out LABELS
cast-ray label PHOTOS --teacher runs/NAME/ROW --precision 0.9 --out LABELS
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cast_ray.cli.options import (
    EXIT_FAILED,
    INTERRUPTED_IMAGES,
    SCORE_THRESHOLD,
    Parser,
    add_device_options,
    add_image_options,
    add_set_option,
    exit_code,
    inner_share,
    plain_console,
    results_place,
)
from cast_ray.common.results_folder import ResultsFolder
from cast_ray.common.version import VERSION
from cast_ray.data.reading.class_lists import read_classes
from cast_ray.recipe import Recipe, build_recipe, parse_overrides
from cast_ray.recipe.licence_chain import teacher_sources
from cast_ray.recipe.teachers import PUBLISHED

if TYPE_CHECKING:
    from cast_ray.evaluation.precision_thresholds import GroupThreshold
    from cast_ray.inference.calibration import Calibration
    from cast_ray.inference.result_files import Rows

OF_HELD_PRECISION = {"precision", "precision_error", "precision_folds"}
"""Fields of `pseudo` that say how a sweep chooses thresholds; here options do."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _label(arguments, plain_console(stderr=True)), INTERRUPTED_IMAGES)


def _label(arguments: argparse.Namespace, errors: Console) -> int:
    _check_precision(arguments)
    results_place(arguments.out)  # refused before what needs torch is loaded
    recipe = _recipe(arguments)

    from cast_ray.cli.images import open_image_results

    with open_image_results(arguments.out, "label") as results:
        return _run(arguments, recipe, results, errors)


def _check_precision(arguments: argparse.Namespace) -> None:
    """Raises ValueError where --precision meets an option that would change how labels are made or chosen."""
    if arguments.precision is None:
        return
    if arguments.teacher in PUBLISHED:
        raise ValueError(
            f"--precision {arguments.precision:g}: --teacher {arguments.teacher} was not calibrated on labelled "
            "images; expected a row runs/<name>/<row> whose recipe has pseudo.precision"
        )
    for option, is_given in (("--threshold", arguments.threshold != SCORE_THRESHOLD), ("--classes", arguments.classes)):
        if is_given:
            raise ValueError(f"--precision and {option}: scores and classes are those of the calibration; expected one")
    for key in parse_overrides(arguments.set):
        if key.startswith(("pseudo.", "teacher.inference.")):
            raise ValueError(f"--precision and --set {key}: labels are made as in the calibration; expected one")


def _run(arguments: argparse.Namespace, recipe: Recipe, results: ResultsFolder, errors: Console) -> int:
    from cast_ray.cli.images import list_photos, run_images
    from cast_ray.cli.unfinished import weights_digest
    from cast_ray.data.reading.photos import INSTANCES, OVERLAYS
    from cast_ray.evaluation.score_shift import image_scores, score_shift
    from cast_ray.inference.calibration import find_calibration, least_scores, threshold_lines
    from cast_ray.inference.labeller import make_labeller
    from cast_ray.inference.predictor import in_batches
    from cast_ray.inference.result_files import shared_folder, write_labels

    out = results.path
    paths = list_photos(arguments.images, errors, exclude=[results.at(out / OVERLAYS)])
    categories = read_classes(arguments.classes) if arguments.classes else None
    if categories is None and arguments.teacher in PUBLISHED:
        raise ValueError(f"--teacher {arguments.teacher} needs --classes: name the classes to look for")
    for source in teacher_sources(recipe) if arguments.teacher in PUBLISHED else ():
        if source.is_restricted:
            words = f"the labels come from {source.terms}"
            errors.print(words, style="yellow", markup=False, highlight=False, soft_wrap=True)
    calibration: Calibration | None = None
    groups: list[GroupThreshold] | None = None
    if arguments.precision is not None:
        calibration = find_calibration(arguments.teacher)
        groups = calibration.groups(arguments.precision, arguments.precision_error)
        recipe = _as_calibrated(recipe, calibration)
    make = partial(
        make_labeller,
        recipe,
        arguments.teacher,
        categories,
        arguments.device,
        arguments.amp,
        not arguments.no_overlays,
        least_scores(groups) if groups is not None else None,
    )
    labeller = make()  # here too with --workers: what is wrong with a teacher shows before Ray starts
    teacher = labeller.teacher
    settings = {
        "version": VERSION,
        "threshold": arguments.threshold,
        "classes": teacher.class_names,
        "category ids": [category.id for category in teacher.categories],
        "teacher": arguments.teacher,
        "teacher settings": teacher.config.settings(),
        "input size": teacher.input_size.part(),
        "weights": weights_digest(teacher),
        **{f"pseudo.{name}": value for name, value in recipe.pseudo.model_dump(exclude=OF_HELD_PRECISION).items()},
        **({"precision held": [vars(group) for group in groups]} if groups is not None else {}),
        "precision": teacher.precision,
        "overlays": not arguments.no_overlays,
    }

    if calibration is not None and groups is not None:
        if len(teacher.categories) != calibration.matches.num_classes:
            raise ValueError(
                f"--precision with --teacher {arguments.teacher}: the teacher knows {len(teacher.categories)} classes, "
                f"its calibration {calibration.matches.num_classes}"
            )
        say = partial(errors.print, markup=False, highlight=False, soft_wrap=True)
        say(
            f"calibrated on {calibration.what()}. Precision {arguments.precision:g} at mask IoU 0.5 holds with "
            f"probability {1 - arguments.precision_error:g} for photos like these, for each line:"
        )
        for line in threshold_lines(groups, teacher.class_names):
            say(f"  {line}")

    def rows_of(missing: list[str]) -> Iterator[dict[str, Any]]:
        if arguments.workers:
            from cast_ray.runtime.worker.prediction import map_files

            return map_files(
                make, missing, batch=arguments.batch, num_workers=arguments.workers, address=arguments.address
            )
        return in_batches(labeller, missing, arguments.batch)

    scores: list[float] = []

    def write(rows: Rows) -> Counter[int]:
        scores.extend(row["mean_score"] for _, row in rows())
        return write_labels(rows, folder=shared_folder(paths), categories=teacher.categories, out=out)

    done, counts = run_images(paths, settings, rows_of, write, out, errors)
    named = zip(teacher.class_names, teacher.categories)
    found = ", ".join(f"{name} {counts[c.id]}" for name, c in named if counts[c.id])
    print(f"{done} of {len(paths)} images, {counts.total()} labels ({found or 'none'}): {results.at(out / INSTANCES)}")
    if calibration is not None and (shift := score_shift(image_scores(calibration.matches), scores)) is not None:
        if shift.is_shifted:
            words = (
                f"warning: {shift.words()}. The photos are not like these images, so that --precision is not promised "
                "for them: label some of them and train a row with pseudo.precision on these"
            )
            errors.print(words, style="yellow", markup=False, highlight=False, soft_wrap=True)
        else:
            errors.print(shift.words(), markup=False, highlight=False, soft_wrap=True)
    if done and not counts:
        chosen = f"--threshold {arguments.threshold}. Lower it" if groups is None else "the thresholds. Ask for less"
        errors.print(
            f"nothing found in any image: asked for {', '.join(teacher.class_names[:12])} above {chosen}, or name "
            "other words by --set teacher.prompt.synonyms",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return 0 if counts else EXIT_FAILED


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """Returns a recipe with the teacher and pseudo parts that the user asked for."""
    threshold = {key: arguments.threshold for key in ("pseudo.score_threshold", "teacher.inference.score_threshold")}
    overrides = parse_overrides(arguments.set)
    for key in overrides:
        if not key.startswith(("teacher.", "pseudo.")):
            raise ValueError(f"--set {key}: expected a key of `teacher` or `pseudo`")
    if overrides.get("pseudo.precision", "null") not in ("null", None):
        raise ValueError("--set pseudo.precision: a saved teacher's thresholds are chosen by --precision")
    if overrides.get("pseudo.class_thresholds", "fixed") != "fixed":
        raise ValueError("--set pseudo.class_thresholds: balanced thresholds need labelled images; expected fixed")
    kind = {"teacher.kind": arguments.teacher} if arguments.teacher in PUBLISHED else {}
    return build_recipe("coco", "full", overrides={**threshold, **overrides, **kind, "stages.use_adapt": False})


def _as_calibrated(recipe: Recipe, calibration: Calibration) -> Recipe:
    """Returns the recipe with the labelling rules and the teacher's settings of a calibration."""
    inference = type(recipe.teacher.inference)(**calibration.inference)
    teacher = recipe.teacher.model_copy(update={"inference": inference})
    return recipe.model_copy(update={"pseudo": calibration.pseudo, "teacher": teacher})


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray label",
        description="Labels images with a teacher. Writes instances.json (COCO, with scores) and overlays/*.png.",
    )
    parser.add_argument(
        "--teacher",
        required=True,
        help=f"{', '.join(PUBLISHED)}: published weights; or a saved one: a folder, a URI, a row runs/<name>/<row>",
    )
    parser.add_argument(
        "--classes",
        help="names with commas between them, or a file: a .txt of one name a line, a JSON list of names (.json) or "
        "a COCO .json",
    )
    add_image_options(parser)
    parser.add_argument(
        "--precision",
        type=inner_share,
        metavar="P",
        help="instead of --threshold: each class gets the lowest score at which this share of its labels is shown to "
        "be right on labelled images; classes for which it cannot be shown get no label. For a row whose recipe has "
        "pseudo.precision, at any value. Warns where the photos' scores differ from those of the labelled images",
    )
    parser.add_argument(
        "--precision-error",
        type=inner_share,
        default=0.1,
        metavar="E",
        help="probability that a class falls short of --precision all the same (default: %(default)s)",
    )
    add_set_option(parser, "a recipe key of `teacher` or `pseudo`, for example teacher.grounded_sam.detector=DIR")
    add_device_options(
        parser,
        amp="that of a saved teacher's training, and for published weights the fastest of the device",
    )
    return parser
