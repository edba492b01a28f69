"""What every part of a recipe is: frozen, strict, documented field by field, and how its fields enter fingerprints."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict


class Mark(Enum):
    """What a field says about the fingerprints of stages, as in `Annotated[bool, OFF_BY_DEFAULT]`.

    A field without a mark is in the fingerprint of every stage that reads its part of the recipe.
    """

    CHANGES_NO_RESULT = "in no fingerprint: it decides where and how something runs"
    OFF_BY_DEFAULT = "in a fingerprint only where it is not at its default, which must then never change"


CHANGES_NO_RESULT, OFF_BY_DEFAULT = Mark.CHANGES_NO_RESULT, Mark.OFF_BY_DEFAULT


class Part(BaseModel):
    """One section of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def identity_of(part: Part, *, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Returns the fields of a part that belong to the identity of a stage which reads it, as plain data.

    This is the one place that reads marks. Parts inside the part follow the same rule.

    Args:
        include: names of the fields that the stage reads; None: all.
        exclude: names of fields that this stage does not read.
    """
    return part.model_dump(
        include=None if include is None else set(include), exclude=_left_out(part) | dict.fromkeys(exclude, True)
    )


def _left_out(part: Part) -> dict[str, Any]:
    """The fields that the marks leave out, as pydantic's `exclude` has them."""
    left_out: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        is_off = OFF_BY_DEFAULT in field.metadata and value == field.get_default(call_default_factory=True)
        if is_off or CHANGES_NO_RESULT in field.metadata:
            left_out[name] = True
        elif isinstance(value, Part) and (inside := _left_out(value)):
            left_out[name] = inside
    return left_out


def marked(kind: type[Part], mark: Mark) -> list[str]:
    """Returns the dotted keys of a part's fields that have a mark, those of the parts inside it included."""
    return list(_marked(kind, mark, ""))


def _marked(kind: type[Part], mark: Mark, prefix: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        if mark in field.metadata:
            yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            yield from _marked(field.annotation, mark, f"{prefix}{name}.")
