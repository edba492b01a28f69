"""`report.html`: one file that opens from a disk, without network, on a laptop and a phone, light and dark."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cast_ray.report.blocks import Samples, Section, Series
from cast_ray.report.content import Report
from cast_ray.report.plots import css_variable, dash_of, draw_svg, draws_line, is_paper, legend_of, marks_hollow

DASH_ARRAYS = {"-": "", "--": ' stroke-dasharray="6 4"', ":": ' stroke-dasharray="2 3"'}
MINUS = re.compile(r"(?<![\w.-])-(?=\d)")


@dataclass(frozen=True)
class _Article:
    table: str
    title: str
    context: dict[str, str]
    sections: Sequence[Section]


def html_page(reports: Sequence[Report], sections: Sequence[Sequence[Section]], refresh_s: int | None = None) -> str:
    """The page of a run folder's tables.

    Args:
        reports: one a table.
        sections: of each report.
        refresh_s: the page reloads itself every so many seconds; None: never.
    """
    articles = [_Article(r.table, r.title, dict(r.context), s) for r, s in zip(reports, sections)]
    state, state_class = _state(reports, refresh_s)
    blocks = [block for each in sections for made in each for block in made.blocks]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=" · ".join(report.title for report in reports),
            reports=articles,
            refresh_s=refresh_s,
            state=state,
            state_class=state_class,
            has_samples=any(isinstance(block, Samples) for block in blocks),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cast_ray.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    places = itertools.count()
    environment.filters["signs"] = lambda text: MINUS.sub("−", text)
    environment.globals |= {
        "kind_of": lambda block: type(block).__name__.lower(),
        "draw_svg": lambda panel: Markup(draw_svg(panel, next(places))),
        "legend_of": legend_of,
        "legend_mark": _legend_mark,
        "data_uri": _data_uri,
    }
    return environment


def _state(reports: Sequence[Report], refresh_s: int | None) -> tuple[str, str]:
    """How far the run is, in words, and the class they are shown in."""
    expected = sum(report.num_expected for report in reports)
    pending = sum(report.num_pending for report in reports)
    failed = sum(len(report.failures) for report in reports)
    words = f"{expected - pending} of {expected} results"
    if failed:
        words += f", {failed} FAILED"
    if pending:
        reloads = f"; this page reloads every {refresh_s} s" if refresh_s else ""
        return f"Not complete: {words}{reloads}", "failed" if failed else "busy"
    return words, "failed" if failed else ""


def _legend_mark(series: Series) -> Markup:
    """A piece of a series' line, or its marker where it has no line."""
    colour, is_hollow = f"var({css_variable(series.colour)})", marks_hollow(series)
    parts = []
    if draws_line(series):
        dash = DASH_ARRAYS[dash_of(series)]
        parts.append(f'<path d="M0 6H28" stroke="{colour}" stroke-width="2" fill="none"{dash}/>')
    if series.has_markers:
        fill = "none" if is_hollow else colour
        shape = "M14 2L18 6L14 10L10 6Z" if is_paper(series) else "M10 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0"
        parts.append(f'<path d="{shape}" stroke="{colour}" stroke-width="1.5" fill="{fill}"/>')
    return Markup("".join(parts))


def _data_uri(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
