"""Reports from hand-made result files: one seed, three seeds, a failed row, nothing learnt, a table of one's own."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_scenes import ROWS, failed, result, save, stage
from rich.console import Console

from cast_ray.plan.ablation import Table, load_table
from cast_ray.publish.sweep import announce
from cast_ray.recipe import build_recipe
from cast_ray.report.content import Report
from cast_ray.report.exports import latex_page
from cast_ray.report.overlays import CONTACT_SHEET
from cast_ray.report.results import summarise, summarise_run
from cast_ray.report.run_folder import read_plan, read_results, read_run, write_plan
from cast_ray.report.tables import comparison_grid, main_grid, print_report, results_grid, stage_grid, terminal_table
from cast_ray.report.write import write_report

ROOT = Path(__file__).parents[3]


def report_of(tmp_path: Path, results: list[dict[str, Any]]) -> Report:
    return summarise(read_results(save(tmp_path / "run", results)))


def terminal_text(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text()


def line_of(text: str, row: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"{row} "))


def widest(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


def test_one_seed_shows_values_paper_and_a_warning(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result(row) for row in ROWS])
    assert [row.name for row in report.rows] == list(ROWS)
    semi = report.rows[1]
    assert semi.cells["student/mask_ap"].mean == 15.8 and semi.cells["student/mask_ap"].sd is None
    assert semi.paper == {"teacher/mask_ap": 29.7, "student/mask_ap": 30.7}
    assert semi.seeds_text == "1 seed*" and semi.seconds == 110.0
    (note,) = [note for note in report.notes if note.startswith("* 1 seed per row: this table is no evidence")]
    assert "up to 2.4" in note and "--until decided" in note
    assert any("cityscapes 10%" in note for note in report.notes)
    assert any("zero-shot" in note and "AP 21.5, AP50 40.0" in note for note in report.notes)
    text = terminal_text(report)
    assert widest(text) <= 100
    for word in ("15.8", "30.7", "1 seed*", "16.3", "110", "+2.3"):
        assert word in line_of(text, "sup+semi")
    assert "interval" not in text


@pytest.mark.parametrize(
    ("preset", "measured", "published", "value"),
    [
        ("shapes", "coco", "Cityscapes AP", 32.2),
        ("cityscapes", "cityscapes", "Cityscapes AP", 32.2),
        ("ade20k", "coco", "COCO AP", 16.1),
    ],
)
def test_published_values_name_their_kind_of_ap(
    tmp_path: Path, preset: str, measured: str, published: str, value: float
) -> None:
    """Beside ADE20K's numbers stand those of ADE20K, and two kinds of AP in one row are told in words."""
    recipe = {"preset": preset, "scale": "full", "seed": 0, "evaluation": {"metric": measured}}
    results = [result("sup", recipe=recipe) | {"table": "main", "row": row} for row in ("supervised", "CAST")]
    report = report_of(tmp_path, results)
    assert {row.name: row.paper.get("student/mask_ap") for row in report.rows}["CAST"] == value
    headings = [column.name for column in main_grid(report).columns]
    assert headings[headings.index("student AP") + 1] == f"paper ({published})"
    compared = comparison_grid(report, "student/mask_ap")
    assert compared is not None and f"paper ({published})" in [column.name for column in compared.columns]
    assert "paper" not in {column.name for column in compared.columns}
    differ = [note for note in report.notes if "two different numbers" in note]
    assert bool(differ) == (preset == "shapes")
    if differ:
        assert "They are Cityscapes AP, the measured ones COCO AP" in differ[0]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("total", "rows without D_u take 8 labelled: all rows see as many images"),
        ("supervised", "rows without D_u take 4 labelled: all rows see as many labelled images"),
    ],
)
def test_the_report_says_which_images_of_a_step_stay_equal(tmp_path: Path, rule: str, words: str) -> None:
    stages = {"images_per_step": rule, "distill": {"batch_labelled": 4, "batch_unlabelled": 4}}
    recipe = {"preset": "cityscapes", "scale": "full", "seed": 0, "stages": stages}
    report = report_of(tmp_path, [result(row, recipe=recipe) for row in ROWS])
    assert report.context["images a step"] == f"4 labelled + 4 unlabelled, step 2b; {words}"


def test_three_seeds_show_spread_and_paired_differences(tmp_path: Path) -> None:
    results = [result(row, seed) for row in ROWS for seed in range(3)]
    results[3:6] = [result("sup+semi", seed, ap=14.0 + 0.3 * seed + 0.1 * seed) for seed in range(3)]
    report = report_of(tmp_path, results)
    sup = report.rows[0].cells["student/mask_ap"]
    assert sup.mean == pytest.approx(13.8) and sup.sd == pytest.approx(0.3) and sup.num_seeds == 3
    semi = report.differences_in("student/mask_ap")["sup+semi"]
    assert semi.against == "sup" and semi.mean == pytest.approx(0.6) and semi.num_seeds == 3
    assert semi.paper == pytest.approx(30.7 - 21.1)
    # the pairs differ by .5, .6, .7: half width t(.975, 2) * .1 / sqrt(3), whatever the spread over seeds
    assert semi.interval is not None and semi.interval.resampled == "seeds" and semi.is_clear
    assert semi.interval.low == pytest.approx(0.6 - 4.30265 * 0.1 / 3**0.5, abs=1e-4)
    text = terminal_text(report)
    assert "3 seeds" in text and "1 seed" not in text and widest(text) <= 100
    assert "14.4 ±0.4" in line_of(text, "sup+semi") and "+0.4 to +0.8" in line_of(text, "sup+semi")
    assert "Above sup in student AP: sup+semi (+0.6), " in text


def test_rows_are_compared_in_every_ap_and_with_each_other(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result(row, seed) for row in ROWS for seed in range(2)])
    assert {d.metric for d in report.differences} == {"teacher/mask_ap", "student/mask_ap", "refined/mask_ap"}
    assert {(d.row, d.against) for d in report.pairs} == {(a, b) for a in ROWS for b in ROWS if a != b}
    forth, back = (next(d for d in report.pairs if (d.row, d.against) == pair) for pair in (ROWS[:2], ROWS[1::-1]))
    assert forth.mean == pytest.approx(-back.mean) == pytest.approx(-2.3)


def test_a_difference_inside_its_interval_is_called_noise_and_one_below_is_called_below(tmp_path: Path) -> None:
    noisy = {0: 15.5, 1: 12.0, 2: 14.4}
    results = [result("sup", s) for s in noisy] + [result("sup+pxl", s, ap=ap) for s, ap in noisy.items()]
    results += [result("sup+semi", s, ap=10 + 0.3 * s + 0.01 * s) for s in noisy]
    report = report_of(tmp_path, results)
    assert "Not distinguishable from noise: sup+pxl (+0.2) against sup in student AP." in report.notes
    assert "Below sup in student AP: sup+semi (-3.5)." in report.notes
    grid = comparison_grid(report, "student/mask_ap")
    assert grid is not None and dict(zip(grid.rows, grid.marks)) == {
        "sup": "",
        "sup+semi": "worse",
        "sup+pxl": "noise",
        "sup+semi+pxl": "",
    }


def test_two_rows_of_one_model_do_not_differ(tmp_path: Path) -> None:
    shared = {"teacher": "same", "student": "a"}
    results = [result("sup", s, evaluations=shared) for s in range(2)]
    results += [result("sup+semi", s, evaluations=shared | {"student": "b"}) for s in range(2)]
    report = report_of(tmp_path, results)
    teacher = report.differences_in("teacher/mask_ap")["sup+semi"]
    assert teacher.same_artifact and teacher.mean == 0 and teacher.interval is None
    assert not report.differences_in("student/mask_ap")["sup+semi"].same_artifact
    grid = comparison_grid(report, "teacher/mask_ap")
    assert grid is not None and "same model" in grid.body[1]


def test_rows_that_use_no_unlabelled_images_are_named(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result(row) for row in ROWS])
    assert report.context["dataset"] == (
        "20 labelled, 480 unlabelled (unused by sup), 200 validation images, 4 classes"
    )
    assert report.context["data hash"] == "abc"
    fractions = [result(row) for row in ROWS[1:3]]
    fractions[1]["dataset"]["num_labelled"], fractions[1]["dataset"]["num_unlabelled"] = 40, 460
    text = report_of(tmp_path / "b", fractions).context["dataset"]
    assert text.startswith("20 to 40 labelled, 460 to 480 unlabelled, 200 validation images")


def test_fixed_parts_of_the_seed_are_said(tmp_path: Path) -> None:
    recipe = {"preset": "shapes", "scale": "demo", "order_seed": None, "init_seed": 0, "data": {"split_seed": 3}}
    report = report_of(tmp_path, [result("sup", recipe=recipe)])
    assert report.context["fixed seeds"] == "label split 3, initial weights 0"


def test_a_failed_row_keeps_its_place_with_reason_and_log(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result("sup"), result("sup+semi"), failed("sup+pxl")])
    text = terminal_text(report)
    assert "FAILED" in next(line for line in text.splitlines() if line.startswith("sup+pxl"))
    assert "ValueError: loss is NaN at step 17" in text and "log.txt" in text and "Traceback" not in text
    page = write_report(tmp_path / "run").files["markdown"].read_text()
    assert "| sup+pxl | FAILED, 1 seed |" in page
    assert "ValueError: loss is NaN at step 17 (log: runs/x/losses__sup+pxl__s0/log.txt)" in page
    assert "| sup+semi+pxl | not run |" in page


def test_a_row_with_one_failed_seed_shows_the_others(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result("sup", 0), result("sup", 1), failed("sup", 2)])
    assert report.rows[0].seeds_text == "2 of 3 seeds"
    assert report.rows[0].cells["student/mask_ap"].num_seeds == 2
    assert [f.seed for f in report.failures] == [2]


def test_ap_near_zero_is_said(tmp_path: Path) -> None:
    nothing = {"teacher/mask_ap": 0.02, "student/mask_ap": 0.0, "refined/mask_ap": 0.4}
    report = report_of(tmp_path, [result("sup", metrics=nothing)])
    assert report.notes[0] == (
        "AP near 0: 1,400 training steps are too few to learn; this run only proves that the path works."
    )
    assert not any("AP near 0" in note for note in report_of(tmp_path / "b", [result("sup")]).notes)


def test_shared_stages_count_once(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result(row) for row in ROWS])
    assert (report.steps.unique, report.steps.scratch, report.steps.ran) == (1000 + 4 * 400, 4 * 1400, 2600)
    (hours,) = report.device_hours.values()
    assert hours.scratch == pytest.approx(12 * 0.02) and hours.unique == pytest.approx(6 * 0.02)
    assert any("2,600 training steps in 6 unique stages; " in n and "5,600 (54 % saved)" in n for n in report.notes)
    pretrain = report.stages[0]
    assert pretrain.rows == ROWS and pretrain.seeds == (0,) and pretrain.seconds == 50.0 and not pretrain.was_stored


def test_stages_of_an_earlier_run_are_named_as_stored(tmp_path: Path) -> None:
    stored = result("sup", stages=[stage("pretrain", "p", 1000, reused=True), stage("distill", "d", 400)])
    report = report_of(tmp_path, [stored])
    assert [s.was_stored for s in report.stages] == [True, False]
    assert (report.steps.unique, report.steps.ran) == (1400, 400)
    assert any("(1 found in the store)" in note for note in report.notes)


def test_the_stage_table_joins_seeds(tmp_path: Path) -> None:
    grid = stage_grid(report_of(tmp_path, [result(row, seed) for row in ROWS for seed in range(3)]))
    assert grid is not None
    assert ("pretrain", "all", "3", "0", "3,000", "150", "0.06", "80") in grid.body
    assert ("distill", "sup+semi", "3", "0", "1,200", "150", "0.06", "80") in grid.body


def test_the_report_says_which_ap_it_is(tmp_path: Path) -> None:
    def recipe(metric: str) -> dict[str, Any]:
        return {"preset": "shapes", "scale": "demo", "evaluation": {"metric": metric}}

    rows = [result("sup", recipe=recipe("coco")), result("sup+semi", recipe=recipe("cityscapes"))]
    assert report_of(tmp_path / "one", rows[:1]).context["AP"] == "COCO mask AP"
    assert report_of(tmp_path / "other", rows[1:]).context["AP"].startswith("Cityscapes")
    both = report_of(tmp_path / "both", rows)
    assert "WARNING: results of 2 different kinds of AP are mixed in this table." in both.notes


def test_steps_that_overflowed_are_said(tmp_path: Path) -> None:
    results = [result("sup"), result("sup+semi")]
    assert not any("overflowed" in note for note in report_of(tmp_path, results).notes)
    results[1]["stages"][0] |= {"skipped_steps": 7, "steps": 1200}
    (note,) = [n for n in report_of(tmp_path, results).notes if "overflowed" in n]
    assert note.startswith(results[1]["stages"][0]["name"]) and "in 7 of 1,200 steps" in note


def test_skipped_images_and_missing_pseudo_labels_are_said(tmp_path: Path) -> None:
    results = [result("sup"), result("sup+semi")]
    results[1]["dataset"]["skipped"] = 3
    assert report_of(tmp_path, results).context["dataset"].endswith("4 classes; 3 unusable skipped")
    results[1]["dataset"]["skipped_statement"] = "3 images left out"
    results[1]["stages"][1]["num_pseudo_labels"] = 0
    report = report_of(tmp_path, results)
    assert report.context["dataset"].endswith("4 classes; 3 images left out")
    assert any("no pseudo-label at all from label" in note for note in report.notes)
    skipped = ["a.png: the file is empty", "b.png: cut off"]
    results[1]["stages"][1] |= {"num_images": 38, "num_skipped": 2, "skipped": skipped}
    (note,) = [n for n in report_of(tmp_path, results).notes if "left out" in n]
    assert "left out 2 of 40 unlabelled images that it could not read, first: a.png: the file is empty." in note


def test_the_report_says_how_labelled_images_were_chosen(tmp_path: Path) -> None:
    results = [result("sup"), result("sup+semi")]
    assert "label split" not in report_of(tmp_path / "old", results).context
    results[0]["dataset"]["split"] = {"family": "nested", "fraction": 0.05, "num_extra": 0}
    results[1]["dataset"]["split"] = {"family": "per-class", "fraction": 0.1, "num_extra": 6, "min_per_class": 2}
    assert report_of(tmp_path / "two", results).context["label split"] == (
        "nested 5 %, per-class 10 % with at least 2 images of each class; 6 unlabelled images of the extra pool"
    )
    results[0]["dataset"]["split"]["num_copies"] = 3
    results[0]["dataset"]["notes"] = ["12 of 15 images of the extra pool are known and are left out."]
    context = report_of(tmp_path / "copies", results).context
    assert context["label split"].endswith("pool; 3 copies of labelled or validation images left out")
    assert context["dataset"].endswith("; 12 of 15 images of the extra pool are known and are left out")
    listed = {"family": "list", "fraction": 0.25, "num_extra": 0, "label_list": "a.txt", "label_list_sha256": "0" * 64}
    results[0]["dataset"]["split"] = listed
    assert report_of(tmp_path / "list", results[:1]).context["label split"] == "list 25 % (a.txt, sha256 000000000000)"


def test_a_run_without_a_finished_row_still_reports(tmp_path: Path) -> None:
    report = report_of(tmp_path, [failed("sup")])
    assert report.metrics == ("teacher/mask_ap", "student/mask_ap") and report.differences == report.pairs == ()
    assert not any("compare order" in note or "seed" in note for note in report.notes)
    assert "FAILED, 1 seed" in terminal_text(report)


def test_mixed_results_are_flagged(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result("sup"), result("sup+semi", code_version="0.2.0")])
    assert "WARNING: results of 2 different code versions are mixed in this table." in report.notes


def test_write_report_leaves_files_that_agree(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result(row) for row in ROWS[:3]] + [failed("sup+semi+pxl")])
    Image.new("RGB", (4, 4)).save(run / CONTACT_SHEET)
    written = write_report(run)
    assert set(written.files) == {"html", "markdown", "csv", "latex", "json"} and written.has_failures
    (page,) = json.loads(written.files["json"].read_text())["tables"]
    assert page["rows"][1]["cells"]["student/mask_ap"]["mean"] == 15.8
    assert page["failures"][0]["log"].endswith("log.txt") and page["notes"]
    markdown = written.files["markdown"].read_text()
    for words in ("(margins.png)", "(curves.png)", f"({CONTACT_SHEET})", "`python sweeps/ablate.py", "Test CPU"):
        assert words in markdown
    lines = list(csv.DictReader(io.StringIO(written.files["csv"].read_text())))
    semi = next(x for x in lines if (x["row"], x["metric"]) == ("sup+semi", "student/mask_ap"))
    assert (float(semi["mean"]), float(semi["paper"]), semi["seeds_done"], semi["sd"]) == (15.8, 30.7, "1", "")
    assert float(semi["difference"]) == pytest.approx(2.3) and semi["resampled"] == ""
    assert write_report(run).files.keys() == written.files.keys()  # again, over the old files


def test_latex_survives_any_row_name(tmp_path: Path) -> None:
    names = {"sup": "5 %_a&b", "sup+semi": "$x^2$ #1", "sup+pxl": "\\{~}"}
    results = [result(row, s, table="mine") | {"row": name} for row, name in names.items() for s in range(2)]
    text = latex_page([report_of(tmp_path, results)])
    for name in (r"5 \%\_a\&b", r"\$x\textasciicircum{}2\$ \#1", r"\textbackslash{}\{\textasciitilde{}\}"):
        assert f"    {name} & 2 & " in text
    for command in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"$13.7 \pm 0.2$"):
        assert command in text
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 4 and len({line.replace(r"\&", "").count("&") for line in rows}) == 1


def test_the_last_known_diagnostics_count(tmp_path: Path) -> None:
    points = [{"step": 0, "margin": 0.1, "fnr": 0.3}, {"step": 20, "margin": 0.2, "fnr": float("nan")}]
    report = report_of(tmp_path, [result("sup", diagnostics={"distill": points})])
    assert report.rows[0].cells["distill/margin"].mean == 0.2
    assert report.rows[0].cells["distill/fnr"].mean == 0.3


def test_no_figure_without_points(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result("sup", diagnostics={}, curves={"distill": []})])
    write_report(run)
    assert {path.stem for path in run.glob("*.png")} == {"compute"}


def test_non_finite_metrics_are_left_out_and_the_json_stays_valid(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result("sup", metrics={"student/mask_ap": float("nan"), "student/ap50": 3.0})])
    text = write_report(run).files["json"].read_text()
    page = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert list(page["tables"][0]["rows"][0]["cells"]) == ["student/ap50", "distill/margin", "distill/fnr"]


def test_margins_table_takes_the_last_diagnostics(tmp_path: Path) -> None:
    table = load_table("margins")
    results = [result("sup", table="margins") | {"row": row} for row in table.rows]
    report = summarise(read_results(save(tmp_path / "run", results)))
    assert "distill/margin" in report.metrics
    assert report.rows[0].cells["distill/margin"].mean == pytest.approx(0.14)
    assert report.rows[0].paper == {"distill/margin": 0.55}
    assert "0.55" in terminal_text(report)


def test_a_table_of_ones_own_without_a_plan_takes_the_first_row_as_baseline(tmp_path: Path) -> None:
    mine = [result("sup", table="mine"), result("sup+semi", table="mine")]
    report = report_of(tmp_path, mine)
    assert (report.title, report.baseline, report.paper_dataset) == ("mine", "sup", "")
    table = Table(name="mine", title="My rows", metric="student/ap50", baseline="sup", rows={"sup": {}, "sup+semi": {}})
    titled = summarise(read_results(tmp_path / "run"), table)
    assert titled.title == "My rows" and titled.differences[0].mean == pytest.approx(4.6)


def test_a_table_of_ones_own_is_rebuilt_without_its_yaml(tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(
        "title: My rows\nmetric: student/ap50\nbaseline: loss.lambda_pxl 0\nseeds: [0]\n"
        "rows: {'loss.lambda_pxl 0': {loss.lambda_pxl: 0}, full: {}, more: {loss.lambda_pxl: 0.5}}\n"
    )
    table = load_table(yaml)
    run = save(tmp_path / "run", [result("sup", table="mine") | {"row": row} for row in ("full", "loss.lambda_pxl 0")])
    write_plan(run, [table], [("mine", row, seed) for row in table.rows for seed in (0, 1)], "/storage/runs/mine")
    yaml.unlink()
    (report,) = summarise_run(read_run(run))
    assert (report.title, report.baseline, report.metric) == ("My rows", "loss.lambda_pxl 0", "student/ap50")
    assert [row.seeds_text for row in report.rows] == ["1 of 2 seeds*", "1 of 2 seeds*", "pending"]
    assert "Not complete: 2 of 6 results are there; numbers will change." in report.notes


def test_several_tables_in_one_folder_have_a_report_each(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result("sup"), result("sup", table="margins") | {"row": "0.1"}])
    write_plan(run, [load_table("losses")], [("losses", "sup", 0)])
    write_plan(run, [load_table("margins")], [("margins", "0.1", 0), ("margins", "0.5", 0)])
    assert len(read_plan(run).expected) == 3
    written = write_report(run)
    assert [(r.table, r.num_pending) for r in written.reports] == [("losses", 0), ("margins", 1)]
    assert (run / "losses-curves.png").is_file() and (run / "margins-curves.png").is_file()
    assert written.files["markdown"].read_text().count("\n# ") == 1  # and one at the top


def test_a_repeated_command_asks_for_its_own_rows_only(tmp_path: Path) -> None:
    write_plan(tmp_path, [load_table("losses")], [("losses", row, 0) for row in ROWS])
    write_plan(tmp_path, [load_table("losses")], [("losses", "sup", 1)])
    assert read_plan(tmp_path).expected == (("losses", "sup", 1),)


def test_the_report_says_what_the_students_inherit(tmp_path: Path) -> None:
    given = {"data.root": "/nowhere", "teacher.kind": "mask2former"}
    rows: dict[str, dict[str, Any]] = {"sup": given | {"loss.lambda_semi": 0}, "sup+semi": dict(given)}
    recipes = {row: build_recipe("cityscapes", "full", fields).model_dump(mode="json") for row, fields in rows.items()}
    report = report_of(tmp_path / "two", [result(row, recipe=recipe) for row, recipe in recipes.items()])
    own = "encoder facebook/dinov2-small: Apache-2.0; data cityscapes: Cityscapes licence agreement"
    teacher = "teacher facebook/mask2former-swin-large-coco-instance: CC-BY-NC-4.0"
    assert report.context["licences"] == f"sup: {own}. sup+semi: {teacher}; {own}"
    said = [note for note in report.notes if " the terms of " in note]
    assert len(said) == 2
    assert said[0].startswith("WARNING: the student inherits the terms of data cityscapes: ")
    assert said[1].startswith(f"WARNING: the students of sup+semi inherit the terms of {teacher}, no commercial use (")
    without = report_of(tmp_path / "old", [result("sup")])  # its recipe says next to nothing
    assert "licences" not in without.context and not any("inherit" in note for note in without.notes)


def test_results_of_an_earlier_recipe_do_not_count_as_those_of_a_running_one(tmp_path: Path) -> None:
    table, console = load_table("losses"), Console(file=io.StringIO())
    before, now = (
        {(row, 0): table.row_recipe(row, "shapes", overrides={"stages.distill.steps": steps}) for row in ROWS[:2]}
        for steps in (10, 20)
    )
    run = save(tmp_path, [result(row, recipe=recipe.model_dump(mode="json")) for (row, _), recipe in before.items()])
    announce(run, table, before, {}, "", console)
    assert len(read_run(run).results) == 2 and read_run(run).pending() == []
    announce(run, table, now, {}, "", console)
    assert read_run(run).results == () and len(read_run(run).pending()) == 2
    save(run, [result("sup", recipe=now["sup", 0].model_dump(mode="json"))])
    assert [r.row for r in read_run(run).results] == ["sup"]
    write_plan(run, [table], [("losses", row, 0) for row in ROWS[:2]])  # as when the sweep is over
    assert len(read_run(run).results) == 2


def test_a_broken_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"expected": [["losses"]]}')
    with pytest.raises(ValueError, match=r"sweep\.json: not the plan of a sweep"):
        read_run(tmp_path)


def test_the_command_rebuilds_a_report_without_ray(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result(row) for row in ROWS])
    code = (
        "import sys; sys.modules['ray'] = None\nfrom cast_ray.cli import report; sys.exit(report.main([sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sup+semi+pxl" in done.stdout and "report.html" in done.stdout and (run / "report.html").is_file()
    missing = subprocess.run(
        [sys.executable, "sweeps/ablate.py", "report", str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True
    )
    assert missing.returncode == 2 and "none: no such folder" in missing.stderr


def test_every_result_names_what_it_was_made_from(tmp_path: Path) -> None:
    grid = results_grid(report_of(tmp_path, [result("sup"), failed("sup+pxl")]))
    assert grid is not None and grid.marks == ("", "failed")
    line = dict(zip([c.name for c in grid.columns], grid.body[0]))
    assert (line["code"], line["data hash"], line["labelled"], line["unlabelled"]) == ("0.1.0", "abc", "20", "0")


def test_a_table_of_thousands_of_rows_is_cut_on_the_terminal(tmp_path: Path) -> None:
    rows = {f"lr {i}": {} for i in range(300)}
    table = Table.model_construct(
        name="many", title="Many", metric="student/mask_ap", baseline="lr 0", rows=rows, paper="", paper_columns={}
    )
    results = [result("sup", ap=10 + i / 100, table="many") | {"row": row} for i, row in enumerate(rows)]
    report = summarise(read_results(save(tmp_path, results)), table)
    text = terminal_text(report)
    assert "240 more rows: see the report" in text and widest(text) <= 100
    assert "this table is no evidence" in " ".join(text.split())


def test_a_narrow_terminal_drops_columns_but_not_the_ranking_one(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result(row, seed) for row in ROWS for seed in range(2)])
    console = Console(width=72, record=True, file=io.StringIO())
    console.print(terminal_table(report, 72))
    text = console.export_text()
    assert "13.7 ±0.2" in text and "student" in text and "refined" not in text and widest(text) <= 72


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("length", [40, 110])
def test_long_row_names_fold_within_the_terminal(tmp_path: Path, num_seeds: int, length: int) -> None:
    names = {row: f"{row} " + "x" * length for row in ROWS}
    results = [
        result(row, seed, table="mine") | {"row": name} for row, name in names.items() for seed in range(num_seeds)
    ]
    text = terminal_text(report_of(tmp_path, results))
    assert widest(text) <= 100
    assert f"13.{5 if num_seeds == 1 else 8}" in text and "3 seeds" * (num_seeds == 3) in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "result.json: not a JSON file"),
        ("[]", "not a result: expected a mapping, got list"),
        ('{"table": "losses"}', "not a result: no row, seed"),
        (json.dumps(result("sup") | {"stages": "x"}), "not a result: stages is str, expected list"),
        (json.dumps(result("sup") | {"seed": "x"}), "not a result: seed is str, expected int"),
    ],
)
@pytest.mark.parametrize("is_planned", [True, False])
def test_a_result_that_cannot_be_read_hides_no_other(
    tmp_path: Path, content: str, message: str, is_planned: bool
) -> None:
    run = save(tmp_path / "run", [result("sup"), result("sup+semi"), result("sup+semi", 1)])
    (run / "losses__sup+semi__s1" / "result.json").write_text(content)
    (run / "losses__sup+pxl__s0").mkdir()
    (run / "losses__sup+pxl__s0" / "result.json").write_text(content)
    if is_planned:
        expected = [("losses", row, seed) for row in ROWS[:3] for seed in range(2)]
        write_plan(run, [load_table("losses")], [key for key in expected if key[2] == 0 or key[1] == "sup+semi"])
    written = write_report(run)
    (report,) = written.reports
    assert [(row.name, row.seeds_text) for row in report.rows] == [
        ("sup", "1 seed*"),
        ("sup+semi", "1 of 2 seeds*"),
        ("sup+pxl", "UNREADABLE, 1 seed"),
        ("sup+semi+pxl", "not run"),
    ]
    assert not written.is_complete and not written.has_failures and report.num_expected == 4
    text = terminal_text(report)
    assert "WARNING: sup+pxl, seed 0: its result cannot be read and is left out." in " ".join(text.split())
    assert "".join(message.split()) in "".join(text.split()) and "15.8" in line_of(text, "sup+semi")
    assert "| sup+pxl | UNREADABLE, 1 seed |" in written.files["markdown"].read_text()
    assert "UNREADABLE" in written.files["html"].read_text()


def test_a_folder_of_unreadable_results_alone_still_names_them(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "result.json").write_text("{")
    (report,) = write_report(tmp_path).reports
    assert [(row.name, row.seeds_text) for row in report.rows] == [("x", "UNREADABLE, 1 seed")]


def test_half_a_character_in_a_class_name_does_not_end_the_report(tmp_path: Path) -> None:
    written = write_report(save(tmp_path, [result("sup", per_class={"student": {"\ud800": 1.0}})]))
    assert "AP of each class" in written.files["html"].read_text()


def test_an_empty_folder_and_mixed_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="one table, got losses, other"):
        report_of(tmp_path, [result("sup"), result("sup", table="other")])


def test_the_report_says_what_computed_each_number(tmp_path: Path) -> None:
    a10g = {"node": "gpu_a10g", "gpu": "NVIDIA A10G", "gpu_driver": "550.54", "cpu": "AMD EPYC"}
    l4 = a10g | {"node": "gpu_l4", "gpu": "NVIDIA L4"}
    first = result("sup")
    first["stages"][0]["computed_on"] = [a10g, l4]
    first["stages"][2]["computed_on"] = [l4]
    first["metrics"]["student/latency_ms"], first["measured_on"] = 7.5, {"student/latency_ms": l4}
    report = report_of(tmp_path, [first, result("sup+semi")])
    words = "NVIDIA A10G (driver 550.54) on gpu_a10g; NVIDIA L4 (driver 550.54) on gpu_l4"
    assert report.context["computed on"] == words  # and not the machine that planned it
    page = (tmp_path / "run" / "report.html", write_report(tmp_path / "run"))[0].read_text()
    facts = [
        "stage pretrain computed on",
        words,
        "student/latency_ms measured on",
        "stage label computed on",
        "unknown",
    ]
    assert all(fact in page for fact in facts)


def seeds_of(gains: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Results of a baseline of 13.5 and of rows with these differences to it, seed by seed."""
    most = max(len(gain) for gain in gains.values())
    found = [result("sup", seed, ap=13.5 + 0.7 * seed) for seed in range(most)]
    for row, gain in gains.items():
        found += [result(row, seed, ap=13.5 + 0.7 * seed + value) for seed, value in enumerate(gain)]
    return found


def test_seeds_decide_rows(tmp_path: Path) -> None:
    gains = {
        "sup+semi": [6.0, 6.3, 5.9, 6.1],
        "sup+pxl": [0.1, -0.2, 0.15, 0.0, -0.1, 0.05],
        "sup+semi+pxl": [2.0, -1.0, 3.0, 1.5],
    }
    save(tmp_path, seeds_of(gains))
    written = write_report(tmp_path)
    (report,) = written.reports
    better, equal, undecided = report.decisions
    assert (better.row, better.answer, better.decided_at) == ("sup+semi", "better", 3)
    assert better.device_hours == pytest.approx(4 * 72 / 3600)  # of its own four stages, not of those it shares
    assert (equal.answer, equal.num_seeds) == ("equal", 6) and 3 <= (equal.decided_at or 0) <= 6
    assert undecided.is_open and undecided.decided_at is None and undecided.forecast is not None
    note = next(n for n in report.notes if n.startswith("Decisions against sup in student AP"))
    assert "better: sup+semi (3 seeds)" in note and "equal within 1.0: sup+pxl" in note
    assert "undecided: sup+semi+pxl (" in note and "more seeds)" in note
    page = written.files["markdown"].read_text()
    assert "| sup+semi | 4 | better | 3 |" in page and "seeds still needed" in page
    lines = list(csv.DictReader(io.StringIO(written.files["csv"].read_text())))
    (line,) = [line for line in lines if (line["row"], line["metric"]) == ("sup+semi", "student/mask_ap")]
    assert (line["decision"], line["decided_at_seed"]) == ("better", "3")
    assert json.loads(written.files["json"].read_text())["tables"][0]["decisions"][0]["answer"] == "better"


def test_the_smallest_effect_of_a_command_is_that_of_its_report(tmp_path: Path) -> None:
    save(tmp_path, seeds_of({"sup+semi": [0.1, -0.2, 0.15, 0.0]}))
    table = load_table("losses")
    (report,) = write_report(tmp_path).reports
    assert report.effect == 1.0 and report.decisions[0].answer == "equal"
    write_plan(tmp_path, [table], [], effects={"losses": 0.05})
    (report,) = write_report(tmp_path).reports
    assert report.effect == 0.05 and report.decisions[0].is_open
    write_plan(tmp_path, [table], [])  # a command that names none leaves it
    assert write_report(tmp_path).reports[0].effect == 0.05


def test_rows_of_one_model_and_of_other_images_decide_nothing(tmp_path: Path) -> None:
    found = seeds_of({"sup+semi": [6.0, 6.3, 5.9, 6.1], "sup+pxl": [0.0] * 4})
    for each in found:
        each["evaluations"] = {"student": f"{'sup' if each['row'] == 'sup+pxl' else each['row']}-{each['seed']}"}
        if each["row"] == "sup+semi":
            each["dataset"] = {**each["dataset"], "content_hash": "other"}
    (report,) = write_report(save(tmp_path, found)).reports
    apart, same = report.decisions[:2]
    assert (apart.row, apart.num_seeds, apart.answer) == ("sup+semi", 0, "undecided")
    assert (same.row, same.answer, same.decided_at) == ("sup+pxl", "same model", 4)


def test_where_less_is_better_the_answers_turn_round(tmp_path: Path) -> None:
    table = load_table("losses").model_copy(update={"metric": "distill/fnr"})
    found = seeds_of({"sup+semi": [0.0] * 4})
    for each in found:
        value = 0.2 + 0.001 * each["seed"] ** 2 - (0.1 + 0.002 * each["seed"] if each["row"] == "sup+semi" else 0)
        each["diagnostics"] = {"distill": [{"step": 0, "fnr": value}]}
    report = summarise(read_results(save(tmp_path, found)), table)
    assert report.effect is None and report.decisions[0].answer == "better"
    assert report.decisions[0].high is not None and report.decisions[0].high < 0


def test_a_page_that_shows_the_same_is_not_drawn_again(tmp_path: Path) -> None:
    """Drawing takes longer than all else that a command does whose results are in the store."""
    run = save(tmp_path, [result(row) for row in ROWS[:2]])
    write_report(run)
    figures = sorted(run.glob("*.png"))
    page = run / "report.html"
    before = {path: path.stat().st_mtime_ns for path in [page, *figures]}
    write_report(run)
    assert figures and {path: path.stat().st_mtime_ns for path in before} == before

    figures[0].unlink()
    write_report(run)
    assert figures[0].is_file()

    save(tmp_path, [result("sup+semi", metrics={"student/mask_ap": 33.3})])
    write_report(run)
    assert page.stat().st_mtime_ns > before[page] and "33.3" in page.read_text()
