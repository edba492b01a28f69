"""Pieces of messages that are the same everywhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

MAX_NAMED = 12
_FOLDER_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,119}")
FOLDER_NAME_RULE = "expected a name of 1 to 120 characters without / and not after a dot"


def is_folder_name(text: str) -> bool:
    """Whether a text can name a folder of its own below another one, see FOLDER_NAME_RULE."""
    return _FOLDER_NAME.fullmatch(text) is not None


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of an error message: the known word that was probably meant, else those that are known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else f": expected one of {', '.join(known[:MAX_NAMED])}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
