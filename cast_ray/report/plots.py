"""Figures of a report: the paper's Fig. 3 (margin and false negatives over steps) and learning curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Rows in black-and-white print and for colour-blind readers: the Okabe-Ito colours, then dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
SHARED = "shared by rows"
PANEL_INCHES = (4.6, 3.4)


def margins_figure(results: Sequence[dict[str, Any]], path: str | Path) -> bool:
    """Draws empirical margin and FNR of the sampled negatives over training steps, one line per row and seed.

    Args:
        results: as from `read_results`; points lie in `diagnostics["distill"]`.
        path: PNG to write.

    Returns:
        False, and no file, when no result holds diagnostics.

    Source: paper, Fig. 3 (there p = 1 - FNR).
    """
    panels = [
        ("margin", "margin: mean positive - mean negative cosine"),
        ("fnr", "FNR: negatives of the anchor's own instance"),
    ]
    return _draw(results, "diagnostics", "distill", panels, path)


def curves_figure(results: Sequence[dict[str, Any]], path: str | Path) -> bool:
    """Draws the loss of each training stage over steps: a panel per stage, a line per run of it (shared ones once).

    Returns False, and writes no file, when no result holds curves.
    """
    stages = dict.fromkeys(stage for r in results for stage, points in (r.get("curves") or {}).items() if points)
    return _draw_panels([(list(_lines(results, "curves", s, "loss")), f"{s}: loss") for s in stages], path)


def _draw(
    results: Sequence[dict[str, Any]], section: str, stage: str, panels: Sequence[tuple[str, str]], path: str | Path
) -> bool:
    return _draw_panels([(list(_lines(results, section, stage, key)), label) for key, label in panels], path)


def _lines(
    results: Sequence[dict[str, Any]], section: str, stage: str, key: str
) -> Iterator[tuple[str, list[int], list[float]]]:
    """(name, steps, values) of each run of a stage: its row, or the rows that shared it."""
    runs: dict[Any, tuple[dict[str, None], list[dict[str, Any]]]] = {}
    for i, result in enumerate(results):
        points = [p for p in (result.get(section) or {}).get(stage) or [] if p.get(key) is not None]
        prints = [s["fingerprint"] for s in result.get("stages") or [] if s["name"] == stage]
        if points:
            rows, _ = runs.setdefault(prints[0] if prints else i, ({}, points))
            rows[result["row"]] = None
    for rows, points in runs.values():
        yield " & ".join(rows) if len(rows) < 3 else SHARED, [p["step"] for p in points], [p[key] for p in points]


def _draw_panels(panels: Sequence[tuple[list[tuple[str, list[int], list[float]]], str]], path: str | Path) -> bool:
    panels = [(lines, label) for lines, label in panels if lines]
    if not panels:
        return False
    rows = sorted(dict.fromkeys(row for lines, _ in panels for row, _, _ in lines), key=lambda row: row == SHARED)
    columns = min(len(panels), 3)
    height = -(-len(panels) // columns)
    # The canvas is named, so that no display and no global pyplot state is needed inside a worker or a thread.
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * height + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(height, columns, squeeze=False).flat
    for (lines, label), axes in zip(panels, all_axes):
        _draw_lines(axes, lines, rows)
        axes.set(xlabel="step", title=label)
        axes.title.set_fontsize(10)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels())))
    for axes in figure.axes[1:]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(rows), 2 * columns if max(map(len, rows)) < 20 else columns),
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    return True


def _draw_lines(axes: Axes, lines: Sequence[tuple[str, list[int], list[float]]], rows: Sequence[str]) -> None:
    seen: set[str] = set()
    for row, steps, values in lines:
        i = rows.index(row)
        axes.plot(
            steps,
            values,
            color="#777777" if row == SHARED else COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
            linewidth=1.4,
            marker="." if len(steps) == 1 else "",
            alpha=0.85,
            label="_nolegend_" if row in seen else row,
        )
        seen.add(row)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
