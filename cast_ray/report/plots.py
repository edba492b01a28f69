"""Figures drawn by matplotlib: one PNG beside `report.md`, or one SVG a panel inside the page.

The SVGs hold no colours of their own: a stand-in for each is replaced by a variable of the page's style sheet, so that
one picture is readable on a light and on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from cast_ray.report.blocks import Figure, Panel, Series
from cast_ray.report.markup import one_line

# Rows in black-and-white print and for colour-blind readers: the Okabe-Ito colours, then dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Dash = Literal["-", "--", ":", ""]
DASHES: tuple[Dash, ...] = ("-", "--", ":")
PANEL_INCHES = (4.4, 3.1)
BAR_INCHES, LINE_INCHES, LETTER_INCHES = 0.3, 0.24, 0.085
MAX_LETTERS = 36
PLAIN_TEXT: Any = {"text.parse_math": False}
"""A `$` in the name of a row or class is a `$`, not the beginning of a formula."""
TAG, STAND_IN = re.compile("<[^>]*>"), re.compile("#fe00([0-9a-f]{2})")
"""Colours stand in tags; between them stands text, which may say anything."""
VARIABLES = {"ink": 0xA0, "grid": 0xA1, "paper": 0xA2, "shared": 0xA3}


@dataclass(frozen=True)
class Theme:
    """Colours of a drawing: of text and axes, of the grid, of the paper's values, of shared stages, of rows."""

    ink: str
    grid: str
    paper: str
    shared: str
    rows: tuple[str, ...]

    def colour(self, which: int | Literal["paper", "shared"]) -> str:
        if isinstance(which, int):
            return self.rows[which % len(self.rows)]
        return self.paper if which == "paper" else self.shared


PRINT = Theme("#222222", "#dddddd", "#444444", "#777777", COLOURS)
PAGE = Theme(
    **{name: f"#fe00{code:02x}" for name, code in VARIABLES.items()},
    rows=tuple(f"#fe00{i:02x}" for i in range(len(COLOURS))),
)


def css_variable(colour: int | Literal["paper", "shared"]) -> str:
    """Name of the style sheet's variable that a series is drawn in."""
    return f"--series-{colour % len(COLOURS)}" if isinstance(colour, int) else f"--{colour}"


def dash_of(series: Series) -> Dash:
    turn = series.colour // len(COLOURS) if isinstance(series.colour, int) else 0
    return DASHES[(turn + series.is_dashed) % len(DASHES)]


def marks_hollow(series: Series) -> bool:
    return series.is_published or series.is_dashed


def draws_line(series: Series) -> bool:
    """Whether points are joined: numbers are, names are not."""
    return series.has_line and bool(series.x) and not isinstance(series.x[0], str)


def legend_of(figure: Figure) -> list[Series]:
    """One series of each name, in the order they appear; none where a single name says nothing."""
    series = [s for panel in figure.panels if panel.kind != "bars" for s in panel.series]
    lines_last = sorted(series, key=lambda s: not s.has_markers)  # of one name the last one stays: a plain line
    named = {(s.name, s.is_published): s for s in lines_last}
    named = {(s.name, s.is_published): named[s.name, s.is_published] for s in series}
    return list(named.values()) if len(named) > 1 else []


def draw_png(figure: Figure, path: Path) -> None:
    """Draws all panels of a figure and its legend into one PNG."""
    columns = min(len(figure.panels), 3)
    height = -(-len(figure.panels) // columns)
    legend = legend_of(figure)
    is_wide = columns == 3  # else the legend stands beside the panels and does not press on them
    longest = max((len(_label(series.name)) for series in legend), default=0)
    num_columns = max(1, int(PANEL_INCHES[0] * columns / (0.5 + LETTER_INCHES * longest)))
    below = LINE_INCHES * -(-len(legend) // num_columns) if is_wide else 0.0
    beside = 0.7 + LETTER_INCHES * longest if legend and not is_wide else 0.0
    size = (PANEL_INCHES[0] * columns + beside, max(map(_height, figure.panels)) * height + below)
    with matplotlib.rc_context(PLAIN_TEXT):
        _draw_canvas(figure, size, columns, height, num_columns if is_wide else 0).savefig(path, dpi=110)


def _draw_canvas(figure: Figure, size: tuple[float, float], columns: int, height: int, below: int) -> Canvas:
    """All panels of a figure on one canvas; `below`: columns of the legend below them, 0: it stands beside them."""
    # The canvas is named, so that no display and no global pyplot state is needed inside a worker or a thread.
    canvas = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    all_axes = list(canvas.subplots(height, columns, squeeze=False).flat)
    for panel, axes in zip(figure.panels, all_axes):
        _draw_panel(axes, panel, PRINT)
    for axes in all_axes[len(figure.panels) :]:
        axes.remove()
    if legend := legend_of(figure):
        canvas.legend(
            [_handle(series, PRINT) for series in legend],
            [_label(series.name) for series in legend],
            loc="outside lower center" if below else "outside right upper",
            ncols=below or 1,
            frameon=False,
        )
    return canvas


def draw_svg(panel: Panel, place: int = 0) -> str:
    """One panel as an `<svg>` element in the colours of the page, with a label for those who do not see it.

    Args:
        place: position of the panel on its page, since no two elements of a page may have the same id.
    """
    with matplotlib.rc_context(PLAIN_TEXT | {"svg.fonttype": "none", "svg.hashsalt": f"panel {place}"}):
        canvas = Canvas(figsize=(PANEL_INCHES[0], _height(panel)), layout="constrained")
        FigureCanvasSVG(canvas)
        _draw_panel(canvas.subplots(), panel, PAGE)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # figure_1, axes_1, ...: the same in every panel
    text = TAG.sub(lambda tag: STAND_IN.sub(lambda m: f"var({_VARIABLE_OF[int(m[1], 16)]})", tag[0]), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(one_line(panel.title))}"', 1)


_VARIABLE_OF = {code: f"--{name}" for name, code in VARIABLES.items()} | {
    i: css_variable(i) for i in range(len(COLOURS))
}


def _label(name: str) -> str:
    """A name beside an axis or in a legend, cut so that there is room for the drawing; tables have all of it."""
    name = one_line(name)
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 3]}..."


def _height(panel: Panel) -> float:
    if panel.kind == "lines":
        return PANEL_INCHES[1]
    return max(1.2, 0.7 + BAR_INCHES * len(panel.names))


def _handle(series: Series, theme: Theme) -> Line2D:
    return Line2D(
        [], [], linestyle=dash_of(series) if draws_line(series) else "", **_marker_style(series, theme), markersize=5
    )


def _marker_style(series: Series, theme: Theme) -> dict[str, Any]:
    colour = theme.colour(series.colour)
    return {
        "color": colour,
        "marker": ("D" if series.is_published else "o") if series.has_markers else "",
        "markerfacecolor": "none" if marks_hollow(series) else colour,
    }


def _draw_panel(axes: Axes, panel: Panel, theme: Theme) -> None:
    draw = {"lines": _draw_lines, "intervals": _draw_intervals, "bars": _draw_bars}[panel.kind]
    draw(axes, panel, theme)
    axes.set_title(one_line(panel.title), fontsize=10, color=theme.ink)
    axes.set_xlabel("" if panel.kind == "bars" else one_line(panel.x_label), color=theme.ink)
    axes.set_ylabel(one_line(panel.y_label), color=theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(theme.ink)
    axes.tick_params(colors=theme.ink, which="both")
    axes.set_axisbelow(True)


def _draw_lines(axes: Axes, panel: Panel, theme: Theme) -> None:
    for series in panel.series:
        style = _marker_style(series, theme)
        line = dash_of(series) if draws_line(series) else ""
        axes.plot(series.x, series.y, linestyle=line, linewidth=1.5, markersize=4, **style)
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=style["color"], alpha=0.16, linewidth=0)
    if panel.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the default writes formulas
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=theme.grid, linewidth=0.6)


def _draw_intervals(axes: Axes, panel: Panel, theme: Theme) -> None:
    for series in panel.series:
        places = [panel.names.index(name) + (0.22 if series.is_published else 0.0) for name in series.x]
        style = _marker_style(series, theme)
        if series.low:
            dashes = {"color": style["color"], "linestyle": dash_of(series), "linewidth": 1.8, "zorder": 1}
            axes.hlines(places, series.low, series.high, **dashes)
        axes.plot(series.y, places, linestyle="", markersize=5, **style)
    if panel.zero_line:
        axes.axvline(0, color=theme.ink, linewidth=0.8)
    _name_rows(axes, panel.names, theme)


def _draw_bars(axes: Axes, panel: Panel, theme: Theme) -> None:
    for series in panel.series:
        places = [panel.names.index(name) for name in series.x]
        axes.barh(places, series.y, color=theme.colour(series.colour), height=0.6)
        for place, value in zip(places, series.y):
            axes.annotate(
                f"{value:,.0f}" if value >= 10 else f"{value:.3g}",
                (value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=theme.ink,
            )
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    _name_rows(axes, panel.names, theme)


def _name_rows(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(color=theme.grid, linewidth=0.6, axis="x")
