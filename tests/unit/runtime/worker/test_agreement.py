"""Whether a stage that ran again gave the same: curves, metrics and labels, up to rounding."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from cast_ray.runtime.worker.agreement import Difference, compare_curves, compare_labels, compare_metrics


def entry(step: int, loss: float, **more: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "lr": 1e-3, "images_per_s": 50.0 * loss, **more}


def test_equal_curves_are_those_that_differ_in_rounding_and_in_speed() -> None:
    stored = [entry(10, 2.0), entry(20, 1.0)]
    again = [entry(10, 2.0 + 1e-6) | {"images_per_s": 1.0}, entry(20, 1.0)]
    assert compare_curves(stored, again, 20) == (2, [])


def test_the_first_difference_comes_first() -> None:
    stored = [entry(10, 2.0), entry(20, 1.0, cls=0.5), entry(30, 0.5)]
    again = [entry(10, 2.0), entry(20, 1.1, cls=0.6), entry(30, 0.7)]
    compared, found = compare_curves(stored, again, 30)
    assert compared == 3 and [d.what for d in found] == ["step 20, loss", "step 20, cls", "step 30, loss"]
    assert str(found[0]) == "step 20, loss: stored 1, now 1.1"


def test_a_run_that_was_stopped_is_compared_as_far_as_it_came() -> None:
    stored = [entry(10, 2.0), entry(20, 1.0), entry(24, 0.9)]
    assert compare_curves(stored, [entry(10, 2.0)], 13) == (1, [])
    assert compare_curves(stored, [], 9) == (0, [])
    compared, found = compare_curves(stored, [entry(10, 2.0)], 20)
    assert compared == 2 and {d.what for d in found} == {"step 20, loss", "step 20, lr"}
    assert found[0].again is None and str(found[0]) == "step 20, loss: stored 1, now nothing"


def test_points_of_validation_beside_training_are_not_compared() -> None:
    stored = [entry(10, 2.0) | {"val/mask_ap": 3.0}, {"step": 15, "val/mask_ap": 4.0}, entry(20, 1.0)]
    assert compare_curves(stored, [entry(10, 2.0), entry(20, 1.0)], 20) == (2, [])


def test_metrics_are_compared_class_by_class() -> None:
    stored: dict[str, Any] = {"mask_ap": 30.0, "metric": "coco", "ap75": None, "per_class": {"car": 1.0, "cat": 2.0}}
    assert compare_metrics(stored, stored | {"mask_ap": 30.0 * (1 + 1e-9)}) == []
    other = stored | {"ap75": 5.0, "metric": "cityscapes", "per_class": {"car": 1.0, "cat": 2.5}}
    assert compare_metrics(stored, other) == [
        Difference("metric", "coco", "cityscapes"),
        Difference("ap75", None, 5.0),
        Difference("per_class/cat", 2.0, 2.5),
    ]


def labels(*images: list[tuple[int, bytes, float]]) -> pa.Table:
    rows = [
        {
            "position": position,
            "uri": f"{position}.png",
            "instances": [{"category_id": c, "rle": rle, "score": score} for c, rle, score in instances],
        }
        for position, instances in enumerate(images)
    ]
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(
    "other",
    [
        [(1, b"a", 0.9), (2, b"b", 0.8), (1, b"c", 0.7)],
        [(1, b"a", 0.9)],
        [(1, b"a", 0.9), (1, b"b", 0.8)],
        [(1, b"a", 0.9), (2, b"c", 0.8)],
        [(1, b"a", 0.9), (2, b"b", 0.7)],
    ],
)
def test_labels_are_compared_by_class_mask_and_score(other: list[tuple[int, bytes, float]]) -> None:
    whole = [(1, b"a", 0.9), (2, b"b", 0.8)]
    stored = labels([(3, b"z", 0.5)], whole)
    assert compare_labels(stored, stored) == []
    found = compare_labels(stored, labels([(3, b"z", 0.5 + 1e-7)], other))
    assert found == [Difference("labels of 1.png", 2, len(other))]


def test_an_image_that_has_no_row_is_a_difference() -> None:
    assert compare_labels(labels([], []), labels([])) == [Difference("labels of 1.png", 0, None)]
