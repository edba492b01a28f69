"""`cast-ray export` takes a student out of a run: as a folder with a model card, on the hub, or as one ONNX file.

cast-ray export --student runs/losses-shapes-demo/sup+semi+pxl --out student
cast-ray export --student student --out student.onnx
cast-ray export --student runs/losses-shapes-demo/sup+semi+pxl --push-to-hub OWNER/NAME
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cast_ray.cli.options import STUDENT_HELP, Parser, exit_code, output_file, output_folder, positive

MAX_DETECTIONS = 100


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="cast-ray export",
        description="Writes a student as a folder (config.json, model.safetensors, README.md) or, where --out ends in "
        ".onnx, as one file with inputs and outputs as in cast_ray/models/export.py.",
    )
    parser.add_argument("--student", required=True, help=STUDENT_HELP)
    parser.add_argument("--out", help="local folder that is missing, empty or an earlier export, or FILE.onnx")
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the folder to this model repository of the Hugging Face hub, which is made if it is missing; it "
        "needs a token with write access in $HF_TOKEN or from `hf auth login`",
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make a new repository private")
    parser.add_argument(
        "--image-px",
        type=positive,
        nargs=2,
        metavar=("H", "W"),
        help="size of an ONNX model's images (default: that of the student, where it has one)",
    )
    parser.add_argument(
        "--max-detections", type=positive, help=f"of an ONNX model, for each image (default: {MAX_DETECTIONS})"
    )
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _export(arguments))


def _export(arguments: argparse.Namespace) -> int:
    out_name, repo_id = arguments.out or "", arguments.push_to_hub
    as_onnx = out_name.lower().endswith(".onnx")
    _check_options(arguments, as_onnx)
    out = None if not out_name else output_file(out_name) if as_onnx else output_folder(out_name)

    from cast_ray.models.student import check_free, check_repo  # what needs torch, once the arguments are sound
    from cast_ray.runtime.store.models import open_student

    if repo_id:
        check_repo(repo_id)
    if out is not None and not as_onnx:
        check_free(out)
    student, result = open_student(arguments.student)
    if out is not None and as_onnx:
        from cast_ray.models.export import export_onnx

        size = None if arguments.image_px is None else (arguments.image_px[0], arguments.image_px[1])
        export_onnx(student, out, arguments.max_detections or MAX_DETECTIONS, size)
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


def _check_options(arguments: argparse.Namespace, as_onnx: bool) -> None:
    """Raises ValueError: options that do not go together."""
    if not arguments.out and not arguments.push_to_hub:
        raise ValueError("expected --out FOLDER, --out FILE.onnx or --push-to-hub OWNER/NAME")
    if as_onnx and arguments.push_to_hub:
        raise ValueError(
            f"--push-to-hub {arguments.push_to_hub}: expected --out FOLDER with it or no --out, it uploads a folder"
        )
    if arguments.private and not arguments.push_to_hub:
        raise ValueError("--private: expected --push-to-hub OWNER/NAME with it")
    counts = {"--image-px": arguments.image_px, "--max-detections": arguments.max_detections}
    for flag, value in counts.items():
        if value is not None and not as_onnx:
            given = " ".join(map(str, value if isinstance(value, list) else [value]))
            raise ValueError(f"{flag} {given}: expected --out FILE.onnx with it, got {arguments.out!r}")
