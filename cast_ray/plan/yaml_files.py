"""YAML files of tables and searches: where those that ship with cast_ray lie, and how any of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cast_ray.common.text import nearest
from cast_ray.common.text_files import read_text
from cast_ray.recipe.strict_yaml import NotYamlError, read_yaml

QUOTES = "a text that holds ': ' or ' #', or begins with %, @, [, {, *, & or !, needs quotes"
CUT_TEXT = "a text that holds a comma needs quotes between { and }"
Spec = TypeVar("Spec", bound=BaseModel)


def shipped_folder(name: str, in_checkout: str) -> Path:
    """Returns the folder of YAML files that come with cast_ray: inside an installed package, beside it in a checkout.

    Args:
        name: of the folder in the package (see `setup.py`).
        in_checkout: of the folder in `sweeps/`.
    """
    package = Path(__file__).parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / "sweeps" / in_checkout


def read_spec(path: Path, model: type[Spec], expected: str) -> Spec:
    """A YAML file as a checked model whose `name` is the file's.

    Raises:
        ValueError: not YAML, a key that is there twice (the message gives its line), not a mapping (it gives the
            `expected` keys) or not valid (it names the key).
    """
    texts = [name for name, field in model.model_fields.items() if field.annotation is str]
    text = read_text(str(path), str(path))
    try:
        spec = read_yaml(text, as_text=texts)
    except NotYamlError as error:
        raise ValueError(f"{path}: {error} ({QUOTES})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(spec, dict):
        raise ValueError(f"{path}: expected a mapping with {expected}, got {type(spec).__name__}")
    try:
        return model.model_validate({"name": path.stem, **spec})
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, model)}") from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with a YAML file that was read into `model`, on one line."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            cut = f" ({CUT_TEXT})" if problem["input"] is None else ""
            lines.append(f"unknown key {key!r}{nearest(key, list(model.model_fields))}{cut}")
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing")
        elif problem["type"] == "value_error":  # of several fields, which the message names, or of one
            lines.append(f"{key}: {message}" if key else message)
        else:
            lines.append(f"{key}: {message} (got {problem['input']!r})")
    return "; ".join(lines)
