"""Names that users choose, in every form of a report: whatever is in them, they are shown as they are."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from report_scenes import ROWS, result, save
from rich.console import Console

from cast_ray.plan.ablation import Table
from cast_ray.report.blocks import Figure, Panel, Series
from cast_ray.report.exports import latex_page
from cast_ray.report.markup import latex_text, markdown_code, markdown_text, one_line
from cast_ray.report.overlays import contact_sheet
from cast_ray.report.plots import draw_png, draw_svg, legend_of
from cast_ray.report.results import summarise
from cast_ray.report.run_folder import read_results, write_plan
from cast_ray.report.tables import print_report
from cast_ray.report.write import write_report

NAMES = (
    *("$x^2_$ and $", "a|b", "*bold* _it_ `code`", "[link](x)", "[red]no[-red]", "# 1", "1. one", "- minus", "+plus"),
    *("<b>&amp;", "5 % #1 ~tilde~ {x}", "back\\slash", "paper", "shared by rows", "_under__score_", "#fe00ff #fe0000"),
    *("quote\"'", "sup__s0", "line\nbreak\x07.", "x" * 100),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A table whose title, rows, classes and file name are hostile; row i has AP 10 + i."""
    rows: dict[str, dict[str, Any]] = {one_line(name): {} for name in NAMES}
    table = Table(name="my", title=" ".join(NAMES[:9]), metric="student/mask_ap", baseline="a|b", rows={"a|b": {}})
    table = table.model_copy(update={"name": "my *table* (1)", "rows": rows})
    results = []
    for i, row in enumerate(rows):
        per_class = {"student": {name: 20.0 + k for k, name in enumerate(NAMES)}}
        each = result("sup", ap=10 + i, table=table.name, per_class=per_class) | {"row": row, "command": "run `x` |y"}
        each["recipe"] = each["recipe"] | {"loss": {"lambda_pxl": float(10**i)}}
        results.append(each)
    for i, each in enumerate(results):
        (tmp_path / f"r{i}").mkdir()
        (tmp_path / f"r{i}" / "result.json").write_text(json.dumps(each))
    write_plan(tmp_path, [table], [(table.name, row, 0) for row in rows])
    return tmp_path


class Cells(HTMLParser):
    """Texts of the elements of one tag."""

    def __init__(self, text: str, tag: str):
        super().__init__()
        self.tag, self.found, self.inside = tag, list[str](), False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == self.tag:
            self.found.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != self.tag

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Cells of every table of a Markdown text, as a reader sees them."""
    tables: list[list[list[str]]] = []
    for token in MarkdownIt().enable(["table", "strikethrough"]).parse(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables and token.level >= 4:
            kinds = {child.type for child in token.children or []}
            assert kinds <= {"text", "text_special"}, token.content
            tables[-1][-1].append("".join(child.content for child in token.children or []))
    return tables


def test_every_form_shows_hostile_names_as_they_are(run: Path) -> None:
    files = write_report(run).files
    shown = [one_line(name) for name in NAMES]

    tables = markdown_tables(files["markdown"].read_text())
    assert [line[0] for line in tables[0][1:]] == shown and len({len(line) for line in tables[0]}) == 1
    classes = next(table for table in tables if "a|b" in table[0])
    assert [name.strip() for name in classes[0][2:]] == [name.strip() for name in shown]
    assert (run / "comparison.png").is_file() and "(comparison.png)" in files["markdown"].read_text()

    html = files["html"].read_text()
    heads = Cells(html, "th").found
    assert all(name in heads for name in shown)
    drawn = Cells(html, "text").found  # of the figures
    assert "$x^2_$ and $" in drawn and "#fe00ff #fe0000" in drawn and "<b>&amp;" in drawn

    lines = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert list(dict.fromkeys(line["row"] for line in lines)) == shown
    assert f"student/per_class/{NAMES[18]}" in {line["metric"] for line in lines}  # with its line break


def test_the_terminal_shows_hostile_names_as_they_are(run: Path) -> None:
    (report,) = write_report(run).reports
    console = Console(width=100, file=io.StringIO(), record=True)
    print_report(report, console)
    text = console.export_text()
    assert all(name in text for name in map(one_line, NAMES[:17]) if len(name) < 17)
    assert "[red]no[-red]" in text


def test_latex_takes_a_row_for_no_option_of_the_row_before(tmp_path: Path) -> None:
    rows = {"a": {}, "[5 %] of *": {}, "*": {}}
    table = Table(name="t", title="100 %\nof it", metric="student/mask_ap", baseline="a", rows=rows)
    results = [result("sup", table="t") | {"row": row} for row in rows]
    for i, each in enumerate(results):
        (tmp_path / f"r{i}").mkdir()
        (tmp_path / f"r{i}" / "result.json").write_text(json.dumps(each))
    text = latex_page([summarise(read_results(tmp_path), table)])
    assert r"    {}[5 \%] of * & 1 & " in text and "    {}* & 1 & " in text and r"100 \% of it" in text
    assert not re.search(r"(\\\\|\\midrule|\\toprule)\s*[\[*]", text)


@pytest.mark.parametrize("name", NAMES)
def test_markdown_gives_the_text_back(name: str) -> None:
    (paragraph,) = [t for t in MarkdownIt().enable("strikethrough").parse(markdown_text(name)) if t.type == "inline"]
    assert "".join(child.content for child in paragraph.children or []) == one_line(name)
    (code,) = MarkdownIt().parseInline(markdown_code(name))[0].children or []
    assert code.type == "code_inline" and code.content.strip() == one_line(name).strip()


def test_file_names_and_keys_stay_readable() -> None:
    assert markdown_text("runs/x/losses__sup+pxl__s0/error.log: pseudo.score_threshold") == (
        "runs/x/losses__sup+pxl__s0/error.log: pseudo.score_threshold"
    )
    assert latex_text("a|b") == r"a\textbar{}b"


def test_a_row_called_paper_is_no_published_value(tmp_path: Path) -> None:
    measured = Series("paper", (1.0, 2.0), (1.0, 2.0), has_markers=True)
    published = Series("paper", (1.0, 2.0), (2.0, 3.0), colour="paper", has_markers=True, is_published=True)
    figure = Figure("f", "f", (Panel("p", "x", (measured, published)),))
    assert legend_of(figure) == [measured, published]
    draw_png(figure, tmp_path / "f.png")


def test_a_logarithmic_axis_has_numbers_and_no_formulas() -> None:
    panel = Panel("p", "x", (Series("$a$", (0.01, 0.1, 1.0), (1.0, 2.0, 3.0)),), is_log=True)
    texts = Cells(draw_svg(panel), "text").found
    assert "0.1" in texts and not any("$" in text or "math" in text for text in texts)


def test_a_class_name_of_two_lines_is_drawn(tmp_path: Path) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    assert contact_sheet([image], [], ["two\nlines", "$"], tmp_path / "sheet.png").is_file()


def test_rows_of_a_table_with_spaces_are_linked(tmp_path: Path) -> None:
    save(tmp_path, [result(row, table="my table (1)") for row in ROWS])
    html = write_report(tmp_path).files["html"].read_text()
    assert '<a href="#my-table-1-results">' in html and 'id="my-table-1-results"' in html
