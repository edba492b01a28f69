"""Reports from hand-made result files: one seed, three seeds, a failed row, nothing learnt, a table of one's own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console

from cast_ray.models.drawing import class_colours
from cast_ray.report.content import Report
from cast_ray.report.overlays import CONTACT_SHEET, contact_sheet
from cast_ray.report.plots import SHARED, _lines
from cast_ray.report.results import read_results, summarise
from cast_ray.report.tables import markdown_page, print_report, terminal_table, write_report
from cast_ray.stages.table import Table, load_table

ROWS = ("sup", "sup+semi", "sup+pxl", "sup+semi+pxl")
STUDENT = {"sup": 13.5, "sup+semi": 15.8, "sup+pxl": 13.4, "sup+semi+pxl": 15.9}


def result(row: str, seed: int = 0, ap: float | None = None, **changes: Any) -> dict[str, Any]:
    student = STUDENT[row] + 0.3 * seed if ap is None else ap
    metrics = {"zero_shot/mask_ap": 21.5, "zero_shot/ap50": 40.0, "teacher/mask_ap": 23.3, "teacher/ap50": 42.0}
    metrics |= {"student/mask_ap": student, "student/ap50": 2 * student}
    metrics |= {"refined/mask_ap": student + 0.5, "refined/ap50": 2 * student + 0.5}
    full = {
        "table": "losses",
        "row": row,
        "seed": seed,
        "status": "done",
        "error": None,
        "log": None,
        "recipe": {"preset": "shapes", "scale": "demo", "seed": seed},
        "command": "python sweeps/ablate.py losses --preset shapes",
        "code_version": "0.1.0",
        "started": f"2026-01-0{seed + 1}T10:0{ROWS.index(row)}:00",
        "seconds": 100.0 + 10 * ROWS.index(row),
        "device_hours": 0.1,
        "hardware": {"cpu": "Test CPU", "num_cpus": 2, "gpu": None, "memory_gb": 24.0},
        "dataset": {
            "content_hash": "abc",
            "num_labelled": 20,
            "num_unlabelled": 480,
            "num_val": 200,
            "classes": ["disc", "triangle", "square", "cross"],
            "skipped": 0,
        },
        "stages": [
            stage("pretrain", f"shared-{seed}", 1000, reused=row != "sup"),
            stage("label", f"label-{seed}", 0, kind="label", reused=row != "sup"),
            stage("distill", f"{row}-{seed}", 400),
        ],
        "metrics": metrics,
        "diagnostics": {"distill": [{"step": s, "margin": 0.1 + s / 1000, "fnr": 0.2} for s in (0, 20, 40)]},
        "curves": {"distill": [{"step": s, "loss": 3.0 - s / 40} for s in (0, 20, 40)]},
    }
    return full | changes


def stage(name: str, fingerprint: str, steps: int, kind: str = "train", reused: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "fingerprint": fingerprint,
        "artifact": f"file:///storage/{fingerprint}",
        "reused": reused,
        "seconds": 1.0 if reused else 50.0,
        "steps": steps,
        "images_per_s": 80.0,
    }


def failed(row: str, seed: int = 0) -> dict[str, Any]:
    error = "Traceback (most recent call last):\n  File x\nValueError: loss is NaN at step 17\n"
    return result(
        row, seed, status="failed", error=error, log="runs/x/losses__sup+pxl__s0/log.txt", metrics={}, stages=[]
    )


def save(run_dir: Path, results: list[dict[str, Any]]) -> Path:
    for r in results:
        folder = run_dir / f"{r['table']}__{r['row']}__s{r['seed']}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(r))
    return run_dir


def report_of(tmp_path: Path, results: list[dict[str, Any]]) -> Report:
    return summarise(read_results(save(tmp_path / "run", results)))


def terminal_text(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text()


def test_one_seed_shows_values_paper_and_a_warning(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result(row) for row in ROWS])
    assert [row.name for row in report.rows] == list(ROWS)
    semi = report.rows[1]
    assert semi.cells["student/mask_ap"].mean == 15.8 and semi.cells["student/mask_ap"].sd is None
    assert semi.paper == {"teacher/mask_ap": 29.7, "student/mask_ap": 30.7}
    assert semi.seeds_text == "1 seed" and semi.seconds == 110.0
    assert any("differences below are single runs and may be seed noise" in note for note in report.notes)
    assert any("cityscapes 10%" in note for note in report.notes)
    assert any("zero-shot" in note and "AP 21.5, AP50 40.0" in note for note in report.notes)
    text = terminal_text(report)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    for word in ("15.8", "30.7", "1 seed", "16.3", "110", "sup+semi against sup: +2.3 student AP (1 seed)"):
        assert word in text


def test_three_seeds_show_spread_and_paired_differences(tmp_path: Path) -> None:
    results = [result(row, seed) for row in ROWS for seed in range(3)]
    results[3:6] = [result("sup+semi", seed, ap=14.0 + 0.3 * seed + 0.1 * seed) for seed in range(3)]
    report = report_of(tmp_path, results)
    sup = report.rows[0].cells["student/mask_ap"]
    assert sup.mean == pytest.approx(13.8) and sup.sd == pytest.approx(0.3) and sup.num_seeds == 3
    semi = report.differences[0]
    assert semi.row == "sup+semi" and semi.mean == pytest.approx(0.6) and semi.num_seeds == 3
    # the pairs differ by .5, .6, .7: half width t(.975, 2) * .1 / sqrt(3), whatever the spread over seeds
    assert semi.low == pytest.approx(0.6 - 4.30265 * 0.1 / 3**0.5, abs=1e-4)
    text = terminal_text(report)
    assert "13.8 ±0.3" in text and "3 seeds" in text and "single runs and" not in text
    assert "sup+semi against sup: +0.6 student AP, 95 % interval +0.4 to +0.8 (3 seeds)\n" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100


def test_a_difference_inside_its_interval_is_called_noise(tmp_path: Path) -> None:
    noisy = {0: 15.5, 1: 12.0, 2: 14.4}
    results = [result("sup", s) for s in noisy] + [result("sup+pxl", s, ap=ap) for s, ap in noisy.items()]
    text = terminal_text(report_of(tmp_path, results))
    assert "sup+pxl against sup:" in text and "not distinguishable from seed noise" in " ".join(text.split())


def test_a_failed_row_keeps_its_place_with_reason_and_log(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result("sup"), result("sup+semi"), failed("sup+pxl")])
    text = terminal_text(report)
    assert "FAILED" in next(line for line in text.splitlines() if line.startswith("sup+pxl"))
    assert "ValueError: loss is NaN at step 17" in text and "log.txt" in text and "Traceback" not in text
    page = markdown_page(report)
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
    assert (report.steps_unique, report.steps_from_scratch) == (1000 + 4 * 400, 4 * 1400)
    assert any("2,600 training steps in 6 unique stages; " in n and "5,600 (54 % saved)" in n for n in report.notes)
    pretrain = report.stages[0]
    assert pretrain.rows == ROWS and pretrain.seeds == (0,) and pretrain.seconds == 50.0 and not pretrain.was_stored


def test_stages_of_an_earlier_run_are_named_as_stored(tmp_path: Path) -> None:
    stored = result("sup", stages=[stage("pretrain", "p", 1000, reused=True), stage("distill", "d", 400)])
    report = report_of(tmp_path, [stored])
    assert [s.was_stored for s in report.stages] == [True, False]
    assert any("(1 found in the store)" in note for note in report.notes)


def test_the_stage_table_joins_seeds(tmp_path: Path) -> None:
    page = markdown_page(report_of(tmp_path, [result(row, seed) for row in ROWS for seed in range(3)]))
    assert "| pretrain | all | 3 | 0 | 3,000 | 150 | 80 |" in page
    assert "| distill | sup+semi | 3 | 0 | 1,200 | 150 | 80 |" in page


def test_a_run_without_a_finished_row_still_reports(tmp_path: Path) -> None:
    report = report_of(tmp_path, [failed("sup")])
    assert report.metrics == ("teacher/mask_ap", "student/mask_ap") and report.differences == ()
    assert not any("compare order" in note or "seed" in note for note in report.notes)
    assert "FAILED, 1 seed" in terminal_text(report)


def test_mixed_results_are_flagged(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result("sup"), result("sup+semi", code_version="0.2.0")])
    assert "WARNING: results of 2 different code versions are mixed in this table." in report.notes


def test_the_report_says_which_ap_it_is(tmp_path: Path) -> None:
    def recipe(metric: str) -> dict[str, Any]:
        return {"preset": "shapes", "scale": "demo", "evaluation": {"metric": metric}}

    rows = [result("sup", recipe=recipe("coco")), result("sup+semi", recipe=recipe("cityscapes"))]
    assert report_of(tmp_path / "one", rows[:1]).context["AP"] == "COCO mask AP"
    assert report_of(tmp_path / "other", rows[1:]).context["AP"].startswith("Cityscapes")
    both = report_of(tmp_path / "both", rows)
    assert "WARNING: results of 2 different kinds of AP are mixed in this table." in both.notes


def test_write_report_leaves_files_that_agree(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result(row) for row in ROWS[:3]] + [failed("sup+semi+pxl")])
    Image.new("RGB", (4, 4)).save(run / CONTACT_SHEET)
    written = write_report(run)
    assert set(written) == {"markdown", "json", "margins", "curves"}
    page = json.loads(written["json"].read_text())
    assert page["rows"][1]["cells"]["student/mask_ap"]["mean"] == 15.8
    assert page["failures"][0]["log"].endswith("log.txt") and page["notes"]
    markdown = written["markdown"].read_text()
    for words in ("(margins.png)", "(curves.png)", f"({CONTACT_SHEET})", "`python sweeps/ablate.py", "Test CPU"):
        assert words in markdown
    for figure in ("margins", "curves"):
        image = Image.open(written[figure])
        assert image.width > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20
    assert write_report(run).keys() == written.keys()  # again, over the old files


def test_a_shared_stage_is_drawn_once() -> None:
    curve = {"pretrain": [{"step": 1, "loss": 2.0}], "distill": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}
    results = [result(row, curves=curve) for row in ROWS]
    results[1]["stages"][2]["fingerprint"] = results[0]["stages"][2]["fingerprint"]
    shared = list(_lines(results, "curves", "pretrain", "loss"))
    assert shared == [(SHARED, [1], [2.0])]
    assert [name for name, _, _ in _lines(results, "curves", "distill", "loss")] == [
        "sup & sup+semi",
        "sup+pxl",
        "sup+semi+pxl",
    ]


def test_the_last_known_diagnostics_count(tmp_path: Path) -> None:
    points = [{"step": 0, "margin": 0.1, "fnr": 0.3}, {"step": 20, "margin": 0.2, "fnr": float("nan")}]
    report = report_of(tmp_path, [result("sup", diagnostics={"distill": points})])
    assert report.rows[0].cells["distill/margin"].mean == 0.2
    assert report.rows[0].cells["distill/fnr"].mean == 0.3


def test_no_figure_without_points(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result("sup", diagnostics={}, curves={"distill": []})])
    assert set(write_report(run)) == {"markdown", "json"}


def test_non_finite_metrics_are_left_out_and_the_json_stays_valid(tmp_path: Path) -> None:
    run = save(tmp_path / "run", [result("sup", metrics={"student/mask_ap": float("nan"), "student/ap50": 3.0})])
    page = json.loads(write_report(run)["json"].read_text(), parse_constant=lambda name: pytest.fail(name))
    assert list(page["rows"][0]["cells"]) == ["student/ap50", "distill/margin", "distill/fnr"]


def test_margins_table_takes_the_last_diagnostics(tmp_path: Path) -> None:
    table = load_table("margins")
    results = [result("sup", table="margins") | {"row": row} for row in table.rows]
    report = summarise(read_results(save(tmp_path / "run", results)))
    assert "distill/margin" in report.metrics
    assert report.rows[0].cells["distill/margin"].mean == pytest.approx(0.14)
    assert report.rows[0].paper == {"distill/margin": 0.55}
    assert "0.55" in terminal_text(report)


def test_a_table_of_ones_own_needs_no_yaml_later(tmp_path: Path) -> None:
    mine = [result("sup", table="mine"), result("sup+semi", table="mine")]
    report = report_of(tmp_path, mine)
    assert (report.title, report.baseline, report.paper_dataset) == ("mine", "sup", "")
    table = Table(name="mine", title="My rows", metric="student/ap50", baseline="sup", rows={"sup": {}, "sup+semi": {}})
    titled = summarise(read_results(tmp_path / "run"), table)
    assert titled.title == "My rows" and titled.differences[0].mean == pytest.approx(4.6)


def test_a_narrow_terminal_drops_columns_but_not_the_ranking_one(tmp_path: Path) -> None:
    report = report_of(tmp_path, [result(row, seed) for row in ROWS for seed in range(2)])
    console = Console(width=72, record=True, file=io.StringIO())
    console.print(terminal_table(report, 72))
    text = console.export_text()
    assert "13.7 ±0.2" in text and "student" in text and "refined" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "result.json: not a JSON file"), ('{"table": "losses"}', "not a result: no row, seed")],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "losses__sup__s0").mkdir()
    (tmp_path / "losses__sup__s0" / "result.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path)


def test_an_empty_folder_and_mixed_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="one table, got losses, other"):
        report_of(tmp_path, [result("sup"), result("sup", table="other")])


def rle_of(mask: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def disc(size: int, y: int, x: int, radius: int) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def test_contact_sheet_draws_each_class_in_its_colour(tmp_path: Path) -> None:
    image = np.full((64, 64, 3), 128, np.uint8)
    truth = [{"rle": rle_of(disc(64, 20, 20, 12)), "label": 0}, {"rle": rle_of(disc(64, 45, 45, 12)), "label": 1}]
    guess = [{"rle": {"size": [64, 64], "counts": rle_of(disc(64, 20, 20, 12)).decode()}, "label": 1, "score": 0.87}]
    path = contact_sheet(
        [image, image],
        [("ground truth", [truth, truth]), ("student", [guess, []])],
        ["disc", "cross"],
        tmp_path / "s.png",
    )
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 3 * 256 + 4 * 6
    first, second = class_colours(2)

    def holds(panel: int, colour: tuple[int, int, int], row: int = 0) -> bool:
        area = sheet[26 + row * 262 : 26 + row * 262 + 256, 6 + panel * 262 : 6 + panel * 262 + 256]
        return bool((area == colour).all(-1).any())

    assert not holds(0, first) and not holds(0, second)
    assert holds(1, first) and holds(1, second)
    assert not holds(2, first) and holds(2, second)
    assert not holds(2, second, row=1)


def test_contact_sheet_shrinks_photographs(tmp_path: Path) -> None:
    photo = np.zeros((480, 640, 3), np.uint8)
    mask = np.zeros((480, 640), bool)
    mask[100:200, 100:300] = True
    path = contact_sheet(
        [photo],
        [("truth", [[{"rle": rle_of(mask), "label": 70, "score": 1.0}]])],
        [f"c{i}" for i in range(80)],
        tmp_path / "s.png",
    )
    assert Image.open(path).width == 2 * 420 + 3 * 6


def test_colours_of_many_classes_differ() -> None:
    assert len(set(class_colours(80))) == 80


def test_contact_sheet_refuses_what_does_not_fit(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    mask = rle_of(np.ones((8, 8)))
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], [], ["a"], tmp_path / "s.png")
    with pytest.raises(ValueError, match="'truth' has 2 entries for 1 images"):
        contact_sheet([image], [("truth", [[], []])], ["a"], tmp_path / "s.png")
    with pytest.raises(ValueError, match="label 3 outside the 1 classes"):
        contact_sheet([image], [("truth", [[{"rle": mask, "label": 3}]])], ["a"], tmp_path / "s.png")
    with pytest.raises(ValueError, match="RLE of 9x8 on an image of 8x8"):
        bad = {"rle": {"size": [9, 8], "counts": mask}, "label": 0}
        contact_sheet([image], [("truth", [[bad]])], ["a"], tmp_path / "s.png")
