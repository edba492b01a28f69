"""What every part of a recipe is, and every YAML file beside it: frozen, strict, documented field by field; and how a
recipe's fields enter fingerprints."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import Enum
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

END_OF_SEEDS = 2**63
"""PyTorch takes seeds below 2^64 and numpy none below 0; signed 64-bit numbers are what files and trackers keep."""
Seed = Annotated[int, Field(ge=0, lt=END_OF_SEEDS)]


class Mark(Enum):
    """What a field says about the fingerprints of stages, as in `Annotated[bool, OFF_BY_DEFAULT]`.

    A field without a mark is in the fingerprint of every stage that reads its part of the recipe.
    """

    CHANGES_NO_RESULT = "in no fingerprint: it decides where and how something runs"
    OFF_BY_DEFAULT = "in a fingerprint only where it is not at its default, which must then never change"


CHANGES_NO_RESULT, OFF_BY_DEFAULT = Mark.CHANGES_NO_RESULT, Mark.OFF_BY_DEFAULT


class StrictModel(BaseModel):
    """Settings that a user writes: unknown keys are errors, numbers are finite, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false in place of a number, which pydantic reads as 1 and 0."""
        if any(isinstance(each, bool) for each in _elements(value)):
            kinds = list(_plain_types(cls.model_fields[info.field_name or ""].annotation))
            if _holds(kinds, int, float) and not _holds(kinds, bool, Any):
                raise ValueError("expected a number, not true or false")
        return value


class Part(StrictModel):
    """One section of a recipe."""

    model_config = ConfigDict(validate_default=True)


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


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of: int and None of `tuple[int, ...] | None`."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for each in inner:
        yield from _plain_types(each)


def _holds(kinds: list[Any], *wanted: Any) -> bool:
    """Whether one of the wanted types is among others; some things in an annotation cannot be compared or hashed."""
    return any(kind is each for kind in kinds for each in wanted)


def _elements(value: Any) -> Iterator[Any]:
    """A value, or those inside a list."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _elements(each)
    else:
        yield value
