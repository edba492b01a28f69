"""Parts of a recipe: marks of fields, and a docstring for each of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cast_ray.recipe import Recipe, recipe_keys
from cast_ray.recipe.part import CHANGES_NO_RESULT, OFF_BY_DEFAULT, Part, identity_of, marked


class Inner(Part):
    width: int = 4
    bias: Annotated[bool, OFF_BY_DEFAULT] = False
    workers: Annotated[int, CHANGES_NO_RESULT] = Field(1, ge=1)


class Outer(Part):
    inner: Inner = Inner()
    scales: Annotated[tuple[float, ...], OFF_BY_DEFAULT] = Field((1.0,), min_length=1)
    words: Annotated[dict[str, int], OFF_BY_DEFAULT] = Field(default_factory=dict)
    rate: float = 0.1


def test_the_identity_of_a_part_follows_the_marks_of_its_fields() -> None:
    assert identity_of(Outer()) == {"inner": {"width": 4}, "rate": 0.1}
    assert identity_of(Outer(rate=0.1, scales=(1.0,), inner=Inner(workers=8))) == identity_of(Outer())
    used = Outer(inner=Inner(bias=True, width=8), scales=(1.0, 2.0), words={"a": 1})
    assert identity_of(used) == {
        "inner": {"width": 8, "bias": True},
        "scales": (1.0, 2.0),
        "words": {"a": 1},
        "rate": 0.1,
    }
    assert identity_of(used, exclude=("rate", "words")) == {
        "inner": {"width": 8, "bias": True},
        "scales": (1.0, 2.0),
    }
    assert identity_of(used, include=("rate", "scales"), exclude=("rate",)) == {"scales": (1.0, 2.0)}


def test_marked_fields_are_named_by_their_keys() -> None:
    assert marked(Outer, OFF_BY_DEFAULT) == ["inner.bias", "scales", "words"]
    keys = marked(Recipe, CHANGES_NO_RESULT)
    assert {"stages.adapt.accumulate", "teacher.sam3.prompts_at_a_time", "evaluation.batch"} <= set(keys)
    assert set(keys) <= set(recipe_keys())


def undocumented(kind: type[Part], prefix: str = "") -> list[str]:
    """Dotted keys of the fields that have no docstring; parts themselves are documented by their class."""
    found: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            found += undocumented(field.annotation, f"{prefix}{name}.")
        elif not field.description:
            found.append(prefix + name)
    return found


def test_every_field_of_a_recipe_says_what_it_means() -> None:
    assert undocumented(Outer) == ["inner.width", "inner.bias", "inner.workers", "scales", "words", "rate"]
    assert undocumented(Recipe) == []
