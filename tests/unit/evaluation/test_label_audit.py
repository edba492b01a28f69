"""The audit of pseudo-labels against a dense, slow count of the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluation_scenes import (
    CATEGORIES,
    HEIGHT,
    WIDTH,
    coco_document,
    encode,
    random_scenes,
    referee,
    referee_numbers,
    with_areas,
)
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import RECORD_SCHEMA, Category, ClassMap, encode_image_id
from cast_ray.evaluation.label_audit import ERRORS, audit_images, join_audits, summarise_audit

CLASSES = ClassMap(CATEGORIES)
IDS = (4, 9, 2, 7, 11, 5, 1, 30)


def label_rows(table: pa.Table, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results as the labelling job writes them."""
    rows = []
    for position, row in enumerate(table.to_pylist()):
        mine = [r for r in results if encode_image_id(r["image_id"]) == row["image_id"]]
        instances = [
            {"category_id": r["category_id"], "rle": r["segmentation"]["counts"].encode()}
            | {"score": r["score"], "is_crowd": False}
            for r in mine
        ]
        rows.append(row | {"instances": instances, "position": position})
    return rows


def audit_of(truth: list[dict[str, Any]], labels: list[dict[str, Any]]) -> dict[str, Any]:
    audit = summarise_audit(audit_images(truth, labels, CLASSES), CLASSES)
    assert audit is not None
    return audit


def dense(row: dict[str, Any], counts: bytes) -> np.ndarray:
    return coco_mask.decode({"size": [row["height"], row["width"]], "counts": counts}).astype(bool)


def count_slowly(truth: list[dict[str, Any]], labels: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each class right, wrong, ignored labels and objects; errors; of each image objects found and their pixels."""
    right, wrong, ignored, objects = (dict.fromkeys((c.id for c in CATEGORIES), 0) for _ in range(4))
    errors = dict.fromkeys(ERRORS, 0)
    scored: list[tuple[float, bool]] = []
    found_shares, pixel_shares = [], []
    for row, label_row in zip(truth, labels):
        things = [(i["category_id"], dense(row, i["rle"]), i["is_crowd"]) for i in row["instances"]]
        for category, _, crowd in things:
            objects[category] += not crowd
        taken: set[int] = set()
        ranked = sorted(label_row["instances"], key=lambda i: -i["score"])
        for label in ranked:
            mask = dense(row, label["rle"])
            ious = [(mask & m).sum() / (mask.sum() if crowd else (mask | m).sum()) for _, m, crowd in things]
            mine = [k for k, thing in enumerate(things) if thing[0] == label["category_id"] and ious[k] >= 0.5]
            free = [k for k in mine if not things[k][2] and k not in taken]
            if free:
                best = max(free, key=lambda k: (ious[k], k))
                taken.add(best)
                right[label["category_id"]] += 1
                scored.append((label["score"], True))
            elif any(things[k][2] for k in mine):
                ignored[label["category_id"]] += 1
            else:
                wrong[label["category_id"]] += 1
                scored.append((label["score"], False))
                real = [k for k, thing in enumerate(things) if not thing[2]]
                if any(k in real for k in mine):
                    errors["duplicate"] += 1
                elif any(ious[k] >= 0.5 and things[k][0] != label["category_id"] for k in real):
                    errors["other class"] += 1
                elif any(ious[k] >= 0.1 for k in real):
                    errors["poor mask"] += 1
                else:
                    errors["background"] += 1
        real_masks = [m for _, m, crowd in things if not crowd]
        if real_masks:
            found_shares.append(len(taken) / len(real_masks))
            whole = np.any(real_masks, axis=0)
            covered = np.any([dense(row, i["rle"]) for i in ranked], axis=0) if ranked else np.zeros_like(whole)
            pixel_shares.append((whole & covered).sum() / whole.sum())
    return {
        "right": right,
        "wrong": wrong,
        "ignored": sum(ignored.values()),
        "objects": objects,
        "errors": errors,
        "scored": scored,
        "found": found_shares,
        "pixels": pixel_shares,
    }


def percent(part: int, whole: int) -> Any:
    return pytest.approx(100 * part / whole) if whole else None


def test_classes_of_one_name_are_audited_apart() -> None:
    table, results = random_scenes(0, IDS, num_detections=12)
    truth, labels = table.to_pylist(), label_rows(table, results)
    renamed = ClassMap([Category(c.id, "thing" if c.name != "cross" else c.name) for c in CATEGORIES])
    audit, plain = summarise_audit(audit_images(truth, labels, renamed), renamed), audit_of(truth, labels)
    assert audit and plain
    for key in ("per_class", "errors_per_class"):
        assert list(audit[key]) == ["thing (id 2)", "cross", "thing (id 9)"]
        assert list(audit[key].values()) == list(plain[key].values())


def test_sizes_are_those_of_the_annotations() -> None:
    """As in AP by size; an object whose `area` lies outside all of COCO's ranges is nowhere to be found."""
    table, results = random_scenes(0, IDS, num_detections=12)
    labels = label_rows(table, results)
    small, nowhere = (audit_of(with_areas(table, [area]).to_pylist(), labels) for area in (5.0, -1.0))
    assert small["by_size"]["small"]["num_objects"] == small["num_objects"] > 0
    assert small["by_size"]["large"]["num_objects"] == small["by_size"]["medium"]["num_objects"] == 0
    assert nowhere["num_objects"] == 0 and nowhere["coverage"]["objects"]["mean"] is None


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_dense_masks(seed: int) -> None:
    table, results = random_scenes(seed, IDS, num_detections=12)
    truth, labels = table.to_pylist(), label_rows(table, results)
    audit = audit_of(truth, labels)
    slow = count_slowly(truth, labels)
    for category in CATEGORIES:
        right, wrong, objects = (slow[n][category.id] for n in ("right", "wrong", "objects"))
        numbers = audit["per_class"][category.name]
        assert (numbers["num_labels"], numbers["num_objects"]) == (right + wrong, objects)
        assert numbers["precision"] == percent(right, right + wrong) and numbers["recall"] == percent(right, objects)
    right, wrong, objects = (sum(slow[n].values()) for n in ("right", "wrong", "objects"))
    assert right and wrong and slow["ignored"]
    assert audit["precision"] == percent(right, right + wrong) and audit["recall"] == percent(right, objects)
    assert audit["num_ignored"] == slow["ignored"] and audit["errors"] == slow["errors"]
    assert sum(audit["errors"].values()) == wrong
    coverage = audit["coverage"]
    for name, shares in (("objects", slow["found"]), ("pixels", slow["pixels"])):
        assert coverage[name]["mean"] == pytest.approx(100 * np.mean(shares))
        assert coverage[name]["histogram"] == np.histogram(shares, bins=10, range=(0, 1))[0].tolist()
    calibration = audit["calibration"]
    gap = 0.0
    for k, low in enumerate(np.arange(10) / 10):
        inside = [(s, t) for s, t in slow["scored"] if low <= s < low + 0.1]
        assert calibration["count"][k] == len(inside)
        if inside:
            score, precision = np.mean(inside, axis=0)
            assert calibration["score"][k] == pytest.approx(score)
            assert calibration["precision"][k] == pytest.approx(precision)
            gap += len(inside) * abs(score - precision)
    assert calibration["ece"] == pytest.approx(gap / len(slow["scored"]))


def test_every_kind_of_error_is_met() -> None:
    table, results = random_scenes(3, IDS, num_detections=40)
    audit = audit_of(table.to_pylist(), label_rows(table, results))
    assert all(audit["errors"].values())
    by_class = audit["errors_per_class"].values()
    assert {kind: sum(c[kind] for c in by_class) for kind in ERRORS} == audit["errors"]


def test_ap_is_pycocotools_and_sizes_are_its_ranges() -> None:
    table, results = random_scenes(1, IDS)
    audit = audit_of(table.to_pylist(), label_rows(table, results))
    evaluation = referee(coco_document(table), results)
    wanted = referee_numbers(evaluation)
    assert audit["ap"] == pytest.approx(wanted["mask_ap"]) and audit["ap50"] == pytest.approx(wanted["ap50"])
    assert {s: n["ap"] for s, n in audit["by_size"].items()} == {
        s: wanted[f"ap_{s}"] if wanted[f"ap_{s}"] is None else pytest.approx(wanted[f"ap_{s}"])
        for s in ("small", "medium", "large")
    }
    # pycocotools' recall at .5 is a mean over classes, ours over objects
    for a, size in ((1, "small"), (2, "medium")):
        parts = [e for e in evaluation.evalImgs if e and e["aRng"] == evaluation.params.areaRng[a]]
        objects = sum(int((e["gtIgnore"] == 0).sum()) for e in parts)
        found = sum(int((e["dtMatches"][0].astype(bool) & ~e["dtIgnore"][0].astype(bool)).sum()) for e in parts)
        assert audit["by_size"][size]["num_objects"] == objects
        assert audit["by_size"][size]["recall"] == percent(found, objects)


def test_parts_join_to_the_whole_whatever_their_order() -> None:
    table, results = random_scenes(2, IDS, tied_scores=True)
    truth, labels = table.to_pylist(), label_rows(table, results)
    whole = audit_of(truth, labels)
    chosen = [[5, 2], [0], [7, 1, 3], [4, 6]]
    parts = [audit_images([truth[i] for i in rows], [labels[i] for i in rows], CLASSES) for rows in chosen]
    assert summarise_audit(join_audits(parts), CLASSES) == whole


def test_images_without_ground_truth_are_left_out() -> None:
    table, results = random_scenes(2, IDS)
    truth, labels = table.to_pylist(), label_rows(table, results)
    half = [row | {"instances": None} if k % 2 else row for k, row in enumerate(truth)]
    audit = audit_of(half, labels)
    wanted = audit_of(truth[::2], labels[::2])
    assert audit == wanted and audit["num_images"] == len(IDS) / 2
    assert summarise_audit(audit_images([r | {"instances": None} for r in truth], labels, CLASSES), CLASSES) is None


def box(left: int, right: int, category: int, score: float = 1.0, crowd: bool = False) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:10, left:right] = True
    return {"category_id": category, "rle": encode(mask), "score": score, "is_crowd": crowd}


def rows(images: list[list[dict[str, Any]]], **more: int) -> list[dict[str, Any]]:
    facts = {"uri": "", "height": HEIGHT, "width": WIDTH}
    listed = [{"image_id": encode_image_id(k), "instances": i} | facts for k, i in enumerate(images)]
    assert pa.Table.from_pylist(listed, schema=RECORD_SCHEMA).num_rows == len(images)
    return listed


def test_worst_images_come_first_and_it_is_plain_data() -> None:
    truth = rows([[box(0, 10, 2)], [box(0, 10, 2), box(20, 30, 5)], [], [box(0, 10, 2)]])
    found = [[box(0, 10, 2, 0.9)], [box(0, 10, 5, 0.8)], [box(50, 60, 2, 0.7)], []]
    labels = [row | {"position": 10 + k} for k, row in enumerate(rows(found))]
    audit = audit_of(truth, labels)
    assert audit["worst"] == [
        {"position": 11, "image_id": 1, "labels": 1, "wrong": 1, "missed": 2},
        {"position": 12, "image_id": 2, "labels": 1, "wrong": 1, "missed": 0},
        {"position": 13, "image_id": 3, "labels": 0, "wrong": 0, "missed": 1},
    ]
    assert audit["errors"] == {"duplicate": 0, "other class": 1, "poor mask": 0, "background": 1}
    coverage = audit["coverage"]
    assert (coverage["images_without_label"], coverage["images_without_object"]) == (1, 1)
    assert coverage["labels_per_image"] == 0.75
    assert coverage["pixel_precision"] == pytest.approx(100 * 200 / 300)
    assert json.loads(json.dumps(audit, allow_nan=False)) == audit


def test_a_label_on_a_crowd_costs_nothing() -> None:
    truth = rows([[box(0, 10, 2), box(20, 60, 2, crowd=True)]])
    labels = [rows([[box(0, 10, 2, 0.9), box(30, 40, 2, 0.8)]])[0] | {"position": 0}]
    audit = audit_of(truth, labels)
    assert audit["precision"] == audit["recall"] == audit["coverage"]["pixel_precision"] == 100
    assert audit["num_ignored"] == 1 and audit["worst"] == []


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_counted_by_what_is_visible_of_their_masks(seed: int) -> None:
    table, results = random_scenes(seed, IDS, num_detections=12)
    truth, labels = table.to_pylist(), label_rows(table, results)
    rng = np.random.default_rng(seed)
    for row in labels:
        for instance in row["instances"]:
            instance |= {"visible_share": float(rng.integers(1, 101)) / 100, "num_suppressed": int(rng.integers(3))}
    audit = audit_of(truth, labels)
    right = {name: audit["visibility"][name]["num_labels"] for name in ("left_overs", "others")}
    assert sum(right.values()) == audit["num_labels"] == sum(audit["visibility"]["count"])
    assert audit["num_suppressed"] == sum(i["num_suppressed"] for row in labels for i in row["instances"])
    for name, kept in (("left_overs", lambda share: share < 0.5), ("others", lambda share: share >= 0.5)):
        # Slowly, of one label alone: whether it is right depends on the better ones that may take its object.
        counted = correct = 0
        for row, label_row in zip(truth, labels):
            ranked = sorted(label_row["instances"], key=lambda i: -i["score"])
            for k, instance in enumerate(ranked):
                if kept(instance["visible_share"]):
                    after, before = (count_slowly([row], [label_row | {"instances": ranked[:n]}]) for n in (k + 1, k))
                    correct += sum(after["right"].values()) - sum(before["right"].values())
                    counted += len(after["scored"]) - len(before["scored"])
        assert audit["visibility"][name] == {"num_labels": counted, "precision": percent(correct, counted)}
    parts = [audit_images(truth[k::2], labels[k::2], CLASSES) for k in range(2)]
    assert summarise_audit(join_audits(parts), CLASSES) == audit


def test_labels_that_do_not_say_what_is_visible_of_them_are_not_counted_as_whole() -> None:
    table, results = random_scenes(1, IDS)
    audit = audit_of(table.to_pylist(), label_rows(table, results))
    assert audit["visibility"] is None and audit["num_suppressed"] == 0 and audit["num_labels"] > 0


def test_no_labels_at_all() -> None:
    truth = rows([[box(0, 10, 2)], []])
    labels = [row | {"position": k} for k, row in enumerate(rows([[], []]))]
    audit = audit_of(truth, labels)
    assert audit["precision"] is None and audit["recall"] == 0 and audit["ap"] == 0
    assert audit["calibration"]["ece"] is None and audit["coverage"]["pixel_precision"] is None
