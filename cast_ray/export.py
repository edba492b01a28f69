"""Takes a student out of a run: as a folder of its own with a model card, or as one ONNX file.

python -m cast_ray.export --student runs/losses-shapes-demo/sup+semi+pxl --out student
python -m cast_ray.export --student student --out student.onnx
"""

from __future__ import annotations

import sys

from cast_ray.console import Parser, exit_code, output_file, output_folder, positive
from cast_ray.models.export import export_onnx
from cast_ray.models.student import check_free
from cast_ray.runtime.store.models import open_student

MAX_DETECTIONS = 100


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m cast_ray.export",
        description="Writes a student as a folder (config.json, model.safetensors, README.md) or, where --out ends in "
        ".onnx, as one file with inputs and outputs as in cast_ray/models/export.py.",
    )
    parser.add_argument(
        "--student", required=True, help="folder of a saved student, a row runs/<name>/<row>, a URI or a hub name"
    )
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
    if not as_onnx:
        check_free(out)
    student, result = open_student(name)
    if as_onnx:
        export_onnx(student, out, max_detections or MAX_DETECTIONS, size)
    else:
        student.save_pretrained(out, result)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
