"""What a recipe can name: explicit rows `name -> "module:attribute"`, imported only when looked up."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from cast_ray.common.text import nearest

ROWS: dict[str, dict[str, str]] = {
    "datasets": {
        "shapes": "cast_ray.data.formats.shapes:index",
        "coco": "cast_ray.data.formats.coco:index",
        "cityscapes": "cast_ray.data.formats.cityscapes:index",
        "ade20k": "cast_ray.data.formats.ade20k:index",
        "yolo": "cast_ray.data.formats.yolo:index",
        "labelme": "cast_ray.data.formats.labelme:index",
        "label_maps": "cast_ray.data.formats.label_maps:index",
        "mask_files": "cast_ray.data.formats.mask_files:index",
    },
    "encoders": {
        "convnext": "cast_ray.models.encoders:convnext",
        "conv": "cast_ray.models.encoders:conv",
        "vit": "cast_ray.models.vit_encoders:vit",
        "dinov2-s": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-b": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-l": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-s-reg": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-b-reg": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-l-reg": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-s-reg16": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-b-reg16": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov2-l-reg16": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov3-s": "cast_ray.models.vit_encoders:vision_transformer",
        "dinov3-l": "cast_ray.models.vit_encoders:vision_transformer",
        "resnet50": "cast_ray.models.encoders:hierarchical",
        "sam2-s": "cast_ray.models.encoders:hierarchical",
        "swin-t": "cast_ray.models.encoders:hierarchical",
        "swin-s": "cast_ray.models.encoders:hierarchical",
        "convnext-t": "cast_ray.models.encoders:hierarchical",
    },
    "decoders": {
        "dpt": "cast_ray.models.decoders:DPTDecoder",
        "dpt-released": "cast_ray.models.decoders:ReleasedDPTDecoder",
        "fpn": "cast_ray.models.decoders:FPNDecoder",
        "msdeform": "cast_ray.models.decoders:MSDeformDecoder",
    },
    "teachers": {
        "expert": "cast_ray.teachers.expert:ExpertTeacher",
        "mask2former": "cast_ray.teachers.mask_transformer:MaskTransformerTeacher",
        "grounded_sam": "cast_ray.teachers.grounded_sam:GroundedSamTeacher",
        "sam3": "cast_ray.teachers.sam3:Sam3Teacher",
        "ensemble": "cast_ray.teachers.ensemble:EnsembleTeacher",
    },
}


PARAMETERS = {
    "datasets": ("config", "progress"),
    "encoders": ("config", "architecture"),
    "decoders": ("feature_dims", "config"),
}
"""Kind -> what an object of a user's own is called with."""

PATTERN = r"\w+(\.\w+)*:\w+"
"""`MODULE:ATTRIBUTE`, as a regular expression."""


def import_named(name: str) -> Any:
    """Imports `MODULE:ATTRIBUTE`, the user's own code.

    Raises:
        ValueError: there is no such module or no such name in it, or the module itself fails.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # the user's module may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name!r}: expected MODULE:NAME that Python can import here: {reason}") from error


def check_call(function: Any, name: str, parameters: Sequence[str]) -> None:
    """Checks that the object behind `MODULE:ATTRIBUTE` can be called as it will be, before anything is computed.

    Args:
        function: the object.
        name: how the user wrote it, for the message.
        parameters: names of the positional arguments that it will get.

    Raises:
        ValueError: it is no function, or one of other arguments.
    """
    expected = f"{name!r}: expected a function that is called as f({', '.join(parameters)})"
    if not callable(function):
        raise ValueError(f"{expected}, found a {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind(*parameters)
    except TypeError:
        raise ValueError(f"{expected}, found {name.partition(':')[2]}{signature}") from None


def check_name(kind: str, name: str) -> None:
    """Checks the form of a name without importing anything.

    Raises:
        ValueError: a name that is neither known nor `MODULE:ATTRIBUTE`; the message names the nearest.
    """
    if name not in ROWS[kind] and not re.fullmatch(PATTERN, name):
        known = list(ROWS[kind])
        raise ValueError(f"unknown name {name!r} in {kind}{nearest(name, known)} (one of your own is MODULE:NAME)")


def lookup(kind: str, name: str) -> Any:
    """Returns the object that a recipe names.

    Args:
        kind: datasets, encoders, decoders or teachers.
        name: a name of that kind, or `MODULE:ATTRIBUTE` of code that is not part of this package.

    Raises:
        ValueError: unknown kind or name (the message names the nearest known one), code that cannot be imported, or
            that cannot be called as objects of its kind are.
    """
    if kind not in ROWS:
        raise ValueError(f"unknown kind {kind!r}{nearest(kind, list(ROWS))}")
    if ":" in name:
        found = import_named(name)
        check_call(found, name, PARAMETERS[kind])
        return found
    if name not in ROWS[kind]:
        raise ValueError(f"unknown name {name!r} in {kind}{nearest(name, list(ROWS[kind]))}")
    module, _, attribute = ROWS[kind][name].partition(":")
    return getattr(import_module(module), attribute)
