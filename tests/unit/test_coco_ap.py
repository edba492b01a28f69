"""Mask AP on records."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_ray.evaluation.coco_ap import mask_ap
from cast_ray.records import RECORD_SCHEMA, Category, encode_image_id

CATEGORIES = (Category(3, "disc"), Category(7, "cross"))


def rle(top: int, left: int, height: int, width: int, size: tuple[int, int] = (40, 50)) -> bytes:
    mask = np.zeros(size, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return coco_mask.encode(np.asfortranarray(mask))["counts"]


def truth(category: int, counts: bytes, crowd: bool = False) -> dict:
    return {"category_id": category, "rle": counts, "score": 1.0, "is_crowd": crowd}


def table(images: dict) -> pa.Table:
    rows = [
        {"image_id": encode_image_id(i), "uri": f"{i}.png", "height": 40, "width": 50, "instances": instances}
        for i, instances in images.items()
    ]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def found(image_id, category: int, counts: bytes, score: float) -> dict:
    segmentation = {"size": [40, 50], "counts": counts.decode()}
    return {"image_id": image_id, "category_id": category, "segmentation": segmentation, "score": score}


def test_a_perfect_detector_scores_100_with_string_and_gapped_ids():
    images = {"a17": [truth(3, rle(0, 0, 10, 10))], "b2": [truth(7, rle(5, 5, 20, 20))], "empty": []}
    results = [found("a17", 3, rle(0, 0, 10, 10), 0.9), found("b2", 7, rle(5, 5, 20, 20), 0.2)]
    ap = mask_ap(table(images), results, CATEGORIES)
    assert [ap[k] for k in ("mask_ap", "ap50", "ap75", "ap_small")] == pytest.approx([100] * 4)
    assert ap["per_class"] == {"disc": pytest.approx(100), "cross": pytest.approx(100)}
    assert (ap["num_images"], ap["num_detections"]) == (3, 2)
    assert ap["ap_medium"] is None and ap["ap_large"] is None


def test_a_false_alarm_on_an_image_without_objects_counts():
    images = {1: [truth(3, rle(0, 0, 10, 10))], 2: []}
    right, alarm = found(1, 3, rle(0, 0, 10, 10), 0.5), found(2, 3, rle(0, 0, 9, 9), 0.9)
    ap = mask_ap(table(images), [right, alarm], CATEGORIES)
    assert ap["mask_ap"] == pytest.approx(50)
    assert ap["per_class"]["cross"] is None


def test_a_detection_on_a_crowd_is_ignored():
    instances = [truth(3, rle(0, 0, 10, 10)), truth(3, rle(20, 20, 20, 30), crowd=True)]
    results = [found(1, 3, rle(0, 0, 10, 10), 0.5), found(1, 3, rle(22, 22, 10, 10), 0.9)]
    assert mask_ap(table({1: instances}), results, CATEGORIES)["mask_ap"] == pytest.approx(100)


def test_an_iou_of_two_thirds_passes_four_thresholds_of_ten():
    images = {1: [truth(3, rle(0, 0, 10, 12))]}
    ap = mask_ap(table(images), [found(1, 3, rle(0, 0, 10, 8), 0.5)], CATEGORIES)
    assert ap["mask_ap"] == pytest.approx(40) and ap["ap50"] == pytest.approx(100) and ap["ap75"] == 0


def test_nothing_found_is_zero_and_nothing_to_find_is_none():
    assert mask_ap(table({1: [truth(3, rle(0, 0, 10, 10))]}), [], CATEGORIES)["mask_ap"] == 0
    assert mask_ap(table({1: []}), [], CATEGORIES)["mask_ap"] is None


def test_numbers_equal_pycocotools_on_its_own_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, results, annotations = {}, [], []
    for image_id in (5, 9, 12):
        images[image_id] = []
        for _ in range(4):
            top, left, height, width = rng.integers(4, 20, 4)
            category = int(rng.choice([3, 7]))
            counts = rle(top, left, height, width)
            images[image_id].append(truth(category, counts))
            segmentation = {"size": [40, 50], "counts": counts.decode()}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0}
                | {"segmentation": segmentation, "area": int(coco_mask.area(segmentation))}
            )
            shifted = rle(top + rng.integers(0, 3), left, height, width)
            results.append(found(image_id, category, shifted, float(rng.random())))
    ours = mask_ap(table(images), results, CATEGORIES)
    (tmp_path / "truth.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "height": 40, "width": 50} for i in images],
                "annotations": annotations,
                "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
                "info": {},
            }
        )
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert capsys.readouterr().out == ""
    coco = COCO(str(tmp_path / "truth.json"))
    reference = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "segm")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    assert 0 < ours["mask_ap"] < 100
    for name, index in (("mask_ap", 0), ("ap50", 1), ("ap75", 2), ("ap_small", 3)):
        assert ours[name] == pytest.approx(reference.stats[index] * 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": math.nan}, "score is nan"),
        ({"score": math.inf}, "score is inf"),
        ({"image_id": 2}, "image_id is 2"),
        ({"category_id": 4}, r"category_id is 4: expected one of \[3, 7\]"),
        ({"segmentation": {"size": [50, 40], "counts": "0"}}, r"size is \[50, 40\] \(image 1\): expected \[40, 50\]"),
    ],
)
def test_unusable_results_are_refused(change: dict, message: str):
    result = found(1, 3, rle(0, 0, 10, 10), 0.5) | change
    with pytest.raises(ValueError, match=message):
        mask_ap(table({1: []}), [result], CATEGORIES)
