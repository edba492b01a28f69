"""`cast-ray export` takes a student out of a run: as a folder, on the hub, or as a file for another runtime.

cast-ray export --student runs/losses-shapes-demo/sup+semi+pxl --out student
cast-ray export --student student --out student/student.onnx --check DATA
cast-ray export --student student --out int8.onnx --precision int8 --calibrate PHOTOS --check DATA --max-drop 0.5
cast-ray export --student runs/losses-shapes-demo/sup+semi+pxl --push-to-hub OWNER/NAME
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cast_ray.cli.dataset_folder import FORMATS, recipe_of_folder
from cast_ray.cli.options import (
    EXIT_FAILED,
    STUDENT_HELP,
    Parser,
    add_set_option,
    amount,
    exit_code,
    output_file,
    output_folder,
    plain_console,
    positive,
)

if TYPE_CHECKING:
    from cast_ray.contracts.row_result import RowResult
    from cast_ray.models.student import Student
    from cast_ray.recipe import Recipe

MAX_DETECTIONS, MAX_DROP, MAX_CALIBRATION = 100, 1.0, 64
ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}
OF_ROW = True
"""Value of `--check` without a folder: the data of the row that the student is taken from."""


class _DropError(Exception):
    """An exported file whose AP falls too much."""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _export(arguments, plain_console(stderr=True)))


def _export(arguments: argparse.Namespace, errors: Console) -> int:
    out_name, repo_id = arguments.out or "", arguments.push_to_hub
    target = _target(arguments)
    _check_options(arguments, target)
    out = None if not out_name else output_file(out_name) if target else output_folder(out_name)

    from cast_ray.models.student import check_free, check_repo  # what needs torch, once the arguments are sound
    from cast_ray.runtime.store.models import open_student

    if repo_id:
        check_repo(repo_id)
    if out is not None and not target:
        check_free(out)
    student, result = open_student(arguments.student)
    if out is not None and target:
        try:
            _export_file(student, result, target, out, arguments, errors)
        except _DropError as error:
            errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
            return EXIT_FAILED
    elif out is not None:
        student.save_pretrained(out, result)
    if out is not None:
        print(f"written: {out}")
    if repo_id:
        print(f"uploaded: {student.push_to_hub(repo_id, result, private=arguments.private or None)}")
    if student.licences:
        print(f"licences: {student.licences.text}")
        print(f"          together: {student.licences.verdict}")
    return 0


def _export_file(
    student: Student,
    result: RowResult | None,
    target: str,
    out: Path,
    arguments: argparse.Namespace,
    errors: Console,
) -> None:
    """Writes a file for a runtime, runs it on validation images where `--check` asks for it, and adds its facts.

    Raises:
        _DropError: its AP falls too much; whatever `out` held before stays.
    """
    from cast_ray.common.files import replaced_together
    from cast_ray.models.export import export_onnx, export_size
    from cast_ray.models.export_facts import add_facts, check_facts
    from cast_ray.models.export_openvino import export_openvino

    check_facts(out)
    size = export_size(student, tuple(arguments.image_px) if arguments.image_px else None)
    recipe = None if arguments.check is None else _recipe(arguments, result)
    calibration = _calibration(arguments.calibrate or [], size, errors)
    write = export_openvino if target == "openvino" else export_onnx
    max_detections = arguments.max_detections or MAX_DETECTIONS
    with replaced_together(out) as file:
        write(student, file, max_detections, size, arguments.precision, calibration)
        facts: dict[str, Any] = {
            "target": target,
            "precision": arguments.precision,
            "bytes": sum(part.stat().st_size for part in file.parent.iterdir()),
            "image_px": list(size),
            "max_detections": max_detections,
            "check": None if recipe is None else _check(student, file, recipe, arguments, errors),
        }
    add_facts(out, facts)


def _check(
    student: Student, file: Path, recipe: Recipe, arguments: argparse.Namespace, errors: Console
) -> dict[str, Any]:
    from cast_ray.data.reading.progress import track
    from cast_ray.data.reading.reader import load_images
    from cast_ray.engine.world import pick_device
    from cast_ray.inference.export_check import check_export
    from cast_ray.inference.exported import ExportedStudent

    exported = ExportedStudent(file, pick_device(arguments.device))
    num_images = arguments.check_images or recipe.evaluation.num_images
    records, categories = load_images(recipe.data, "val", num_images)
    with track(errors, "running the file") as progress:
        facts = check_export(student, exported, records, categories, recipe.evaluation, progress)
    interval = "" if facts["interval"] is None else " ({:+.2f} to {:+.2f})".format(*facts["interval"])
    print(
        f"AP {facts['mask_ap']:.2f} on {facts['images']} validation images, PyTorch {facts['reference_ap']:.2f}, "
        f"difference {facts['difference']:+.2f}{interval}"
    )
    print(
        f"{facts['latency_ms']:.1f} ms an image (PyTorch {facts['reference_latency_ms']:.1f} ms), "
        f"{facts['images_per_s']:.1f} images/s, on {facts['device']}, {facts['runtime']}"
    )
    drop, most = -facts["difference"], MAX_DROP if arguments.max_drop is None else arguments.max_drop
    if drop > most:
        raise _DropError(
            f"{arguments.out}: the exported file's AP falls by {drop:.2f}, from {facts['reference_ap']:.2f} to "
            f"{facts['mask_ap']:.2f}: expected at most --max-drop {most:g}. Nothing was written"
        )
    return {**facts, "data": recipe.data.root or recipe.data.format, "max_drop": most}


def _recipe(arguments: argparse.Namespace, result: RowResult | None) -> Recipe:
    """Returns the recipe whose data and rules the file is measured by."""
    from cast_ray.recipe import Recipe

    if arguments.check is not OF_ROW:
        return recipe_of_folder(arguments.check, arguments.format, arguments.set)
    if result is None:
        raise ValueError(
            f"--check: {arguments.student} is no row of a run, which would name its data: expected --check DIR"
        )
    try:
        return Recipe.model_validate(result.recipe)
    except ValueError:
        raise ValueError("--check: the recipe of this row is of another version: expected --check DIR") from None


def _calibration(sources: Sequence[str], size: tuple[int, int], errors: Console) -> list[dict[str, Any]]:
    """Reads the images of `--calibrate`: the first ones, spread over all that there are."""
    if not sources:
        return []
    from cast_ray.cli.images import list_photos
    from cast_ray.data.reading.images import read_image
    from cast_ray.inference.exported import calibration_inputs

    paths = list_photos(sources, errors)
    return [calibration_inputs(read_image(path), size) for path in paths[:: -(-len(paths) // MAX_CALIBRATION)]]


def _target(arguments: argparse.Namespace) -> str | None:
    """Returns which runtime `--out` is a file of; None: it is a folder, or missing.

    Raises:
        ValueError: `--to` and the ending of the file do not fit.
    """
    out = (arguments.out or "").lower()
    of_ending = next((target for target, ending in ENDINGS.items() if out.endswith(ending)), None)
    if arguments.to is not None and arguments.to != of_ending:
        expected = f"expected --out FILE{ENDINGS[arguments.to]} with it"
        raise ValueError(f"--to {arguments.to}: {expected}, got {arguments.out!r}")
    return of_ending


def _check_options(arguments: argparse.Namespace, target: str | None) -> None:
    """Raises ValueError: options that do not go together."""
    if not arguments.out and not arguments.push_to_hub:
        raise ValueError("expected --out FOLDER, --out FILE.onnx, --out FILE.xml or --push-to-hub OWNER/NAME")
    if target and arguments.push_to_hub:
        raise ValueError(
            f"--push-to-hub {arguments.push_to_hub}: expected --out FOLDER with it or no --out, it uploads a folder"
        )
    if arguments.private and not arguments.push_to_hub:
        raise ValueError("--private: expected --push-to-hub OWNER/NAME with it")
    of_files = ("image_px", "max_detections", "calibrate", "check")
    of_checks = ("max_drop", "check_images", "format", "set")
    for name in (*of_files, *of_checks):
        value = getattr(arguments, name)
        if value is None or value == []:
            continue
        flag = f"--{name.replace('_', '-')}"
        given = " ".join([flag, *map(str, value if isinstance(value, list) else [] if value is OF_ROW else [value])])
        if not target:
            raise ValueError(f"{given}: expected --out FILE.onnx or FILE.xml with it, got {arguments.out!r}")
        if name in of_checks and arguments.check is None:
            raise ValueError(f"{given}: expected --check with it")
    if arguments.precision != "fp32" and not target:
        raise ValueError(
            f"--precision {arguments.precision}: expected --out FILE.onnx or FILE.xml with it, got {arguments.out!r}"
        )
    if (arguments.precision == "int8") != bool(arguments.calibrate):
        raise ValueError(
            "--precision int8: expected --calibrate IMAGES with it, for example unlabelled training images"
            if arguments.precision == "int8"
            else "--calibrate: expected --precision int8 with it"
        )


def _parser() -> Parser:
    parser = Parser(
        prog="cast-ray export",
        description="Writes a student as a folder (config.json, model.safetensors, README.md) or, where --out ends in "
        ".onnx or .xml (OpenVINO), as one model from pixels to masks, whose inputs and outputs are described in "
        "docs/students.md. Its facts are added to export.json beside it, and to the model card of the folder.",
    )
    parser.add_argument("--student", required=True, help=STUDENT_HELP)
    parser.add_argument("--out", help="local folder that is missing, empty or an earlier export, FILE.onnx or FILE.xml")
    hub = parser.add_argument_group("to the hub")
    hub.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the folder to this model repository of the Hugging Face hub, which is made if it is missing; it "
        "needs a token with write access in $HF_TOKEN or from `hf auth login`",
    )
    hub.add_argument("--private", action="store_true", help="with --push-to-hub: make a new repository private")
    file = parser.add_argument_group("to a file")
    file.add_argument("--to", choices=list(ENDINGS), help="runtime of the file (default: by its ending)")
    file.add_argument(
        "--precision",
        choices=["fp32", "fp16", "int8"],
        default="fp32",
        help="of weights and activations; int8 needs --calibrate (default: %(default)s)",
    )
    file.add_argument(
        "--calibrate",
        nargs="+",
        metavar="IMAGES",
        help=f"files, folders or quoted patterns; int8 takes the ranges of activations from up to {MAX_CALIBRATION} of "
        "these images, for example unlabelled training images",
    )
    file.add_argument(
        "--image-px",
        type=positive,
        nargs=2,
        metavar=("H", "W"),
        help="size of the file's images (default: that of the student, where it has one)",
    )
    file.add_argument("--max-detections", type=positive, help=f"for each image (default: {MAX_DETECTIONS})")
    check = parser.add_argument_group("to check a file")
    check.add_argument(
        "--check",
        nargs="?",
        const=OF_ROW,
        metavar="DATA",
        help="run the file on the validation images of this dataset, and the student in PyTorch and float32 beside it: "
        "AP with the interval of the difference, latency, throughput; without DATA: the dataset of the row",
    )
    check.add_argument(
        "--max-drop",
        type=amount,
        help=f"largest fall of AP, in points; a file that falls more is not written, exit code 1 (default: {MAX_DROP})",
    )
    check.add_argument(
        "--check-images", type=positive, metavar="N", help="the first N validation images (default: all)"
    )
    check.add_argument("--format", help=f"of DATA: {FORMATS}, or MODULE:FUNCTION (default: recognised)")
    add_set_option(check, "a data key of the recipe of DATA")
    check.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    return parser
