"""The precision that a stage computes in, as torch's autocast: the same for training, labels, evaluation, `predict`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from cast_ray.recipe import Precision

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch type of each precision below float32 (`off`)."""


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A fresh autocast context, which does nothing for `off`."""
    return torch.autocast(device.type, DTYPES[precision]) if precision != "off" else nullcontext()


def require_precision(precision: Precision, device: torch.device, field: str) -> None:
    """Refuses a precision that the device has not in hardware.

    Args:
        precision: asked for.
        device: that would compute.
        field: name of the setting that gives the precision, for the message.

    Raises:
        ValueError: bfloat16 on a GPU that only emulates it, several times slower than float32 (before NVIDIA's Ampere:
            T4, V100).
    """
    if precision == "bf16" and device.type == "cuda" and not _has_bfloat16():
        raise ValueError(
            f"{field} is bf16 (auto is bf16 with a GPU) and {torch.cuda.get_device_name()} has no bfloat16: "
            f"expected fp16 or off"
        )


def fastest_precision(device: torch.device) -> Precision:
    """The precision that suits a device where nothing says which one to use; never for a stage of a recipe."""
    if device.type != "cuda":
        return "off"
    return "bf16" if _has_bfloat16() else "fp16"


def _has_bfloat16() -> bool:
    # Without the argument torch also says yes to GPUs that emulate it.
    return torch.cuda.is_bf16_supported(including_emulation=False)
