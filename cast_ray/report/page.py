"""`report.html`: one file that opens from a disk, without network, on a laptop and a phone, light and dark."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cast_ray.report.blocks import Article, Samples, Series
from cast_ray.report.plots import css_variable, dash_of, draw_svg, draws_line, legend_of, marks_hollow

DASH_ARRAYS = {"-": "", "--": ' stroke-dasharray="6 4"', ":": ' stroke-dasharray="2 3"'}
MINUS = re.compile(r"(?<![\w.-])-(?=\d)")


def html_page(
    articles: Sequence[Article], state: tuple[str, str], refresh_s: int | None = None, contents: str = ""
) -> str:
    """The page of a run folder.

    Args:
        articles: one a table.
        state: how far the run is, in words, and the class they are shown in: `busy`, `failed` or none.
        refresh_s: the page reloads itself every so many seconds; None: never.
        contents: digest of what the page shows, see `write.write_page`.
    """
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=" · ".join(article.title for article in articles),
            articles=articles,
            refresh_s=refresh_s,
            contents=contents,
            state=state[0],
            state_class=state[1],
            has_samples=any(isinstance(block, Samples) for article in articles for block in article.blocks),
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


def _legend_mark(series: Series) -> Markup:
    """A piece of a series' line, or its marker where it has no line."""
    colour, is_hollow = f"var({css_variable(series.colour)})", marks_hollow(series)
    parts = []
    if draws_line(series):
        dash = DASH_ARRAYS[dash_of(series)]
        parts.append(f'<path d="M0 6H28" stroke="{colour}" stroke-width="2" fill="none"{dash}/>')
    if series.has_markers:
        fill = "none" if is_hollow else colour
        shape = "M14 2L18 6L14 10L10 6Z" if series.is_published else "M10 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0"
        parts.append(f'<path d="{shape}" stroke="{colour}" stroke-width="1.5" fill="{fill}"/>')
    return Markup("".join(parts))


def _data_uri(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
