"""Pieces of messages that are the same everywhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

MAX_NAMED = 16
LIKE, LIKE_LAST_PART = 0.6, 0.75
"""How alike two words are (0 to 1, as difflib measures it) that are taken for each other: whole names, and the last
parts of names such as `loss.lambda_pxl`, of which the shorter words need more in common."""
_FOLDER_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,119}")
_PARTS, _REST = re.compile(r"[./]"), re.compile(r"([./]).*")
FOLDER_NAME_RULE = "expected a name of 1 to 120 characters without / and not after a dot"


def is_folder_name(text: str) -> bool:
    """Whether a text can name a folder of its own below another one, see FOLDER_NAME_RULE."""
    return _FOLDER_NAME.fullmatch(text) is not None


def nearest(word: str, known: Sequence[str]) -> str:
    """Returns the end of an error message: the known word that was probably meant, else those that are known.

    Args:
        word: what was written.
        known: names; those with parts (`loss.lambda_pxl`, `student/ap50`) are found by their last part too, and are
            named by their first part where they are many.
    """
    if close := difflib.get_close_matches(word, known, n=1, cutoff=LIKE):
        return f": did you mean {close[0]!r}?"
    of_last_part: dict[str, list[str]] = {}
    for name in known:
        of_last_part.setdefault(_PARTS.split(name)[-1], []).append(name)
    if close := difflib.get_close_matches(word, of_last_part, n=1, cutoff=LIKE_LAST_PART):
        *most, last = map(repr, of_last_part[close[0]][:MAX_NAMED])
        return f": did you mean {' or '.join([*filter(None, [', '.join(most)]), last])}?"
    shown = list(known)
    if len(shown) > MAX_NAMED:
        shown = list(dict.fromkeys(_REST.sub(r"\1*", name) for name in known))
    return f": expected one of {first_of([repr(name) if ',' in name else name for name in shown], MAX_NAMED)}"


def first_of(words: Sequence[str], most: int) -> str:
    """The first words with commas between them, and how many more there are."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
