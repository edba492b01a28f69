"""What a report page is made of: sections of texts, tables and figures, each known to every form of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers stand right and sort as numbers."""

    name: str
    is_number: bool = True


@dataclass(frozen=True)
class Grid:
    """A table as text. rows: the table row that each line belongs to, for the page's filter; marks: a class a line."""

    caption: str
    columns: tuple[Column, ...]
    body: tuple[tuple[str, ...], ...]
    rows: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    def first(self, num_lines: int) -> Grid:
        """Returns the table with at most so many lines; its caption says when it is cut."""
        if len(self.body) <= num_lines:
            return self
        caption = f"{self.caption} (the first {num_lines} of {len(self.body)} lines)"
        return Grid(caption, self.columns, self.body[:num_lines], self.rows[:num_lines], self.marks[:num_lines])


@dataclass(frozen=True)
class Words:
    """Paragraphs, or a list; `failed`: bad news, which must not be overlooked."""

    lines: tuple[str, ...]
    kind: Literal["text", "list", "failed"] = "text"


@dataclass(frozen=True)
class Series:
    """One line (or, in an interval panel, one set of points) of a figure.

    colour: index of its row, `paper`, `shared` (stages that several rows share); low, high: a band or error bars;
    is_published: values of the paper's, which look different. A row may be called anything, also `paper`.
    """

    name: str
    x: tuple[Any, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: int | Literal["paper", "shared"] = 0
    is_dashed: bool = False
    has_markers: bool = False
    has_line: bool = True
    is_published: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `intervals`: `names` on the vertical axis, values with error bars; `bars`: a bar a name."""

    title: str
    x_label: str
    series: tuple[Series, ...]
    kind: Literal["lines", "intervals", "bars"] = "lines"
    names: tuple[str, ...] = ()
    y_label: str = ""
    is_log: bool = False
    zero_line: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels under one caption; `name`: stem of the picture's file beside `report.md`."""

    name: str
    caption: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Picture:
    """A picture that lies in the run folder."""

    caption: str
    path: Path


@dataclass(frozen=True)
class Sample:
    """One validation image of one row: how good the student's answer is, and its panels as data URIs."""

    row: str
    seed: int
    kind: Literal["worst", "best"]
    image_id: str
    score: float
    panels: tuple[tuple[str, str], ...]
    """(what it shows, data URI)."""


@dataclass(frozen=True)
class Samples:
    """Worst and best images of the rows; the pages that cannot show them say where they are."""

    caption: str
    samples: tuple[Sample, ...]
    legend: tuple[tuple[str, str], ...] = ()
    """(class, CSS colour)."""


@dataclass(frozen=True)
class Details:
    """Facts of one result, folded away on a page."""

    row: str
    summary: str
    facts: tuple[tuple[str, str], ...]


Block = Grid | Words | Figure | Picture | Samples | Details


def anchor_of(text: str) -> str:
    """Letters and digits of a text with `-` between them: an id has no spaces, and a link to it needs no escapes."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        return anchor_of(self.title)


@dataclass(frozen=True)
class Article:
    """One table or search on a page. name: short, in links and file names; context: what was run, where and when."""

    name: str
    title: str
    context: Mapping[str, str]
    sections: Sequence[Section]

    @property
    def anchor(self) -> str:
        """The name as a part of an address inside the page."""
        return anchor_of(self.name)

    @property
    def blocks(self) -> list[Block]:
        return [block for section in self.sections for block in section.blocks]

    @property
    def figures(self) -> list[Figure]:
        return [block for block in self.blocks if isinstance(block, Figure)]


def section(title: str, blocks: Sequence[Block | None]) -> Section | None:
    """A section of the blocks that exist; None where there is none."""
    there = tuple(block for block in blocks if block is not None)
    return Section(title, there) if there else None
