"""The sections of a report, each a function of what was measured; a new one is a function and a line in SECTIONS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cast_ray.contracts.compute_node import nodes_text
from cast_ray.report.blocks import Column, Details, Grid, Picture, Section, Words, section
from cast_ray.report.content import Report, Result
from cast_ray.report.curves import (
    audit_curves,
    axis_curves,
    axis_of,
    comparison,
    compute_bars,
    learning_curves,
    margin_curves,
)
from cast_ray.report.decision_table import decisions_grid
from cast_ray.report.label_audit import WORST_SHEET, audit_table, coverage_table, precision_table
from cast_ray.report.notes import failure_text, hardware_text, status_text
from cast_ray.report.overlays import CONTACT_SHEET
from cast_ray.report.run_folder import RESULT
from cast_ray.report.samples import read_samples
from cast_ray.report.tables import (
    classes_grid,
    comparison_grid,
    device_grid,
    main_grid,
    measures_grid,
    other_grid,
    pairs_grid,
    results_grid,
    stage_grid,
)

MAX_LINES = 500
"""Most lines of a table on a page; `report.csv` has all."""
MAX_DETAILS = 200
"""Results whose recipe a page spells out; of more, the files say it."""


def results_section(report: Report, folder: Path) -> Section | None:
    """The main table, what failed and what the numbers can and cannot show."""
    return section(
        "Results",
        [
            Words(tuple(failure_text(report)), "failed") if report.failures else None,
            main_grid(report),
            Words(report.notes, "list") if report.notes else None,
        ],
    )


def comparison_section(report: Report, folder: Path) -> Section | None:
    """Every AP against the baseline, the ranking one first and drawn."""
    metrics = dict.fromkeys([report.metric, *(d.metric for d in report.differences)])
    grids = [comparison_grid(report, metric) for metric in metrics]
    return section(
        f"Against {report.baseline}", [decisions_grid(report), comparison(report), *grids, pairs_grid(report)]
    )


def axis_section(report: Report, folder: Path) -> Section | None:
    """Curves over a number that rows sweep: label fractions with the paper's curves, weights, counts of images."""
    axis = axis_of(report)
    return section(f"Along {axis.label}", [axis_curves(report, axis)]) if axis else None


def contrast_section(report: Report, folder: Path) -> Section | None:
    """Margin and false-negative rate of the pixel contrast (paper, Fig. 3)."""
    return section("Pixel contrast", [margin_curves(report)])


def learning_section(report: Report, folder: Path) -> Section | None:
    """Learning curves of every stage."""
    return section("Learning curves", [learning_curves(report)])


def audit_section(report: Report, folder: Path) -> Section | None:
    """How good the pseudo-labels were against the hidden ground truth, where results hold the audit."""
    sheet = folder / WORST_SHEET
    caption = "Unlabelled images with most wrong or missing pseudo-labels, and their hidden ground truth"
    picture = Picture(caption, sheet) if sheet.is_file() else None
    grids = [
        _audit_grid(
            report, audit_table, "Pseudo-labels, percent; errors: duplicate / other class / poor mask / background"
        ),
        _audit_grid(
            report, precision_table, "Thresholds that hold a precision, percent; estimated on D_l, measured on D_u"
        ),
        _audit_grid(report, coverage_table, "What pseudo-labels cover, percent"),
    ]
    return section("Pseudo-labels", [audit_curves(report), *grids, picture])


def _audit_grid(
    report: Report, table_of: Callable[[Result], tuple[list[str], list[list[str]]]], caption: str
) -> Grid | None:
    """One of the audit's tables for the first seed of each row that has it, without lines by size and class."""
    firsts: dict[str, Result] = {}
    for result in report.results:
        if table_of(result)[1]:
            firsts.setdefault(result.row, result)
    if not firsts:
        return None
    head: list[str] = []
    lines: dict[tuple[str, ...], None] = {}
    for row, result in firsts.items():
        head, body = table_of(result)
        lines |= {(row, str(result.seed), *line): None for line in body if "group" not in head or line[1] == "all"}
    texts = ("labels of", "group", "classes")
    columns = (Column("row", False), Column("seed"), *(Column(name, name not in texts) for name in head))
    return Grid(caption, columns, tuple(lines), tuple(line[0] for line in lines))


def samples_section(report: Report, folder: Path) -> Section | None:
    """Worst and best images of each row, and the contact sheet of unlabelled images."""
    folders: dict[str, tuple[int, Path]] = {}
    for result in report.results:
        if result.is_done and result.folder is not None:
            folders.setdefault(result.row, (result.seed, result.folder))
    sheet = folder / CONTACT_SHEET
    caption = "Unlabelled images, their hidden ground truth, the teacher's pseudo-labels, the student"
    return section("Images", [read_samples(folders), Picture(caption, sheet) if sheet.is_file() else None])


def measures_section(report: Report, folder: Path) -> Section | None:
    """Metrics beyond AP: thresholds, sizes, classes, latency."""
    grids = [measures_grid(report, role) for role in ("teacher", "student", "refined")]
    return section("More measures", [*grids, classes_grid(report), other_grid(report)])


def compute_section(report: Report, folder: Path) -> Section | None:
    """What the table cost and what sharing stages saved."""
    steps = report.steps
    if not steps.scratch:
        return None
    words = [
        f"Each row alone from scratch: {steps.scratch:,.0f} training steps.",
        f"Each stage once: {steps.unique:,.0f} steps ({steps.saved_percent:.0f} % saved).",
    ]
    if steps.ran < steps.unique:
        words.append(f"Run here: {steps.ran:,.0f} steps; the other stages were in the store already.")
    words.append("Device-hours: time of a stage's work times its workers, without their start-up.")
    if len(report.device_hours) > 1:
        words.append("Hours of unlike devices are not added up.")
    if report.prices and (unpriced := [d for d in report.device_hours if report.prices.of(d) is None]):
        words.append(f"No price was named for {', '.join(unpriced)}: the cost leaves their hours out.")
    grids = [device_grid(report), compute_bars(report), stage_grid(report)]
    return section("Compute", [Words(tuple(words), "list"), *grids])


def provenance_section(report: Report, folder: Path) -> Section | None:
    """The exact command, recipe, code version, data and hardware of each number."""
    recipes = {(r.row, r.seed): _flat(r.recipe) for r in report.results}
    common = _common(list(recipes.values()))
    details: list[Details] = []
    if common and len(report.results) > 1:
        details.append(Details("", "Recipe: what all results have in common", tuple(_pairs(common))))
    for result in report.results[:MAX_DETAILS]:
        own = {k: v for k, v in recipes[result.row, result.seed].items() if k not in common or not details}
        details.append(Details(result.row, f"{result.row}, seed {result.seed}", tuple(_facts(result, own))))
    left = len(report.results) - MAX_DETAILS
    more = Words((f"{left} more results: their result.json files say the same of them.",)) if left > 0 else None
    return section("Provenance", [results_grid(report), *details, more])


SECTIONS: tuple[Callable[[Report, Path], Section | None], ...] = (
    results_section,
    comparison_section,
    axis_section,
    samples_section,
    audit_section,
    contrast_section,
    learning_section,
    measures_section,
    compute_section,
    provenance_section,
)


def sections_of(report: Report, folder: Path) -> list[Section]:
    """All sections that have something to say, in the order of the page; long tables are cut to what one reads."""
    made = [section for make in SECTIONS if (section := make(report, folder)) is not None]
    return [Section(s.title, tuple(b.first(MAX_LINES) if isinstance(b, Grid) else b for b in s.blocks)) for s in made]


def _facts(result: Result, recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("status", status_text(result) + ("" if result.is_done else f": {result.error}")),
        ("log", result.log),
        ("command", result.command),
        ("code", result.code_version),
        ("planned on", hardware_text(result.hardware) if result.hardware else None),
        ("data hash", result.dataset.content_hash if result.dataset else None),
        ("started", result.started),
        ("result", f"{result.folder.name}/{RESULT}" if result.folder else None),
    ]
    facts += [(f"{metric} measured on", node.text) for metric, node in result.measured_on.items()]
    for stage in result.stages:
        facts.append((f"stage {stage.name}", stage.artifact or stage.fingerprint))
        facts.append((f"stage {stage.name} computed on", nodes_text(stage.computed_on) or "unknown"))
    return [(name, str(value)) for name, value in facts if value] + _pairs(recipe)


def _pairs(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in recipe.items()]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _common(recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = recipes[0] if recipes else {}
    return {k: v for k, v in first.items() if all(k in r and r[k] == v for r in recipes)}
