"""Figures as data: shared stages once, seeds as bands, swept numbers found in the recipes, the paper's curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_scenes import ROWS, empty_audit, result, save

from cast_ray.plan.ablation import Table, load_table
from cast_ray.recipe import build_recipe
from cast_ray.report.blocks import Figure, Panel, Series
from cast_ray.report.content import Report
from cast_ray.report.curves import (
    MAX_POINTS,
    SHARED,
    audit_curves,
    axis_curves,
    axis_of,
    comparison,
    compute_bars,
    learning_curves,
    margin_curves,
)
from cast_ray.report.plots import COLOURS, draw_png, draw_svg, legend_of
from cast_ray.report.results import summarise
from cast_ray.report.run_folder import read_results


def report_of(tmp_path: Path, results: list[dict[str, Any]], table: Table | None = None) -> Report:
    return summarise(read_results(save(tmp_path, results)), table)


def panels_of(figure: Figure | None) -> dict[str, Panel]:
    assert figure is not None
    return {panel.title: panel for panel in figure.panels}


def series_of(panel: Panel) -> dict[str, Series]:
    return {series.name: series for series in panel.series}


def test_a_shared_stage_is_drawn_once(tmp_path: Path) -> None:
    curve = {"pretrain": [{"step": 1, "loss": 2.0}], "distill": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}
    results = [result(row, curves=curve) for row in ROWS]
    results[1]["stages"][2]["fingerprint"] = results[0]["stages"][2]["fingerprint"]
    panels = panels_of(learning_curves(report_of(tmp_path, results)))
    (shared,) = panels["pretrain: loss"].series
    assert (shared.name, shared.x, shared.y, shared.colour) == (SHARED, (1,), (2.0,), "shared")
    assert [(s.name, s.colour) for s in panels["distill: loss"].series] == [
        ("sup & sup+semi", 0),
        ("sup+pxl", 2),
        ("sup+semi+pxl", 3),
    ]


def test_seeds_make_a_mean_with_a_band(tmp_path: Path) -> None:
    results = [result("sup", s, curves={"distill": [{"step": 1, "loss": 1.0 + s}]}) for s in range(3)]
    figure = learning_curves(report_of(tmp_path, results))
    (series,) = panels_of(figure)["distill: loss"].series
    assert (series.y, series.low, series.high) == ((2.0,), (1.0,), (3.0,))
    assert figure is not None and "lowest to highest" in figure.caption
    results[1]["curves"]["distill"] = [{"step": 5, "loss": 9.0}]  # logged at another step: no mean to speak of
    lines = panels_of(learning_curves(report_of(tmp_path / "b", results)))["distill: loss"].series
    assert [(s.name, s.x, s.low) for s in lines] == [("sup", (1,), ()), ("sup", (5,), ()), ("sup", (1,), ())]


def test_validation_points_are_drawn_and_long_curves_thinned(tmp_path: Path) -> None:
    points: list[dict[str, float]] = [{"step": s, "loss": 1.0 / s} for s in range(1, 5001)]
    points[99]["val/mask_ap"], points[4999]["val/mask_ap"] = 11.0, 12.0
    panels = panels_of(learning_curves(report_of(tmp_path, [result("sup", curves={"distill": points})])))
    (ap,) = panels["distill: validation AP"].series
    assert (ap.x, ap.y, ap.has_markers) == ((100, 5000), (11.0, 12.0), True)
    (loss,) = panels["distill: loss"].series
    assert len(loss.x) == MAX_POINTS and (loss.x[0], loss.x[-1]) == (1, 5000)


def test_missing_and_infinite_diagnostics_are_left_out(tmp_path: Path) -> None:
    points = [{"step": 0, "margin": 0.1, "fnr": float("nan")}, {"step": 20, "margin": 0.2}]
    panels = panels_of(margin_curves(report_of(tmp_path, [result("sup", diagnostics={"distill": points})])))
    assert [s.y for s in panels["margin: mean positive - mean negative cosine"].series] == [(0.1, 0.2)]
    assert len(panels) == 1


def labels_results(fractions: list[float], aps: list[float], **more: Any) -> list[dict[str, Any]]:
    results = []
    for fraction, ap in zip(fractions, aps):
        for seed in range(2):
            recipe = build_recipe("shapes", overrides={"data.label_fraction": fraction, "seed": seed, **more})
            made = result("sup", seed, ap=ap + seed, table="mine", recipe=recipe.model_dump())
            results.append(made | {"row": f"{100 * fraction:g} %"})
    return results


def labels_table(rows: list[str]) -> Table:
    return Table(
        name="mine",
        title="Labels",
        metric="student/mask_ap",
        baseline=rows[0],
        rows={row: {} for row in rows},
        paper="labels",
        paper_columns={"distilled_ap": "student/mask_ap"},
    )


def test_label_fractions_have_bands_and_the_papers_curves(tmp_path: Path) -> None:
    results = labels_results([0.02, 0.04, 0.08], [10.0, 20.0, 30.0])
    report = report_of(tmp_path, results, labels_table(["2 %", "4 %", "8 %"]))
    axis = axis_of(report)
    assert axis is not None and axis.label == "labelled images (%)"
    figure = axis_curves(report, axis)
    series = series_of(panels_of(figure)["student AP"])
    ours = series["measured"]
    assert ours.x == pytest.approx((2, 4, 8)) and ours.y == pytest.approx((10.5, 20.5, 30.5))
    assert ours.low[0] == pytest.approx(10.5 - 0.5**0.5) and ours.high[0] == pytest.approx(10.5 + 0.5**0.5)
    paper = series["paper"]
    assert paper.x == pytest.approx((5, 10, 30)) and paper.y == (29.2, 32.2, 38.5)
    assert paper.colour == "paper" and paper.is_dashed
    assert series["paper: guided distillation"].y == (23.0, 30.8, 35.6) and "paper: s4m" in series
    assert list(series_of(panels_of(figure)["teacher AP"])) == ["measured"]


def audit(score: float) -> dict[str, Any]:
    numbers = {"num_labels": 9, "num_objects": 9, "precision": 100 * score, "recall": None}
    calibration = {"score": [None, score], "precision": [None, 0.5], "ece": 0.1}
    per_class = {"disc": numbers, "rare": numbers | {"num_objects": 1}}
    return empty_audit() | {"per_class": per_class, "calibration": calibration}


def test_audits_of_pseudo_labels_are_drawn_once_for_rows_that_share_them(tmp_path: Path) -> None:
    results = [result(row, seed) for row in ROWS for seed in range(2)]
    for r in results[2:]:
        r["pseudo_labels"] = {"label-adapted": audit(0.1), "label": audit(0.7 if r["row"] != "sup+semi+pxl" else 0.9)}
        r["stages"][1]["fingerprint"] = "other" if r["row"] == "sup+semi+pxl" else "label"
    panels = panels_of(audit_curves(report_of(tmp_path, results)))
    assert list(panels) == ["reliability of pseudo-labels", "precision by class (%)"]
    lines = series_of(panels["reliability of pseudo-labels"])
    assert list(lines) == ["as sure as right", "sup+semi & sup+pxl", "sup+semi+pxl"]
    assert (lines["sup+semi+pxl"].x, lines["sup+semi+pxl"].y) == ((0.9,), (0.5,))
    precision = panels["precision by class (%)"]
    assert precision.names == ("disc", "rare")
    assert series_of(precision)["sup+semi & sup+pxl"].y == pytest.approx((70, 70))
    assert audit_curves(report_of(tmp_path / "b", [result("sup")])) is None


def test_other_differences_between_rows_make_lines(tmp_path: Path) -> None:
    results = labels_results([0.02, 0.04, 0.08], [10.0, 20.0, 30.0])
    for r in labels_results([0.02, 0.04, 0.08], [5.0, 6.0, 7.0], **{"loss.lambda_semi": 0}):
        results.append(r | {"row": f"{r['row']}, supervised"})
    report = report_of(tmp_path, results)
    axis = axis_of(report)
    assert axis is not None
    series = series_of(panels_of(axis_curves(report, axis))["student AP"])
    assert {name: s.x for name, s in series.items()} == {
        "lambda_semi 1.0": pytest.approx((2, 4, 8)),
        "supervised": pytest.approx((2, 4, 8)),
    }
    assert series["supervised"].y == pytest.approx((5.5, 6.5, 7.5))


def test_tables_that_sweep_no_number_have_no_axis(tmp_path: Path) -> None:
    for name in ("losses", "negatives"):
        table = load_table(name)
        results = [
            result("sup", table=name, recipe=table.row_recipe(row, "shapes").model_dump()) | {"row": row}
            for row in table.rows
        ]
        assert axis_of(report_of(tmp_path / name, results)) is None


def test_weights_are_an_axis_with_the_papers_margins(tmp_path: Path) -> None:
    table = load_table("margins")
    results = [
        result("sup", table="margins", recipe=table.row_recipe(row, "shapes").model_dump()) | {"row": row}
        for row in table.rows
    ]
    report = report_of(tmp_path, results)
    axis = axis_of(report)
    assert axis is not None and axis.label == "loss.lambda_pxl"
    panels = panels_of(axis_curves(report, axis))
    assert series_of(panels["margin"])["paper"].y == (0.55, 0.59, 0.64, 0.69)
    assert panels["margin"].is_log and "paper" not in series_of(panels["student AP"])


def test_the_comparison_keeps_the_order_of_rows_and_shows_the_papers_differences(tmp_path: Path) -> None:
    results = [result(row, seed) for row in ROWS for seed in range(2 if row != "sup+pxl" else 1)]
    values, differences = (panels_of(comparison(report_of(tmp_path, results)))).values()
    assert values.names == ROWS and differences.names == ROWS[1:] and differences.zero_line
    paper = series_of(differences)["paper"]
    assert dict(zip(paper.x, paper.y)) == pytest.approx({"sup+semi": 9.6, "sup+pxl": 6.4, "sup+semi+pxl": 11.1})
    assert comparison(report_of(tmp_path / "b", [result("sup")])) is None


@pytest.mark.parametrize("draw", [learning_curves, margin_curves, comparison, compute_bars])
def test_every_figure_is_drawn_as_png_and_svg(draw: Any, tmp_path: Path) -> None:
    figure = draw(report_of(tmp_path, [result(row, seed) for row in ROWS for seed in range(2)]))
    draw_png(figure, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 300
    for panel in figure.panels:
        svg = draw_svg(panel)
        assert svg.startswith('<svg role="img" aria-label="') and svg.rstrip().endswith("</svg>")
        assert "var(--ink)" in svg and "var(--series-0)" in svg
        assert "#fe00" not in svg and "<metadata" not in svg and "<text" in svg
        assert not any(colour.lower() in svg for colour in COLOURS)


def test_a_legend_names_each_series_once(tmp_path: Path) -> None:
    figure = learning_curves(report_of(tmp_path, [result(row, seed) for row in ROWS for seed in range(2)]))
    assert figure is not None and [s.name for s in legend_of(figure)] == list(ROWS)
    alone = learning_curves(report_of(tmp_path / "b", [result("sup")]))
    assert alone is not None and legend_of(alone) == []
