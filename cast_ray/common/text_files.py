"""Text that a user hands over (class lists, label lists, COCO JSON, tables in YAML), whatever editor wrote it."""

from __future__ import annotations

import codecs
import json
from typing import Any

from cast_ray.common.paths import absolute, read_bytes
from cast_ray.common.text import first_line

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_file(file: str, name: str) -> bytes:
    """The bytes of a file that a user named.

    Args:
        file: local path or URI.
        name: what messages call the file, for example with the option that named it.

    Raises:
        ValueError: the file cannot be read; the message names it.
    """
    try:
        return read_bytes(absolute(file))
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or first_line(error)})") from None


def read_text(file: str, name: str) -> str:
    """The text of a file that a user named; see `read_file` and `decode_text`."""
    return decode_text(read_file(file, name), name)


def decode_text(content: bytes, name: str) -> str:
    """Decodes a user's text file from UTF-8, UTF-16 or UTF-32, without its byte-order mark.

    A byte-order mark decides; without one, zero bytes show UTF-16 or UTF-32 as they do in JSON, and all else is UTF-8.
    Other encodings (Latin-1, Windows-1252) are refused, because nothing in a file says which of them it is.

    Args:
        content: of the file.
        name: what messages call it.

    Raises:
        ValueError: it is no such text; the message names the file and, for another encoding, the line and the byte.
    """
    encoding = next((e for mark, e in _MARKS.items() if content.startswith(mark)), "")
    if not encoding:
        encoding = json.detect_encoding(content) if b"\0" in content[:4] else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise ValueError(
                f"{name}: not a text file ({encoding} that ends or breaks at byte {error.start})"
            ) from None
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ValueError(
            f"{name}: not UTF-8 text (line {line} holds the byte 0x{byte:02X}, which is {chr(byte)!r} in Latin-1): "
            "save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"{name}: not a text file (it holds zero bytes)")
    return text


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text. Raises ValueError with one line that names the file and the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({first_line(error)})") from None
