"""The student as an OpenVINO model, made of its ONNX model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cast_ray.common.files import replaced_together
from cast_ray.models.export import ExportPrecision, export_onnx
from cast_ray.models.student import Student

RT_INFO = "cast_ray"
"""Section of an OpenVINO model's run-time information that holds the metadata."""


def export_openvino(
    student: Student,
    path: str | Path,
    max_detections: int = 100,
    image_px: tuple[int, int] | None = None,
    precision: ExportPrecision = "fp32",
    calibration: Sequence[dict[str, np.ndarray]] = (),
) -> dict[str, str]:
    """Writes a student as an OpenVINO model: FILE.xml and, beside it, its weights in FILE.bin.

    Args:
        path: of FILE.xml.
        precision: fp16 means float16 weights; what OpenVINO computes in is its device's choice. int8 is the quantised
            ONNX model.
        student, max_detections, image_px, calibration: see `export_onnx`, whose inputs, outputs and metadata it has.

    Returns:
        The model's metadata.

    Raises:
        ValueError: as `export_onnx`, or openvino is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise ValueError("openvino is not installed: pip install 'cast_ray[openvino]'") from None
    with tempfile.TemporaryDirectory() as folder, replaced_together(path) as file:
        onnx_file = Path(folder) / "student.onnx"
        of_onnx: ExportPrecision = "int8" if precision == "int8" else "fp32"
        facts = export_onnx(student, onnx_file, max_detections, image_px, of_onnx, calibration)
        facts["precision"] = f'"{precision}"'
        model = openvino.convert_model(str(onnx_file))
        for name, value in facts.items():
            model.set_rt_info(value, [RT_INFO, name])
        openvino.save_model(model, str(file), compress_to_fp16=precision == "fp16")
    return facts
