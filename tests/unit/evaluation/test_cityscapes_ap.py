"""Cityscapes' AP, against numbers that the official tool produced (see tests/data/cityscapes_reference.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_scenes import encode
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import Category, ClassMap
from cast_ray.evaluation.cityscapes_ap import cityscapes_metrics, match_cityscapes
from cast_ray.evaluation.detections import Detections, Truth
from cast_ray.evaluation.matches import DetectionMatches, join

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "cityscapes_reference.json").read_text())
HEIGHT, WIDTH = REFERENCE["size"]
CATEGORIES = tuple(
    Category(i, name)
    for i, name in zip(
        (24, 25, 26, 27, 28, 31, 32, 33), ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    )
)
CLASSES = ClassMap(CATEGORIES)
VOID_ID = -1


def counts_of(runs: list[int]) -> bytes:
    return coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": runs}, HEIGHT, WIDTH)["counts"]


def record(scene: dict[str, Any]) -> dict[str, Any]:
    """A scene as a reader gives it: instances, groups as ignore regions, void as ignore regions of no class."""
    instances = []
    for region in scene["regions"]:
        raw = region["id"]
        if raw in REFERENCE["void"]:
            category, crowd = VOID_ID, True
        elif raw >= 1000 and raw // 1000 in CLASSES.ids:
            category, crowd = raw // 1000, False
        elif raw in CLASSES.ids:
            category, crowd = raw, True
        else:
            continue
        facts = {"category_id": category, "rle": counts_of(region["runs"]), "score": 1.0, "is_crowd": crowd}
        instances.append(facts)
    return {"image_id": "1", "uri": "", "height": HEIGHT, "width": WIDTH, "instances": instances}


def detections(scene: dict[str, Any]) -> Detections:
    return Detections.of(
        [
            {
                "label": CLASSES.label(d["label"]),
                "score": d["score"],
                "rle": counts_of(d["mask"]),
                "size": [HEIGHT, WIDTH],
            }
            for d in scene["detections"]
        ]
    )


def match(scenes: list[dict[str, Any]]) -> DetectionMatches:
    truth, found = [Truth.of(record(s), CLASSES) for s in scenes], [detections(s) for s in scenes]
    return match_cityscapes(truth, found, len(CLASSES))


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["name"])
def test_numbers_are_the_official_tools(case: dict[str, Any]) -> None:
    numbers = case["numbers"]
    assert numbers["classes"] == [c.name for c in CATEGORIES]
    measured = cityscapes_metrics(match(case["scenes"]), CATEGORIES)
    assert measured["metric"] == "cityscapes"
    assert measured["mask_ap"] == pytest.approx(100 * numbers["all_ap"], rel=1e-12)
    assert measured["ap50"] == pytest.approx(100 * numbers["all_ap50"], rel=1e-12)
    for name, aps in zip(numbers["classes"], numbers["ap"]):
        wanted = None if aps[0] is None else 100 * float(np.mean(aps))
        assert measured["per_class"][name] == (wanted if wanted is None else pytest.approx(wanted, rel=1e-12))
        wanted = None if aps[0] is None else 100 * aps[0]
        assert measured["per_class_ap50"][name] == (wanted if wanted is None else pytest.approx(wanted, rel=1e-12))


def test_the_reference_meets_every_rule() -> None:
    """Else the comparison would prove little: all three verdicts, at thresholds of both kinds, and a range of APs."""
    matches = match([s for case in REFERENCE["cases"] for s in case["scenes"]])
    for t in (0, 5, 9):
        hit, skipped = matches.matched[:, 0] >> t & 1, matches.ignored[:, 0] >> t & 1
        assert hit.sum() > 10 and skipped.sum() > 10 and (1 - hit - skipped).sum() > 10
    assert {0.0, None} < {
        None if a[0] is None else float(np.sum(a)) for c in REFERENCE["cases"] for a in c["numbers"]["ap"]
    }


def test_images_matched_apart_and_repeated() -> None:
    scenes = REFERENCE["cases"][1]["scenes"]
    whole = match(scenes)
    parts = [match([scene]) for scene in scenes]
    joined = join(parts, [np.array([i]) for i in range(len(scenes))])
    assert joined.mask_ap() == whole.mask_ap() == cityscapes_metrics(whole, CATEGORIES)["mask_ap"]
    counts = np.random.default_rng(0).integers(0, 4, len(scenes))
    copies = [scene for scene, count in zip(scenes, counts) for _ in range(count)]
    assert whole.mask_ap(counts) == pytest.approx(match(copies).mask_ap(), rel=1e-12)


def test_classes_of_one_name_have_numbers_of_their_own() -> None:
    renamed = [Category(c.id, "vehicle" if c.name in ("car", "train") else c.name) for c in CATEGORIES]
    matches = match([scene for case in REFERENCE["cases"] for scene in case["scenes"]])
    numbers, told_apart = cityscapes_metrics(matches, CATEGORIES), cityscapes_metrics(matches, renamed)
    for key in ("per_class", "per_class_ap50"):
        assert list(told_apart[key].values()) == list(numbers[key].values())
        assert told_apart[key]["vehicle (id 26)"] == numbers[key]["car"]
        assert told_apart[key]["vehicle (id 31)"] == numbers[key]["train"]


def box(width: int, category: int = 26, crowd: bool = False) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:10, :width] = True
    return {"category_id": category, "rle": encode(mask), "score": 0.9, "is_crowd": crowd}


def ap(instances: list[dict[str, Any]], found: list[dict[str, Any]]) -> float | None:
    row = {"height": HEIGHT, "width": WIDTH, "instances": instances}
    seen: Any = [{"label": CLASSES.label(f["category_id"]), "size": [HEIGHT, WIDTH], **f} for f in found]
    matches = match_cityscapes([Truth.of(row, CLASSES)], [Detections.of(seen)], len(CLASSES))
    return cityscapes_metrics(matches, CATEGORIES)["mask_ap"]


def test_what_differs_from_coco() -> None:
    small, large = box(9), box(20)
    assert ap([small], [small]) is None  # 90 pixels: nothing to find
    assert ap([large], [large]) == pytest.approx(100)
    # An overlap of exactly .95 does not pass .95, and the curve goes through the wrong detection's score: .25 there.
    assert ap([large], [large, box(19) | {"score": 0.95}]) == pytest.approx(100 * (9 * 1 + 0.25) / 10)
    assert ap([box(20, crowd=True)], [large]) is None
    # The official tool reads label maps, which have no `area` but the mask's.
    assert ap([large | {"area": 3.0}], [large]) == pytest.approx(100)
    assert math.isnan(match_cityscapes([], [], len(CLASSES)).mask_ap())
