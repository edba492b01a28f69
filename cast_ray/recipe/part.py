"""What every part of a recipe is, and every YAML file beside it: frozen, strict, documented field by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

END_OF_SEEDS = 2**63
"""PyTorch takes seeds below 2^64 and numpy none below 0; signed 64-bit numbers are what files and trackers keep."""
Seed = Annotated[int, Field(ge=0, lt=END_OF_SEEDS)]


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
