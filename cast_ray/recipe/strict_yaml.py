"""The one reader of YAML that a user wrote: tables, searches, presets and the values of `--set`.

Plain YAML has three traps that cost an experiment without a word. Of two equal keys the last one wins. A key such as
`no`, `on` or `0.1` is read as a truth value or a number, though it is the name of a row. And YAML 1.1 reads `off` as
false, `1e-3` as a text and `12:30` as a number. Here a key that is there twice is an error, every key is the text that
stands in the file, and values follow the core schema of YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
TEXT, MERGE, NULL = f"{TAG}str", f"{TAG}merge", f"{TAG}null"


class NotYamlError(ValueError):
    """A text cannot be parsed as YAML at all."""


class _StrictLoader(yaml.SafeLoader):
    """Checks each mapping where it is composed, before merge keys (`<<`) bring in keys that it may well repeat."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: expected a name as the key, got a list or a mapping")
            if key.tag == MERGE:
                continue
            key.tag = TEXT
            if key.value in lines:
                raise ValueError(f"line {line}: key {key.value!r} is there twice, first on line {lines[key.value]}")
            lines[key.value] = line
        return node


# Lists of (tag, pattern) by first letter, tried in order: whole numbers stay before the others.
_StrictLoader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0] in (f"{TAG}int", MERGE, NULL)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _letter in _first:
        kept = _StrictLoader.yaml_implicit_resolvers.get(_letter, [])
        kept = [each for each in kept if each[0] != f"{TAG}{_name}"]
        kept.append((f"{TAG}{_name}", re.compile(rf"^(?:{_pattern})$")))
        _StrictLoader.yaml_implicit_resolvers[_letter] = kept


def read_yaml(text: str, as_text: Collection[str] = ()) -> Any:
    """Reads one YAML document.

    Args:
        as_text: keys of the outermost mapping whose values are taken as they are written, `0.1` and `no` included.

    Returns:
        Plain data, in which every key is a text; None for an empty document.

    Raises:
        NotYamlError: it is not YAML.
        ValueError: a key is there twice, or is not a name; the message gives the line.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value in as_text and isinstance(value, yaml.ScalarNode) and value.tag != NULL:
                    value.tag = TEXT
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise NotYamlError(f"not YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
