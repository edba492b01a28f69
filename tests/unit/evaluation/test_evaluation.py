"""Evaluating batch by batch: what is held, what is written, and validation points in a curve."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from evaluation_scenes import CATEGORIES, coco_document, random_scenes, referee, referee_numbers

from cast_ray.contracts.records import encode_image_id
from cast_ray.evaluation.coco_results import coco_results, results_document, results_lines
from cast_ray.evaluation.measures import metrics_of
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import EncoderConfig, EvaluationConfig, ModelConfig, RuntimeConfig, build_recipe
from cast_ray.runtime.data.pictures import Pictures
from cast_ray.runtime.sweep.slots import stage_slots
from cast_ray.runtime.worker import measuring
from cast_ray.runtime.worker.measuring import ValidationSet, measure, predict
from cast_ray.runtime.worker.validation import validation_bundles, with_points
from cast_ray.teachers.expert import ExpertTeacher

SIZE = 32
CPU = torch.device("cpu")
MODEL = ModelConfig(
    encoder=EncoderConfig(name="conv", widths=(8, 8, 8, 8), stem_stride=2), hidden_dim=16, num_queries=8, num_layers=1
)


@pytest.fixture
def teacher() -> ExpertTeacher:
    return ExpertTeacher(build_segmenter(MODEL, len(CATEGORIES), seed=0), CATEGORIES, (SIZE, SIZE))


def record(number: int) -> dict[str, Any]:
    return {"image_id": encode_image_id(number), "height": SIZE, "width": SIZE, "instances": []}


def validation_set(monkeypatch: pytest.MonkeyPatch, num_images: int, drop: int = 0, **settings: Any) -> ValidationSet:
    """A set whose images are drawn when they are asked for, in blocks of 16 as Ray Data delivers them."""

    def blocks(records: Any, rows: np.ndarray, *_: Any) -> Iterator[Pictures]:
        for start in range(0, len(rows) - drop, 16):
            positions = list(range(start, min(start + 16, len(rows) - drop)))
            pixels = np.stack(
                [np.random.default_rng(int(rows[p])).integers(0, 256, (3, SIZE, SIZE)) for p in positions]
            )
            sizes = [(SIZE, SIZE)] * len(positions)
            yield Pictures(positions, list(pixels.astype(np.uint8)), sizes, sizes)

    monkeypatch.setattr(measuring, "read_pictures", blocks)
    monkeypatch.setattr(measuring, "record_at", lambda records, row: record(int(row)))
    return ValidationSet(None, num_images, (SIZE, SIZE), CATEGORIES, EvaluationConfig(**settings), RuntimeConfig())  # type: ignore[arg-type]


def peak_bytes(teacher: ExpertTeacher, images: ValidationSet) -> int:
    tracemalloc.start()
    seen = 0

    def count(done: int, results: Iterator[dict[str, Any]]) -> None:
        nonlocal seen
        seen += len(results_lines(results))

    matches = measure(teacher, images, np.arange(images.num_images), CPU, count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert matches.num_images == images.num_images and seen > 100 * len(matches.image) > 0
    return peak


def test_memory_is_that_of_a_batch(teacher: ExpertTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(teacher, validation_set(monkeypatch, 16), np.arange(16), CPU)  # what is allocated once
    few, many = (peak_bytes(teacher, validation_set(monkeypatch, n)) for n in (64, 640))
    per_image = (many - few) / (640 - 64)
    # Up to 24 detections of 30 bytes, twice while they are joined; results alone would be some 5,000.
    assert per_image < 24 * 30 * 3


def test_lost_images_are_an_error(teacher: ExpertTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="20 images went in, 19 came out"):
        measure(teacher, validation_set(monkeypatch, 20, drop=1), np.arange(20), CPU)


@pytest.mark.parametrize("metric", ["coco", "cityscapes"])
def test_more_workers_than_images_is_no_error(
    teacher: ExpertTeacher, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    matches = measure(teacher, validation_set(monkeypatch, 4, metric=metric), np.arange(4)[4::5], CPU)
    assert matches.num_images == 0
    assert metrics_of(matches, CATEGORIES)["metric"] == metric


def test_the_batch_changes_nothing_but_memory(teacher: ExpertTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, one = (
        measure(teacher, validation_set(monkeypatch, 20, batch=batch), np.arange(20), CPU) for batch in (16, 1)
    )
    np.testing.assert_array_equal(whole.image, one.image)
    np.testing.assert_allclose(whole.score, one.score, rtol=1e-4)


def test_scores_are_single_precision_wherever_they_go(teacher: ExpertTeacher) -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE), dtype=np.uint8))
    sizes = [(SIZE, SIZE)] * 2
    found = predict(teacher, images, sizes, sizes, 10, batch=2)
    (line, *_) = results_lines(coco_results(["3", '"b"'], found, CATEGORIES)).splitlines()
    score = json.loads(line)["score"]
    assert score == found[0][0]["score"] == float(np.float32(score))


def test_the_results_document_is_one_list_whatever_its_parts() -> None:
    table, results = random_scenes(0, (4, 2, 9))
    cuts = [results[:7], [], results[7:30], results[30:]]
    lines = [line for cut in cuts for line in results_lines(cut).splitlines(keepends=True)]
    document = b"".join(results_document(lines))
    assert json.loads(document) == results
    assert json.loads(b"".join(results_document([]))) == []
    assert referee_numbers(referee(coco_document(table), json.loads(document)))["mask_ap"] > 0


def test_points_join_the_entry_of_their_step() -> None:
    curve = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]
    points = [
        {"step": 5, "rules": {}, "val/mask_ap": 1.5, "val/ap50": 3.0},
        {"step": 10, "rules": {}, "val/mask_ap": 2.5, "val/ap50": None},
    ]
    assert with_points(curve, points) == [
        {"step": 5, "val/mask_ap": 1.5, "val/ap50": 3.0},
        {"step": 10, "loss": 2.0, "val/mask_ap": 2.5},
        {"step": 20, "loss": 1.0},
    ]
    assert curve == [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]
    assert with_points(curve, []) == curve


def test_validation_beside_training_is_counted_before_anything_starts() -> None:
    resources = {"CPU": 2.0, "GPU": 1.0, "object_store_memory": 2.0**31}
    off = build_recipe("shapes", "smoke", {"runtime.use_gpu": "true"})
    on = build_recipe("shapes", "smoke", {"runtime.use_gpu": "true", "evaluation.every_steps": "2"})
    on_cpu = build_recipe(
        "shapes",
        "smoke",
        {"runtime.use_gpu": "true", "evaluation.every_steps": "2", "runtime.validate_on_gpu": "false"},
    )
    assert validation_bundles(off) == []
    assert stage_slots(off, resources, 0.01) == 1
    with pytest.raises(ValueError, match=r"2 GPUs.*evaluation\.every_steps"):
        stage_slots(on, resources, 0.01, validation_bundles(on))
    assert stage_slots(on_cpu, resources, 0.01, validation_bundles(on_cpu)) == 1
    recipe, cpus = build_recipe("shapes", "smoke"), {"CPU": 4.0, "object_store_memory": 2.0**34}
    assert stage_slots(recipe, cpus, 0.01, validation_bundles(on_cpu)) < stage_slots(recipe, cpus, 0.01)


def test_tables_of_records_name_the_order_of_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image_id": [encode_image_id(i) for i in (7, 30, 4, 1)]})
    images = replace(validation_set(monkeypatch, 3), records=table)
    assert images.tie_order().tolist() == [1, 2, 0]  # of the first three alone
