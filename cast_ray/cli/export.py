"""`cast-ray export` takes a student out of a run: as a folder with a model card, or as one ONNX file.

cast-ray export --student runs/losses-shapes-demo/sup+semi+pxl --out student
cast-ray export --student student --out student.onnx
"""

from __future__ import annotations

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
    parser.add_argument(
        "--out", required=True, help="local folder that is missing, empty or an earlier export, or FILE.onnx"
    )
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
    return exit_code(lambda: _export(arguments.student, arguments.out, arguments.max_detections, arguments.image_px))


def _export(name: str, out_name: str, max_detections: int | None, image_px: list[int] | None) -> int:
    as_onnx = out_name.lower().endswith(".onnx")
    size = None if image_px is None else (image_px[0], image_px[1])
    only_onnx = {"--image-px": image_px, "--max-detections": None if max_detections is None else [max_detections]}
    for flag, values in only_onnx.items():
        if values is not None and not as_onnx:
            given = " ".join(map(str, values))
            raise ValueError(f"{flag} {given}: expected --out FILE.onnx with it, got {out_name!r}")
    out = output_file(out_name) if as_onnx else output_folder(out_name)

    from cast_ray.models.student import check_free  # what needs torch, once the arguments are sound
    from cast_ray.runtime.store.models import open_student

    if not as_onnx:
        check_free(out)
    student, result = open_student(name)
    if as_onnx:
        from cast_ray.models.export import export_onnx

        export_onnx(student, out, max_detections or MAX_DETECTIONS, size)
    else:
        student.save_pretrained(out, result)
    print(f"written: {out}")
    return 0
