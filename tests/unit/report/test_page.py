"""The HTML page: self-contained, escaped, accessible; where Chromium is installed, looked at in it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_scenes import ROWS, empty_audit, failed, result, save

from cast_ray.plan.ablation import load_table
from cast_ray.report import sections
from cast_ray.report.content import Result
from cast_ray.report.overlays import CONTACT_SHEET
from cast_ray.report.run_folder import write_plan
from cast_ray.report.samples import SAMPLES
from cast_ray.report.write import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "input", "br", "path", "use", "rect"}


class Outline(HTMLParser):
    """Elements of a page in order, and that every one of them is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def samples_of(row: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(len(row)).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "WEBP")
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    panels = [[name, uri] for name in ("image", "ground truth", "teacher", "student")]
    made = [{"kind": k, "image_id": f"{k} <1>", "score": 50.0, "panels": panels} for k in ("worst", "best")]
    return json.dumps({"samples": made, "legend": [["disc", "#ff0000"]]})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three rows of three seeds, one of them failed, and a row to come, with pictures."""
    results = [result(row, seed) for row in ROWS[:3] for seed in range(3)]
    results[-1] = failed("sup+pxl", 2)
    folder = save(tmp_path / "run", results)
    write_plan(folder, [load_table("losses")], [("losses", row, seed) for row in ROWS for seed in range(3)])
    for row in ROWS[:3]:
        (folder / f"losses__{row}__s0" / SAMPLES).write_text(samples_of(row))
    Image.new("RGB", (400, 100), (90, 120, 200)).save(folder / CONTACT_SHEET)
    return folder


def page_of(run: Path, refresh_s: int | None = None) -> str:
    return write_report(run, refresh_s).files["html"].read_text()


def test_the_page_is_closed_and_reads_nothing_from_outside(run: Path) -> None:
    text = page_of(run)
    outline = Outline(text)
    for tag, attributes in outline.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    anchors = {a["href"] for a in outline.of("a")}
    assert anchors == {f"#{s['id']}" for s in outline.of("section")} and len(anchors) >= 7


def test_tables_and_figures_are_accessible(run: Path) -> None:
    outline = Outline(page_of(run))
    assert len(outline.of("caption")) == len(outline.of("table")) >= 6
    assert {a.get("scope") for a in outline.of("th")} == {"col", "row"}
    drawings = [a for a in outline.of("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) >= 7 and all(a.get("role") == "img" and a.get("aria-label") for a in drawings)
    assert all(a.get("alt") for a in outline.of("img")) and len(outline.of("img")) == 3 * 2 * 4 + 1
    ids = [a["id"] for _, a in outline.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    assert outline.elements[0] == ("html", {"lang": "en"})


def test_failed_and_missing_rows_are_said_plainly(run: Path) -> None:
    text = page_of(run)
    assert "Not complete: 9 of 12 results, 1 FAILED" in text
    assert "sup+pxl, seed 2: ValueError: loss is NaN at step 17 (log: runs/x/losses__sup+pxl__s0/log.txt)" in text
    assert 'http-equiv="refresh"' not in text
    assert '<meta http-equiv="refresh" content="5">' in page_of(run, refresh_s=5)
    save(run, [result("sup+semi+pxl", seed) for seed in range(3)])
    assert 'http-equiv="refresh"' not in page_of(run, refresh_s=5)  # complete: nothing more to wait for


def test_negative_numbers_have_a_minus_sign_and_sort_as_numbers(run: Path) -> None:
    text = page_of(run)
    assert 'data-value="-0.1">−0.1</td>' in text
    assert "2026-01-01 10:00:00" in text  # a date is no number


def test_hostile_names_are_text(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>"
    results = [result(row, table="mine", log=evil, command=evil) | {"row": f"{evil} {row}"} for row in ROWS]
    text = page_of(save(tmp_path, []) and save_as(tmp_path, results))
    assert "<script>alert" not in text and text.count("<script>") == 1
    Outline(text)


def save_as(run: Path, results: list[dict[str, Any]]) -> Path:
    """As `save`, for rows whose names no folder could have."""
    for i, each in enumerate(results):
        (run / f"r{i}").mkdir(parents=True)
        (run / f"r{i}" / "result.json").write_text(json.dumps(each))
    return run


def test_the_audit_of_pseudo_labels_has_its_tables(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def table(audited: Result) -> tuple[list[str], list[list[str]]]:
        lines = [["label", "all", "44.1"], ["label", "disc", "50.0"]]
        lines = lines if audited.row == "sup+semi" else lines[1:]
        return ["labels of", "group", "precision"], lines if audited.pseudo_labels else []

    def table_of_all(audited: Result) -> tuple[list[str], list[list[str]]]:
        return ["labels of", "of", "precision"], table(audited)[1]

    Image.new("RGB", (40, 40)).save(run / "worst.png")
    for name, value in (("audit_table", table), ("coverage_table", table_of_all), ("WORST_SHEET", "worst.png")):
        monkeypatch.setattr(sections, name, value)
    audit = empty_audit() | {"calibration": {"score": [0.5], "precision": [0.4], "ece": 0.1}}
    save(run, [result(row, seed, pseudo_labels={"label": audit}) for row in ROWS[1:3] for seed in range(2)])
    text = page_of(run)
    assert text.count("44.1") == 2 * 2 and text.count(">50.0<") == 2  # whole labels, and what they cover
    section = text[text.index('id="losses-pseudo-labels"') :]
    assert "reliability of pseudo-labels" in section and 'alt="Unlabelled images with most wrong' in section


def test_a_large_sweep_makes_a_page_of_some_megabytes(tmp_path: Path) -> None:
    results = [result("sup", ap=10 + i / 50, table="many") | {"row": f"lr {i}"} for i in range(600)]
    text = page_of(save_as(tmp_path, results))
    assert len(text) < 4_000_000
    outline = Outline(text)
    assert len(outline.of("details")) == 201 and "400 more results" in text
    assert "(the first 500 of 600 lines)" in text


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium, or None where there is none."""
    if CHROMIUM is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(run: Path, browser: Any, scheme: str, width: int) -> None:
    path = write_report(run).files["html"]
    Outline(path.read_text())
    if browser is None:  # no Chromium on this machine: the page was parsed
        return
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    assert said == [path.as_uri()]  # no error, no warning, no request but the page itself

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawings = page.locator("figure .panels > svg")
    assert drawings.count() >= 7
    assert all(drawings.nth(i).bounding_box()["width"] > 100 for i in range(drawings.count()))
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
    assert abs(brightness(ink) - brightness(paper)) > 150
    text = page.locator("svg text").first.evaluate("(e) => getComputedStyle(e).fill")
    assert (brightness(text) > 128) == (scheme == "dark")

    shown = page.locator("#losses-results tbody tr:visible")
    assert shown.count() == 4
    page.get_by_role("searchbox").fill("SEMI")
    assert shown.count() == 2 and page.locator("#shown").text_content() == "2 of 4 rows"
    assert {e.get_attribute("data-row") for e in page.locator(".sample:visible").all()} == {"sup+semi"}
    page.get_by_role("combobox").select_option("worst")
    assert page.locator(".sample:visible").count() == 1
    page.reload()  # as the page of a running sweep does by itself
    assert shown.count() == 2 and page.locator(".sample:visible").count() == 1
    page.get_by_role("searchbox").fill("")
    assert shown.count() == 4 and page.locator(".sample:visible").count() == 3

    head = page.locator("#losses-results thead th", has_text="student AP").first
    firsts = page.locator("#losses-results tbody th")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert firsts.all_text_contents() == ["sup+pxl", "sup", "sup+semi", "sup+semi+pxl"]
    head.get_by_role("button").click()
    assert firsts.nth(1).text_content() == "sup+semi"
    summary = page.locator("summary", has_text="sup+pxl, seed 2")
    summary.click()
    assert page.locator("details[open]").inner_text().count("loss is NaN at step 17") == 1
    assert said == [path.as_uri()] * 2
    context.close()


def test_the_page_without_scripts(run: Path, browser: Any) -> None:
    path = write_report(run).files["html"]
    Outline(path.read_text())
    if browser is None:
        return
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(path.as_uri())
    assert page.locator("form.filter").is_hidden()
    assert page.locator("#losses-results tbody tr:visible").count() == 4
    assert page.locator(".sample:visible").count() == 6


def brightness(colour: str) -> float:
    return float(np.mean([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]))
