"""Mask AP on records."""

from __future__ import annotations

import json
import math

import hotcoco
import numpy as np
import pyarrow as pa
import pytest
from evaluation_scenes import CATEGORIES as CLASSES
from evaluation_scenes import coco_document, random_scenes, referee, referee_numbers, with_areas
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_ray.contracts.records import RECORD_SCHEMA, Category, encode_image_id
from cast_ray.data.reading.reader import load
from cast_ray.evaluation.coco_ap import mask_ap
from cast_ray.recipe import DataConfig

CATEGORIES = (Category(3, "disc"), Category(7, "cross"))


STATS = (
    *("mask_ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar", "ar_small", "ar_medium", "ar_large"),
)
"""Our names of the twelve numbers that pycocotools and hotcoco print, in their order."""


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


INT_IDS, STRING_IDS, HUGE_IDS = (
    (5, 30, 12, 7, 0, 9, 41),
    ("b", "a 10", "a 9", "z/1", "ä", ""),
    (2**53, 3, 2**53 - 1, 2**31),
)


@pytest.mark.parametrize("ids", [INT_IDS, STRING_IDS, HUGE_IDS], ids=["int", "string", "huge"])
@pytest.mark.parametrize("tied_scores", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("seed", range(8))
def test_numbers_are_pycocotools_to_the_last_bit(seed: int, tied_scores: bool, ids: tuple, capsys) -> None:
    """Crowds, copies, images without objects or detections, images listed in any order."""
    ground_truth, results = random_scenes(seed, ids, tied_scores=tied_scores)
    ours = mask_ap(ground_truth, results, CLASSES)
    assert capsys.readouterr().out == ""
    wanted = referee_numbers(referee(coco_document(ground_truth), results))
    assert {name: ours[name] for name in wanted} == wanted


@pytest.mark.parametrize("max_detections", [1, 3, 7])
def test_only_the_best_detections_of_an_image_and_class_count(max_detections: int) -> None:
    ground_truth, results = random_scenes(1, INT_IDS, tied_scores=True)
    ours = mask_ap(ground_truth, results, CLASSES, max_detections)
    wanted = referee_numbers(
        referee(coco_document(ground_truth), results, (1, min(10, max_detections), max_detections))
    )
    assert {name: ours[name] for name in wanted} == wanted


def test_numbers_of_each_class_are_those_of_it_alone() -> None:
    ground_truth, results = random_scenes(4, INT_IDS)
    ours = mask_ap(ground_truth, results, CLASSES)
    for k, category in enumerate(CLASSES):
        alone = referee(coco_document(ground_truth), results).eval["precision"][:, :, k, 0, -1]
        assert ours["per_class"][category.name] == pytest.approx(100 * alone.mean(), rel=1e-12)
        assert ours["per_class_ap50"][category.name] == pytest.approx(100 * alone[0].mean(), rel=1e-12)


def test_classes_of_one_name_have_numbers_of_their_own() -> None:
    """The second `fish` has no object to find; it must not hide what is known of the first."""
    categories = (Category(1, "fish"), Category(2, "crab"), Category(9, "fish"))
    square = rle(0, 0, 10, 10)
    ground_truth = table({1: [truth(1, square), truth(2, rle(20, 20, 9, 9))]})
    ap = mask_ap(ground_truth, [found(1, 1, square, 0.9), found(1, 9, square, 0.8)], categories)
    assert ap["per_class"] == {"fish (id 1)": pytest.approx(100), "crab": 0, "fish (id 9)": None}
    assert ap["per_class_ap50"].keys() == ap["per_class"].keys()


def test_more_masks_than_pycocotools_counts_in_a_call() -> None:
    ground_truth, results = random_scenes(5, (1, 2), num_objects=4, num_detections=300)
    wanted = referee_numbers(referee(coco_document(ground_truth), results))
    ours = mask_ap(ground_truth, results, CLASSES)
    assert {name: ours[name] for name in wanted} == wanted


def test_results_files_are_read_by_pycocotools_unchanged(tmp_path) -> None:
    """The files of an evaluation, ids and all; numbers through pycocotools' own readers."""
    ground_truth, results = random_scenes(6, INT_IDS)
    (tmp_path / "truth.json").write_text(json.dumps(coco_document(ground_truth)))
    (tmp_path / "results.json").write_text(json.dumps(results))
    coco = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours = mask_ap(ground_truth, results, CLASSES)
    assert 0 < ours["mask_ap"] < 100
    assert [ours[n] if ours[n] is not None else -100 for n in STATS] == [100 * s for s in evaluation.stats]


EDGES = (0.0, 0.5, 1023.9, 1024.0, 1024.1, 2000.0, 9215.9, 9216.0, 9216.1, 1e10, 1e11, -1.0)


@pytest.mark.parametrize("seed", range(8))
def test_sizes_are_the_annotated_areas_as_in_pycocotools(seed: int) -> None:
    """Of objects and crowds; areas that have nothing to do with the masks, and all borders of the ranges."""
    ground_truth, results = random_scenes(seed, INT_IDS, crowds=0.3)
    ours = mask_ap(with_areas(ground_truth, EDGES, seed), results, CLASSES)
    wanted = referee_numbers(referee(coco_document(with_areas(ground_truth, EDGES, seed)), results))
    assert {name: ours[name] for name in wanted} == wanted
    by_mask = mask_ap(ground_truth, results, CLASSES)
    assert {name for name in wanted if ours[name] != by_mask[name]} > {"ap_small", "ar_small"}


@pytest.mark.parametrize("seed", range(4))
def test_an_object_without_an_area_has_its_masks_as_in_hotcoco(seed: int) -> None:
    """pycocotools raises a KeyError there. Some annotations of the file have an area, some have none."""
    ground_truth, results = random_scenes(seed, INT_IDS, crowds=0.3)
    ground_truth = with_areas(ground_truth, (None, None, 500.0, 5000.0, 50_000.0), seed)
    document = coco_document(ground_truth)
    instances = [i for row in ground_truth.to_pylist() for i in row["instances"]]
    for annotation, instance in zip(document["annotations"], instances, strict=True):
        if instance["area"] is None:
            del annotation["area"]
    coco = hotcoco.COCO(document)
    evaluation = hotcoco.COCOeval(coco, coco.load_res(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours = mask_ap(ground_truth, results, CLASSES)
    assert [ours[n] if ours[n] is not None else -100 for n in STATS] == pytest.approx(
        [100 * s for s in evaluation.stats], rel=1e-12
    )


def test_sizes_of_a_folder_are_those_of_its_annotation_file(tmp_path) -> None:
    """From the file through the reader to the numbers."""
    ground_truth, results = random_scenes(2, INT_IDS)
    document = coco_document(with_areas(ground_truth, EDGES))
    for image in document["images"]:
        image["file_name"] = f"{image['id']}.png"
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "images" / image["file_name"])
    (tmp_path / "instances.json").write_text(json.dumps(document))
    dataset, _ = load(DataConfig(format="coco", root=str(tmp_path)))
    everything = pa.concat_tables([dataset.train, dataset.val])
    ours = mask_ap(everything, results, CLASSES)
    wanted = referee_numbers(referee(document, results))
    assert {name: ours[name] for name in wanted} == wanted


def test_record_tables_of_older_versions_are_still_measured() -> None:
    """Their instances have no `area`: sizes are the masks', as they were."""
    ground_truth, results = random_scenes(3, INT_IDS)
    instances = pa.list_(pa.struct([f for f in RECORD_SCHEMA.field("instances").type.value_type if f.name != "area"]))
    schema = RECORD_SCHEMA.set(4, pa.field("instances", instances))
    old = pa.Table.from_pylist(ground_truth.to_pylist(), schema=schema)
    assert mask_ap(old, results, CLASSES) == mask_ap(ground_truth, results, CLASSES)


def test_a_match_with_annotation_zero_counts() -> None:
    """pycocotools stores the annotation's id as the mark of a match, so that id 0 is none there."""
    ground_truth = table({1: [truth(3, rle(0, 0, 10, 10))]})
    results = [found(1, 3, rle(0, 0, 10, 10), 0.5)]
    document = coco_document(ground_truth, CATEGORIES)
    document["annotations"][0]["id"] = 0
    assert referee_numbers(referee(document, results))["mask_ap"] == 0
    assert mask_ap(ground_truth, results, CATEGORIES)["mask_ap"] == pytest.approx(100)


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
