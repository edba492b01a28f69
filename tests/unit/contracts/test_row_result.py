"""result.json, and with it all typed documents: round trip, files of earlier and newer builds, files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_scenes import result, save

from cast_ray.contracts.compute_node import UNKNOWN_DEVICE
from cast_ray.contracts.document import UNVERSIONED, NewerDocumentError, field_path
from cast_ray.contracts.row_result import RowResult, StageRecord
from cast_ray.report.content import Report, Result
from cast_ray.report.results import summarise
from cast_ray.report.run_folder import read_results
from cast_ray.report.write import write_report

OLD = Path(__file__).parents[2] / "data" / "old_store" / "runs" / "losses-shapes-smoke"
"""A run folder of the build before results had a schema version."""
OLD_RESULT = OLD / "losses__sup+semi__s0" / "result.json"


def report_of(folder: Path) -> Report:
    return summarise(read_results(folder))


def test_a_result_survives_a_round_trip() -> None:
    plain = json.loads(OLD_RESULT.read_text()) | {"schema_version": RowResult.VERSION}
    once = RowResult.of(plain, "result.json")
    assert json.loads(once.to_json()) == plain
    assert RowResult.read(once.to_json(), "result.json") == once


def test_a_result_without_a_version_is_of_an_earlier_build() -> None:
    old = RowResult.read(OLD_RESULT.read_bytes(), str(OLD_RESULT))
    assert old.schema_version == UNVERSIONED and old.key == ("losses", "sup+semi", 0) and old.is_done
    assert "schema_version" not in old.to_json()  # it is not passed off as one of this build
    assert old.setting("evaluation.metric") == "coco" and old.setting("evaluation.metric.name") is None
    assert old.dataset is not None and old.dataset.split is not None and old.dataset.split.num_labelled == 12
    distill, label = old.stage("distill"), old.stage("label-teacher")
    assert distill is not None and (distill.steps, distill.reused, distill.num_skipped) == (8, False, 0)
    assert label is not None and (label.num_images, label.num_pseudo_labels, label.skipped) == (36, 0, ())
    assert old.pseudo_labels["label-teacher"].num_images == 36 and old.stage("nothing") is None


def test_a_result_of_an_earlier_build_makes_the_same_cells() -> None:
    report = report_of(OLD)
    (row,) = [row for row in report.rows if row.seeds_done]
    plain = json.loads(OLD_RESULT.read_text())
    cells = {metric: cell.mean for metric, cell in row.cells.items()}
    assert {metric: cells[metric] for metric in plain["metrics"]} == plain["metrics"]
    assert cells["teacher/per_class/square"] == plain["per_class"]["teacher"]["square"]
    assert (row.name, row.seeds_text, row.seconds) == ("sup+semi", "1 seed*", plain["seconds"])
    assert row.device_hours == {UNKNOWN_DEVICE: plain["device_hours"]}
    assert {stage.fingerprint: stage.seconds for stage in report.stages} == {
        stage["fingerprint"]: stage["seconds"] for stage in plain["stages"]
    }
    assert report.steps.unique == 32 and report.context["label split"] == "nested 25 %"
    assert report.context["dataset"] == "12 labelled, 36 unlabelled, 16 validation images, 4 classes"
    assert report.context["planned on"] == "Test CPU, 2 CPUs, 24 GB memory"
    assert any("no pseudo-label at all from label-adapted, label-teacher" in note for note in report.notes)


def test_what_is_missing_or_null_is_unknown() -> None:
    needed = {"table": "losses", "row": "sup", "seed": 0, "status": "done"}
    unknown = {"stages": None, "metrics": None, "dataset": None, "error": None, "started": None, "hardware": None}
    for plain in (needed, needed | unknown):
        read = RowResult.of(plain, "result.json")
        assert (read.stages, read.metrics, read.dataset, read.error) == ((), {}, None, None)
    with_stage = needed | {"stages": [{"name": "a", "kind": "train", "fingerprint": "f", "steps": None}]}
    assert RowResult.of(with_stage, "result.json").stages[0].steps == 0


def test_unknown_fields_are_kept() -> None:
    stage = {"name": "a", "kind": "train", "fingerprint": "f", "energy_kwh": 2.5}
    plain = json.loads(json.dumps(result("sup", stages=[stage], reviewer="me")))
    read = RowResult.of(plain, "result.json")
    assert read.unknown_fields == {"reviewer": "me"} and read.stages[0].unknown_fields == {"energy_kwh": 2.5}
    assert json.loads(read.to_json()) == plain


def test_a_newer_result_is_refused_with_its_version() -> None:
    plain = result("sup") | {"schema_version": RowResult.VERSION + 1, "metrics": "in another form"}
    with pytest.raises(NewerDocumentError) as error:
        RowResult.of(plain, "runs/a/result.json")
    assert str(error.value) == (
        f"runs/a/result.json: schema_version is {RowResult.VERSION + 1}, expected at most {RowResult.VERSION}: a newer "
        "version of cast_ray wrote it"
    )


STAGE = {"name": "a", "kind": "train", "fingerprint": "f"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"table": None}, "no table"),
    ({"seed": "0"}, "seed is str, expected int"),
    ({"seed": True}, "seed is bool, expected int"),
    ({"schema_version": "1"}, "schema_version is str, expected int"),
    ({"status": "finished"}, "status is 'finished', expected 'done', 'failed', 'stopped' or 'unreadable'"),
    ({"recipe": []}, "recipe is list, expected dict"),
    ({"hardware": "a CPU"}, "hardware is str, expected dict"),
    ({"hardware": {"num_cpus": "2"}}, "hardware.num_cpus is str, expected int"),
    ({"dataset": {"split": {"fraction": "0.25"}}}, "dataset.split.fraction is str, expected number"),
    ({"dataset": {"classes": "disc"}}, "dataset.classes is str, expected list"),
    ({"stages": {}}, "stages is dict, expected list"),
    ({"stages": [STAGE, STAGE | {"steps": "8"}]}, "stages[1].steps is str, expected int"),
    ({"stages": [STAGE, {"name": "b"}]}, "no stages[1].kind, stages[1].fingerprint"),
    ({"stages": [STAGE | {"seconds": [1.0]}]}, "stages[0].seconds is list, expected number"),
    ({"metrics": {"student/mask_ap": "13.5"}}, "metrics.student/mask_ap is str, expected int or number"),
    ({"per_class": {"student": {"disc": "1"}}}, "per_class.student.disc is str, expected int or number"),
    ({"curves": {"distill": [{"loss": 1.0}]}}, "expected a mapping with a whole number `step`"),
    ({"diagnostics": {"distill": 3}}, "diagnostics.distill is int, expected list"),
    ({"pseudo_labels": {"label": {"num_labels": 1}}}, "no pseudo_labels.label.num_objects"),
    ({"evaluations": {"student": 7}}, "evaluations.student is int, expected str"),
    ({"given": [1]}, "given[0] is int, expected str"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_field_is_named_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        RowResult.of(result("sup") | change, "runs/a/result.json")
    text = str(error.value)
    assert text.startswith("runs/a/result.json: not a result: ") and message in text and "\n" not in text
    # Beside it, a report shows the other rows as if it were not there.
    run = save(tmp_path / "run", [result("sup"), result("sup+semi")])
    (run / "losses__sup__s0" / "result.json").write_text(json.dumps(result("sup") | change))
    written = write_report(run)
    rows = {row.name: row for row in written.reports[0].rows}
    assert rows["sup"].seeds_text == "UNREADABLE, 1 seed" and rows["sup+semi"].cells["student/mask_ap"].mean == 15.8
    assert any(message in note for note in written.reports[0].notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[]", "not a result: expected a mapping, got list"),
        (b"null", "not a result: expected a mapping, got NoneType"),
    ],
)
def test_what_is_no_mapping_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^a/result.json: {message}"):
        RowResult.read(content, "a/result.json")


def test_a_newer_result_hides_no_other_row(tmp_path: Path) -> None:
    run = save(tmp_path, [result("sup"), result("sup+semi", schema_version=RowResult.VERSION + 1)])
    report = report_of(run)
    assert [(row.name, row.seeds_text) for row in report.rows][:2] == [
        ("sup", "1 seed*"),
        ("sup+semi", "UNREADABLE, 1 seed"),
    ]
    assert any(f"schema_version is {RowResult.VERSION + 1}" in note for note in report.notes)


def test_last_diagnostics_and_classes_are_measures_of_a_report() -> None:
    points = [{"step": 0, "fnr": 0.5, "margin": 0.1}, {"step": 9, "fnr": float("nan"), "margin": 0.3}]
    changes = {"diagnostics": {"distill": points}, "per_class": {"student": {"disc": None, "cross": 4}}}
    read = Result.of(result("sup", **changes), "result.json")
    assert read.measured["distill/margin"] == 0.3 and read.measured["distill/fnr"] == 0.5
    assert read.measured["student/per_class/cross"] == 4 and read.measured["student/per_class/disc"] is None
    assert "distill/margin" not in read.metrics


def test_every_field_of_a_stage_is_documented() -> None:
    plain = {"name", "num_workers", "images_per_s"}  # names that say it all
    undocumented = {name for name, field in StageRecord.model_fields.items() if not field.description}
    assert undocumented <= plain | {"fingerprint", "kind"}


def test_paths_of_fields() -> None:
    assert field_path(("stages", 0, "steps")) == "stages[0].steps" and field_path(()) == ""
