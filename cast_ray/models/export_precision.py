"""An ONNX model in half precision or in integers, by onnxruntime's own converters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

QUANTISED_OPERATORS = ["Conv", "Gemm", "MatMul"]
"""Operators whose weights and inputs become int8: those that most of the time is spent in."""


def reduce_precision(
    file: Path,
    precision: Literal["fp16", "int8"],
    calibration: Sequence[dict[str, np.ndarray]],
    facts: dict[str, str],
) -> None:
    """Replaces a float32 ONNX file by one of less precision.

    fp16: weights and activations are float16. int8: weights (for each channel) and inputs of convolutions and of
    matrix products with weights are quantised (QDQ form); the ranges of the inputs are those on `calibration`. What
    depends on the sizes of the images stays float32: masks, boxes, and sums over more pixels than float16 counts.

    Args:
        file: as `export_onnx` writes it.
        calibration: the model's inputs by name, for each image.
        facts: metadata of the model, which the converters drop.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'cast_ray[export]'") from None

    model = onnx.load(file)
    measured = _depending_on(model.graph, ("inside_hw", "image_hw"))
    if precision == "fp16":
        model = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=measured
        )
    else:

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = iter(calibration)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.left, None)

        quantised = file.with_name(f"int8-{file.name}")
        quantize_static(
            str(file),
            str(quantised),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED_OPERATORS,
            nodes_to_exclude=measured,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(quantised)
        quantised.unlink()
    onnx.helper.set_model_props(model, facts)
    for companion in file.parent.glob(f"{file.name}*"):  # also the float32 weights, where they lay in a second file
        companion.unlink()
    onnx.save(model, file)


def _depending_on(graph: Any, inputs: Sequence[str]) -> list[str]:
    """Names of the nodes whose values depend on some inputs of a graph; its nodes are in the order of computation."""
    reached, names = set(inputs), []
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            names.append(node.name)
    return names
