"""Takes a student out of a run: as a folder of its own with a model card, or as one ONNX file.

python -m cast_ray.export --student runs/losses-shapes-demo/sup+semi+pxl --out student
python -m cast_ray.export --student student --out student.onnx
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from cast_ray.models.deployment import export_onnx
from cast_ray.runtime.models import open_student

EXIT_BAD_INPUT = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cast_ray.export",
        description="Writes a student as a folder (config.json, model.safetensors, README.md) or, where --out ends in "
        ".onnx, as one file with inputs and outputs as in cast_ray/models/deployment.py.",
    )
    parser.add_argument(
        "--student", required=True, help="folder of a saved student, a row runs/<name>/<row>, a URI or a hub name"
    )
    parser.add_argument("--out", required=True, help="folder, or FILE.onnx")
    parser.add_argument("--max-detections", type=int, default=100, help="of an ONNX model (default: %(default)s)")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    try:
        student, result = open_student(arguments.student)
        if out.suffix == ".onnx":
            out.parent.mkdir(parents=True, exist_ok=True)
            export_onnx(student, out, arguments.max_detections)
        else:
            student.save_pretrained(out, result)
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_BAD_INPUT
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
