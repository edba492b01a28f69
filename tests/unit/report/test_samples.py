"""Worst and best images: how they are scored, chosen, drawn from a store and fitted on a page."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from report_scenes import result
from rich.console import Console

from cast_ray.contracts.records import RECORD_SCHEMA, Category, encode_image_id
from cast_ray.contracts.row_result import DatasetFacts, Hardware, RowResult
from cast_ray.evaluation.coco_results import results_document
from cast_ray.plan.graph import RowPlan, Stage
from cast_ray.publish import samples
from cast_ray.publish import sweep as publish
from cast_ray.publish.samples import choose, image_quality, row_samples
from cast_ray.recipe import build_recipe
from cast_ray.report import samples as report_samples
from cast_ray.report.blocks import Sample
from cast_ray.report.samples import SAMPLES, read_samples
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep.row_results import SweepContext, read_result

SIZE = 32
CATEGORIES = (Category(3, "disc"), Category(7, "box"))


def box(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def rle(mask: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(mask))["counts"]


def instance(mask: np.ndarray, label: int = 0, score: float | None = None) -> dict[str, Any]:
    made = {"rle": rle(mask), "size": [SIZE, SIZE], "label": label}
    return made if score is None else made | {"score": score}


def test_a_perfect_answer_scores_100_and_none_0() -> None:
    truth = [instance(box(0, 0, 8, 8)), instance(box(16, 16, 8, 8), 1)]
    assert image_quality(truth, [i | {"score": 0.9} for i in truth]) == 100
    assert image_quality(truth, []) == 0
    assert image_quality([], [instance(box(0, 0, 4, 4), score=0.5)]) == 0
    assert image_quality([], []) is None


def test_quality_is_panoptic_quality() -> None:
    truth = [instance(box(0, 0, 8, 8)), instance(box(16, 16, 8, 8), 1)]
    found = [
        instance(box(0, 0, 8, 6), score=0.9),  # IoU .75
        instance(box(0, 0, 8, 8), score=0.5),  # the object is taken already: a false positive
        instance(box(16, 16, 8, 8), 0, score=0.8),  # of another class: a false positive, and the box is missed
    ]
    assert image_quality(truth, found) == pytest.approx(100 * 0.75 / (1 + 2 / 2 + 1 / 2))


def test_an_overlap_of_a_half_is_no_match() -> None:
    assert image_quality([instance(box(0, 0, 8, 8))], [instance(box(0, 0, 8, 4), score=0.9)]) == 0


def test_the_worst_and_best_are_chosen_once_each() -> None:
    qualities = {0: (50.0, 2), 1: (0.0, 1), 2: (0.0, 4), 3: (90.0, 1), 4: (70.0, 3)}
    assert choose(qualities, 2) == [("worst", 2), ("worst", 1), ("best", 3), ("best", 4)]
    assert choose({0: (1.0, 1)}, 2) == [("best", 0)]
    assert choose({}, 2) == []
    assert sorted(i for _, i in choose(qualities, 9)) == [0, 1, 2, 3, 4]


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[SweepContext, RowPlan]:
    """Five validation images with a box each; the student finds none of the first, all of the others."""
    store = ArtifactStore(str(tmp_path / "storage"))
    records, found = [], []
    for i in range(5):
        mask = box(4 + i, 4, 12, 12)
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((SIZE, SIZE, 3), 40 * i, np.uint8)).save(path)
        truth = {"category_id": 7, "rle": rle(mask), "score": 1.0, "is_crowd": False}
        records.append(
            {
                "image_id": encode_image_id(f"img{i}"),
                "uri": str(path),
                "height": SIZE,
                "width": SIZE,
                "instances": [truth],
            }
        )
        if i:
            segmentation = {"size": [SIZE, SIZE], "counts": rle(mask).decode()}
            found.append({"image_id": f"img{i}", "category_id": 7, "segmentation": segmentation, "score": 0.5 + i / 10})
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(records, schema=RECORD_SCHEMA), buffer)
    dataset = Stage("dataset", "dataset", {}, {}, "data")
    store.add(dataset, "val.parquet", buffer.getvalue())
    student, teacher = (Stage("evaluate", "evaluate", {}, {}, name) for name in ("student0", "teacher0"))
    for stage in (student, teacher):
        store.add(stage, "results.json", b"".join(results_document(json.dumps(each).encode() for each in found)))
        store.commit(stage, {"num_workers": 1})
    context = SweepContext(
        name="run",
        table="losses",
        command="",
        code_version="",
        hardware=Hardware(),
        store=store,
        dataset_key=dataset.key,
        dataset=DatasetFacts(),
        categories=CATEGORIES,
        runs_path="runs/run",
    )
    row = RowPlan("sup", 0, build_recipe("shapes"), (), {"teacher": teacher, "student": student})
    return context, row


def test_a_rows_images_are_drawn_from_the_store_once(
    sweep: tuple[SweepContext, RowPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, row = sweep
    content = row_samples(context, row)
    assert content is not None
    drawn = json.loads(content)
    assert [drawn["samples"][0][key] for key in ("kind", "image_id", "score")] == ["worst", "img0", 0]
    assert {s["score"] for s in drawn["samples"][1:]} == {100.0} and len(drawn["samples"]) == 5
    assert [name for name, _ in drawn["samples"][0]["panels"]] == ["image", "ground truth", "teacher", "student"]
    assert [name for name, _ in drawn["legend"]] == ["disc", "box"]
    pictures = {}
    for name, uri in drawn["samples"][0]["panels"]:
        assert uri.startswith("data:image/webp;base64,")
        pictures[name] = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), float)
    assert pictures["image"].shape == (3 * SIZE, 3 * SIZE, 3)
    assert np.abs(pictures["ground truth"] - pictures["image"]).max() > 60
    assert np.abs(pictures["student"] - pictures["image"]).max() < 20  # it found nothing here
    monkeypatch.setattr(samples, "_draw", lambda *_: pytest.fail("drawn again"))
    assert row_samples(context, row) == content


def test_a_row_whose_evaluation_is_gone_has_no_images(sweep: tuple[SweepContext, RowPlan]) -> None:
    context, row = sweep
    gone = Stage("evaluate", "evaluate", {}, {}, "gone")
    assert row_samples(context, RowPlan("sup", 0, row.recipe, (), {"student": gone})) is None
    without_teacher = row_samples(context, RowPlan("sup", 0, row.recipe, (), row.roles | {"teacher": gone}))
    assert without_teacher is not None
    assert [n for n, _ in json.loads(without_teacher)["samples"][0]["panels"]] == ["image", "ground truth", "student"]


def write_samples(folder: Path, num_bytes: int = 100) -> None:
    made = [
        {"kind": kind, "image_id": f"{kind}{i}", "score": 1.0, "panels": [["image", "x" * num_bytes]]}
        for kind in ("worst", "best")
        for i in range(3)
    ]
    folder.mkdir(parents=True)
    (folder / SAMPLES).write_text(json.dumps({"samples": made, "legend": [["disc", "#ff0000"]]}))


def names(shown: tuple[Sample, ...]) -> list[str]:
    return [f"{s.row} {s.image_id}" for s in shown]


def test_a_page_shows_all_images_that_fit(tmp_path: Path) -> None:
    folders = {row: (0, tmp_path / row) for row in ("a", "b", "none")}
    write_samples(tmp_path / "a")
    write_samples(tmp_path / "b")
    block = read_samples(folders)
    assert block is not None and len(block.samples) == 12 and "left out" not in block.caption
    assert names(block.samples)[:4] == ["a worst0", "a worst1", "a worst2", "a best0"]
    assert read_samples({"none": (0, tmp_path / "none")}) is None


def test_images_without_objects_or_detections_are_no_samples(sweep: tuple[SweepContext, RowPlan]) -> None:
    """Nothing to find and nothing found: no image has a quality, so there is nothing to show and nothing to take."""
    context, row = sweep
    store = context.store
    empty = pa.Table.from_pylist(
        [{"image_id": encode_image_id("a"), "uri": "gone.png", "height": SIZE, "width": SIZE, "instances": []}],
        schema=RECORD_SCHEMA,
    )
    buffer = io.BytesIO()
    pa.parquet.write_table(empty, buffer)
    dataset = Stage("dataset", "dataset", {}, {}, "empty")
    store.add(dataset, "val.parquet", buffer.getvalue())
    student = Stage("evaluate", "evaluate", {}, {}, "nothing")
    store.add(student, "results.json", b"".join(results_document([])))
    store.commit(student, {"num_workers": 1})
    context = replace(context, dataset_key=dataset.key)
    content = row_samples(context, RowPlan("sup", 0, row.recipe, (), {"student": student}))
    assert content is not None and json.loads(content)["samples"] == []


def test_a_row_whose_samples_are_cut_hides_no_other(tmp_path: Path) -> None:
    write_samples(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / SAMPLES).write_text('{"samples": [{"ki')
    block = read_samples({row: (0, tmp_path / row) for row in ("a", "b")})
    assert block is not None and len(block.samples) == 6
    assert block.caption.endswith("samples.json cannot be read of b")


def test_an_image_that_is_gone_costs_its_picture_alone(
    sweep: tuple[SweepContext, RowPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, row = sweep
    (tmp_path / "0.png").unlink()
    monkeypatch.setattr(publish, "read_result", lambda context, row: RowResult.of(result("sup"), "result.json"))
    output = io.StringIO()
    assert publish.publish_row(context, row, tmp_path / "out", Console(file=output, width=200))
    assert output.getvalue().startswith("sup: samples.json is left out: ") and "0.png" in output.getvalue()
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["result.json"]


def test_a_page_of_many_images_keeps_both_ends_of_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_samples, "MAX_PAGE_BYTES", 4500)
    for row in ("a", "b"):
        write_samples(tmp_path / row, 1000)
    block = read_samples({row: (0, tmp_path / row) for row in ("a", "b")})
    assert block is not None and names(block.samples) == ["a worst0", "a best0", "b worst0", "b best0"]
    assert "8 of 12 left out" in block.caption


def test_a_stored_result_that_is_cut_counts_as_none(sweep: tuple[SweepContext, RowPlan]) -> None:
    """The sweep then makes it again from the stages in the store, instead of ending in a traceback."""
    context, row = sweep
    context.store.write_json(context.result_path(row), result("sup"))
    assert read_result(context, row) is not None
    context.store.write_bytes(context.result_path(row), b'{"status": "do')
    assert read_result(context, row) is None
