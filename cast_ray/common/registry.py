"""What a recipe can name: explicit rows `name -> "module:attribute"`, imported only when looked up."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cast_ray.common.text import nearest

ROWS: dict[str, dict[str, str]] = {
    "datasets": {
        "shapes": "cast_ray.data.formats.shapes:index",
        "coco": "cast_ray.data.formats.coco:index",
        "cityscapes": "cast_ray.data.formats.cityscapes:index",
        "ade20k": "cast_ray.data.formats.ade20k:index",
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
        "dinov3-s": "cast_ray.models.vit_encoders:vision_transformer",
        "resnet50": "cast_ray.models.encoders:hierarchical",
        "sam2-s": "cast_ray.models.encoders:hierarchical",
        "swin-t": "cast_ray.models.encoders:hierarchical",
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


def lookup(kind: str, name: str) -> Any:
    """Returns the object that a recipe names.

    Args:
        kind: datasets, encoders, decoders or teachers.
        name: a name of that kind, or `MODULE:ATTRIBUTE` of code that is not part of this package.

    Raises:
        ValueError: unknown kind or name (the message names the nearest known one), or code that cannot be imported.
    """
    if kind not in ROWS:
        raise ValueError(f"unknown kind {kind!r}{nearest(kind, list(ROWS))}")
    if ":" in name:
        return import_named(name)
    if name not in ROWS[kind]:
        raise ValueError(f"unknown name {name!r} in {kind}{nearest(name, list(ROWS[kind]))}")
    module, _, attribute = ROWS[kind][name].partition(":")
    return getattr(import_module(module), attribute)
