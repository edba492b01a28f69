"""JSON documents that outlive the build that wrote them: typed parts, a schema version, one-line errors.

Rules that every document follows:

- The types of known fields are checked strictly: the text "3" is not a number.
- A field that is missing or null is unknown and gets its default, so that files of earlier builds are still read.
- A field that this build does not know is kept, and is written again with the rest.
- A document of a newer schema version is refused: its known fields may mean something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Strict, ValidationError, model_validator
from pydantic_core import ErrorDetails

T = TypeVar("T")
Several = Annotated[tuple[T, ...], Strict(False)]
"""A JSON array. A strict tuple would refuse the list that JSON gives."""

UNVERSIONED = 0
"""Version of the documents that were written before they had one."""

_KINDS = {
    "bool_type": "bool",
    "dict_type": "dict",
    "float_type": "number",
    "int_type": "int",
    "model_type": "dict",
    "string_type": "str",
    "tuple_type": "list",
}
"""pydantic's type of an error -> what was expected, in the words of JSON's types in Python."""


class DocumentPart(BaseModel):
    """A typed part of a JSON document; see the module for its rules."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", use_attribute_docstrings=True)

    NAME: ClassVar[str] = "such a document"
    """What it is called in error messages."""

    @classmethod
    def read(cls, content: str | bytes, place: str) -> Self:
        """Reads it from JSON text.

        Args:
            place: path or URI of the file, for error messages.

        Raises:
            NewerDocumentError: a newer build has written it.
            ValueError: it is not JSON, or not such a document. The message is one line with place and field.
        """
        return cls.of(parse(content, place), place)

    @classmethod
    def of(cls, plain: Any, place: str) -> Self:
        """Reads it from plain data; see `read`."""
        if not isinstance(plain, dict):
            raise ValueError(f"{place}: not {cls.NAME}: expected a mapping, got {type(plain).__name__}")
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            raise ValueError(f"{place}: not {cls.NAME}: {_one_line(error)}") from None

    @model_validator(mode="before")
    @classmethod
    def _null_is_unknown(cls, content: Any) -> Any:
        """A null where a value is expected counts as a missing field."""
        if not isinstance(content, Mapping):
            return content
        fields = cls.model_fields
        return {k: v for k, v in content.items() if v is not None or k not in fields or fields[k].default is None}

    @property
    def unknown_fields(self) -> dict[str, Any]:
        """Fields that this build does not know, as they were read."""
        return self.model_extra or {}

    def plain(self) -> dict[str, Any]:
        """The part as plain data, with the fields that were set and those that this build does not know."""
        return self.model_dump(exclude_unset=True)


def parse(content: str | bytes, place: str) -> Any:
    """JSON text as plain data; raises ValueError, which names the file, where it is not JSON or not UTF-8."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{place}: not a JSON file: {error}") from None


class NewerDocumentError(ValueError):
    """A document that a newer build wrote, which this one must neither read nor replace."""


class Document(DocumentPart):
    """A JSON file with a schema version. A subclass gives its own NAME and VERSION."""

    VERSION: ClassVar[int]
    """The schema version that this build writes, and the highest that it reads."""

    schema_version: int = UNVERSIONED
    """Version of the schema that the file was written with; 0 where the file does not say it."""

    @classmethod
    def of(cls, plain: Any, place: str) -> Self:
        """Reads it from plain data; see `read`."""
        version = plain.get("schema_version") if isinstance(plain, dict) else None
        if isinstance(version, int) and version > cls.VERSION:
            raise NewerDocumentError(
                f"{place}: schema_version is {version}, expected at most {cls.VERSION}: a newer version of cast_ray "
                "wrote it"
            )
        return super().of(plain, place)

    def to_json(self) -> str:
        """The document as JSON text, which `read` takes."""
        return json.dumps(self.plain(), indent=1)


def _one_line(error: ValidationError) -> str:
    """`no row, seed` where fields are missing, else the first field of a wrong type: `stages[0].steps is str, ...`."""
    details = error.errors(include_url=False)
    if missing := [field_path(detail["loc"]) for detail in details if detail["type"] == "missing"]:
        return f"no {', '.join(missing)}"
    first = details[0]
    alternatives = [d for d in details if d["input"] is first["input"] and d["loc"][:-1] == first["loc"][:-1]]
    place = first["loc"]
    if len(alternatives) > 1:  # of a union, whose members pydantic names after the field
        place = place[:-1]
    expected = [_KINDS.get(detail["type"], _reason(detail)) for detail in alternatives]
    return f"{field_path(place)} is {_value_text(first)}, expected {' or '.join(dict.fromkeys(expected))}"


def _value_text(detail: ErrorDetails) -> str:
    if detail["type"] in _KINDS:
        return type(detail["input"]).__name__
    return repr(detail["input"])[:60]


def _reason(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    return str(context.get("expected") or context.get("error") or detail["msg"])


def field_path(location: Sequence[str | int]) -> str:
    """`stages[0].steps` for ("stages", 0, "steps")."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
