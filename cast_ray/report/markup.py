"""Names that users chose (rows, classes, tables, paths) as text in each form of a report, whatever is in them."""

from __future__ import annotations

import re
import unicodedata

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
}
# An underscore inside a word is no emphasis in Markdown, and file names and recipe keys have many.
_MARKDOWN = re.compile(r"[\\`*\[\]<|~&$]|(?<![^\W_])(?<!_)_++|(?<!_)_++(?![^\W_])")
_AT_LINE_START = re.compile(r"^(\d+)?([#+>=.)-])(?=\s|$)")


def one_line(text: str) -> str:
    """Replaces line breaks and control characters by spaces, because no form of a report may hold them."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    escaped = _MARKDOWN.sub(lambda match: "".join("\\" + c for c in match[0]), one_line(text))
    return _AT_LINE_START.sub(lambda match: f"{match[1] or ''}\\{match[2]}", escaped)


def markdown_code(text: str) -> str:
    """A code span, fenced by more backticks than any in the text."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"{fence}{text}{fence}"


def latex_text(text: str) -> str:
    r"""Text that LaTeX sets as it is; at its start `{}` keeps `[` and `*` apart from the row's end `\\` before it."""
    text = one_line(text)
    escaped = "".join(LATEX.get(character, character) for character in text)
    return "{}" + escaped if text[:1] in ("[", "*") else escaped
