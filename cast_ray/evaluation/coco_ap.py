"""COCO mask AP: the numbers of pycocotools' COCOeval, matched image by image.

The overlaps are pycocotools' own; matching and counting are done here, on arrays. hotcoco gives the same numbers, but
its matches only as a Python dict for each image, class and size, which costs more than all of this; faster-coco-eval
differs in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from cast_ray.contracts.instance import Rle
from cast_ray.contracts.records import Category, ClassMap, class_names, mask_areas
from cast_ray.evaluation.detections import (
    VOID_LABEL,
    Detections,
    Overlapping,
    ResultsByImage,
    Truth,
    overlaps_of_pairs,
    tie_order,
)
from cast_ray.evaluation.matches import NUM_THRESHOLDS, DetectionMatches, join
from cast_ray.evaluation.precision import coco_precision

AREAS = ("all", "small", "medium", "large")
AREA_RANGES = np.array([(0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2)])
"""Pixels, both ends included."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, NUM_THRESHOLDS)
IMAGES_AT_ONCE = 512

ALL_BITS = (1 << NUM_THRESHOLDS) - 1
BITS = (1 << np.arange(NUM_THRESHOLDS)).astype(np.uint16)


def mask_ap(
    ground_truth: pa.Table,
    results: Sequence[dict[str, Any]] | pa.Table,
    categories: Sequence[Category],
    max_detections: int = 100,
) -> dict[str, Any]:
    """COCO mask AP of results: precision averaged over recall, IoU thresholds .50-.95 and classes, in percent.

    Every image of `ground_truth` counts, also those without an object; detections on crowd regions are ignored.
    Detections are ranked by their `score` within each class.

    Args:
        ground_truth: RECORD_SCHEMA.
        results: COCO results: image_id and category_id as in the dataset, segmentation {"size", "counts"}, score; as
            dicts or, with less memory and time, as `coco_results.read_results` reads them from a file.
        categories: the dataset's classes.
        max_detections: counted per image and class, highest scores first.

    Returns:
        see `coco_metrics`.

    Raises:
        ValueError: a score that is not finite, an image or category id that the ground truth does not have, or a mask
            whose size is not its image's.

    Source: pycocotools' COCOeval. Deviations: none in the measure. An object without `area`, for which pycocotools
    raises, has its mask's (as in hotcoco); ids may be strings; a match with annotation 0 counts.
    """
    return coco_metrics(match_results(ground_truth, results, categories, max_detections), categories)


def match_results(
    ground_truth: pa.Table,
    results: Sequence[dict[str, Any]] | pa.Table,
    categories: Sequence[Category],
    max_detections: int = 100,
) -> DetectionMatches:
    """The matches behind `mask_ap`, with its arguments and errors."""
    found = ResultsByImage(ground_truth, results, categories)
    classes = ClassMap(categories)
    parts, rows = [], []
    for start in range(0, max(ground_truth.num_rows, 1), IMAGES_AT_ONCE):
        block = ground_truth.slice(start, IMAGES_AT_ONCE).select(["height", "width", "instances"]).to_pylist()
        truth = [Truth.of(row, classes) for row in block]
        parts.append(match_coco(truth, found[start : start + len(block)], len(classes), max_detections))
        rows.append(np.arange(start, start + len(block)))
    return join(parts, rows, tie_order(ground_truth.column("image_id").to_pylist()))


def coco_metrics(matches: DetectionMatches, categories: Sequence[Category]) -> dict[str, Any]:
    """All of COCO's measures.

    Returns:
        metric ("coco"); mask_ap, ap50, ap75, ap_small, ap_medium, ap_large: average precision; ar_1, ar_10, ar: average
        recall of the best 1, 10 and all counted detections of an image and class, ar_small, ar_medium, ar_large: of the
        sizes (all percent, None where no object to find exists); per_class, per_class_ap50 (name as in `class_names` ->
        AP, percent or None); num_images, num_detections.
    """
    counts = np.ones(matches.num_images, dtype=np.int64)
    by_area = [coco_precision(matches.ranking(a), counts) for a in range(len(AREAS))]
    order = np.argsort([c.id for c in categories], kind="stable")  # pycocotools averages in the order of the ids
    everything, recall = by_area[0][0][..., order], by_area[0][1][:, order]
    names = [class_names(categories)[k] for k in order]
    measures = {"mask_ap": everything, "ap50": everything[0], "ap75": everything[5]}
    measures |= {f"ap_{name}": p[..., order] for name, (p, _) in zip(AREAS[1:], by_area[1:])}
    measures |= {f"ar_{n}": _recall_of_best(matches, n, counts)[:, order] for n in (1, 10)} | {"ar": recall}
    measures |= {f"ar_{name}": r[:, order] for name, (_, r) in zip(AREAS[1:], by_area[1:])}
    return {
        "metric": "coco",
        **{name: _mean_percent(values) for name, values in measures.items()},
        "per_class": {name: _mean_percent(everything[..., k]) for k, name in enumerate(names)},
        "per_class_ap50": {name: _mean_percent(everything[0, :, k]) for k, name in enumerate(names)},
        "num_images": matches.num_images,
        "num_detections": len(matches.image),
    }


def match_coco(
    truth: Sequence[Truth], found: Sequence[Detections], num_classes: int, max_detections: int = 100
) -> DetectionMatches:
    """Gives each detection of a batch of images the object it takes, by COCO's rules.

    At each IoU threshold, in falling score order, a detection takes of the free objects of its class the one it
    overlaps most; of equal overlaps the last. Where it reaches none of those to be found, it takes a crowd, which stays
    free, or an object outside the size range, and is ignored; so is a detection of another size without a match.

    Args:
        truth, found: ground truth and detections of each image.
        num_classes: C.
        max_detections: kept per image and class, highest scores first.
    """
    image, label, score, rles = _best(found, max_detections)
    group = image * num_classes + label
    image_G = np.repeat(np.arange(len(truth)), [len(t.labels) for t in truth])
    label_G, crowd_G, area_G, mask_area_G = (
        np.concatenate([np.zeros(0, dtype), *(getattr(t, name) for t in truth)])
        for name, dtype in (("labels", np.int64), ("crowd", bool), ("areas", float), ("mask_areas", float))
    )
    unwanted = _outside(area_G) | crowd_G[:, None]
    here = label_G >= 0
    num_truth = np.zeros((len(truth), num_classes, len(AREAS)), dtype=np.uint16)
    np.add.at(num_truth, (image_G[here], label_G[here]), ~unwanted[here])

    areas = mask_areas(rles)
    d, g = _pairs_of(group, np.where(here, image_G * num_classes + label_G, VOID_LABEL))
    # An overlap is at most the smaller area, and what it is divided by at least the larger one, or a crowd's detection.
    divisor = np.where(crowd_G[g], areas[d], np.maximum(areas[d], mask_area_G[g]))
    possible = np.minimum(areas[d], mask_area_G[g]) >= IOU_THRESHOLDS[0] * divisor
    d, g = d[possible], g[possible]
    objects = Overlapping(image_G, label_G, list(chain.from_iterable(t.rles for t in truth)))
    iou = overlaps_of_pairs(Overlapping(image, label, rles), objects, crowd_G, d, g)
    reaches = iou >= IOU_THRESHOLDS[0]
    matched, ignored = _take(group, np.stack([d, g], axis=1)[reaches], iou[reaches], unwanted, crowd_G)
    ignored |= np.where(_outside(areas), ~matched & ALL_BITS, 0).astype(np.uint16)
    part = DetectionMatches("coco", image.astype(np.int32), label.astype(np.int16), score, matched, ignored, num_truth)
    return join([part], [np.arange(len(truth))])


def _best(found: Sequence[Detections], max_detections: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Rle]]:
    """Image, label, score and RLE of the detections that count, by image and class in falling score order."""
    image = np.repeat(np.arange(len(found)), [len(f.labels) for f in found])
    label = np.concatenate([np.zeros(0, dtype=np.int64), *(f.labels for f in found)])
    score = np.concatenate([np.zeros(0), *(f.scores for f in found)])
    order = np.lexsort((-score, label, image))
    new = np.diff(image[order], prepend=-1) | np.diff(label[order], prepend=-1) != 0
    position = np.arange(len(order))
    place = position - np.maximum.accumulate(np.where(new, position, 0))
    kept = order[place < max_detections]
    rles = list(chain.from_iterable(f.rles for f in found))
    return image[kept], label[kept], score[kept], [rles[k] for k in kept.tolist()]


def _pairs_of(group_D: np.ndarray, group_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a detection and an object of one group: int64 [P] each, by detection."""
    order = np.argsort(group_G, kind="stable")
    first, last = (np.searchsorted(group_G[order], group_D, side) for side in ("left", "right"))  # type: ignore[call-overload]
    counts = last - first
    d = np.repeat(np.arange(len(group_D)), counts)
    offset = np.arange(len(d)) - np.repeat(np.cumsum(counts) - counts, counts)
    return d, order[np.repeat(first, counts) + offset]


def _outside(pixels: np.ndarray) -> np.ndarray:
    """Whether sizes lie outside each range: bool [n, A]."""
    return (pixels[:, None] < AREA_RANGES[:, 0]) | (pixels[:, None] > AREA_RANGES[:, 1])


def _take(
    group_D: np.ndarray, pairs: np.ndarray, iou: np.ndarray, unwanted_GA: np.ndarray, crowd_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections take an object, and which of them one that does not count.

    Detections of different groups (images and classes) do not compete: the n-th ones of all groups are served at once.

    Args:
        group_D: non-decreasing; within a group detections stand in falling score order.
        pairs: int [P, 2], detection and object that overlap by at least the lowest threshold.
        iou: [P].

    Returns:
        matched, ignored: uint16 [D, A], a bit for each threshold.
    """
    shape = (len(group_D), len(AREAS))
    matched, ignored = np.zeros(shape, dtype=np.uint16), np.zeros(shape, dtype=np.uint16)
    if not len(pairs):
        return matched, ignored
    order = np.lexsort((-pairs[:, 1], -iou, pairs[:, 0]))  # the best object first, of equal ones the last
    detection, obj, iou = pairs[order, 0], pairs[order, 1], iou[order]
    competing, first = np.unique(detection, return_index=True)
    choice = np.arange(len(detection)) - np.repeat(first, np.diff(first, append=len(detection)))
    object_KP = np.full((len(competing), choice.max() + 1), -1)
    iou_KP = np.zeros(object_KP.shape)
    slot = np.searchsorted(competing, detection)
    object_KP[slot, choice], iou_KP[slot, choice] = obj, iou
    groups = group_D[competing]
    turn = np.arange(len(competing)) - np.searchsorted(groups, groups)
    free = np.ones((len(crowd_G), NUM_THRESHOLDS, len(AREAS)), dtype=bool)
    for n in range(turn.max() + 1):
        now = np.flatnonzero(turn == n)
        taken = np.full((len(now), NUM_THRESHOLDS, len(AREAS)), -1)
        for second_choice in (False, True):
            for p in range(object_KP.shape[1]):
                has = np.flatnonzero(object_KP[now, p] >= 0)
                g, reaches = object_KP[now[has], p], iou_KP[now[has], p, None] >= IOU_THRESHOLDS
                fits = reaches[:, :, None] & (unwanted_GA[g] == second_choice)[:, None] & free[g] & (taken[has] < 0)
                taken[has] = np.where(fits, g[:, None, None], taken[has])
        hit = taken >= 0
        row, t, a = np.nonzero(hit)
        g = taken[row, t, a]
        free[g, t, a] = crowd_G[g]
        useless = np.zeros_like(hit)
        useless[row, t, a] = unwanted_GA[g, a]
        matched[competing[now]] = (hit * BITS[:, None]).sum(1, dtype=np.uint16)
        ignored[competing[now]] = (useless * BITS[:, None]).sum(1, dtype=np.uint16)
    return matched, ignored


def _recall_of_best(matches: DetectionMatches, most: int, image_counts: np.ndarray) -> np.ndarray:
    """Recall [T, C] where only the best detections of each image and class count; -1 for classes without an object."""
    ranking = matches.ranking(0)
    positives = ranking.num_positives(image_counts)
    hits = ranking.matched & ~ranking.ignored & np.where(ranking.place < most, ALL_BITS, 0).astype(np.uint16)
    true_TC = np.stack([np.bincount(ranking.label[hits & bit > 0], minlength=len(positives)) for bit in BITS])
    return np.where(positives > 0, true_TC / np.maximum(positives, 1), -1.0)


def _mean_percent(values: np.ndarray) -> float | None:
    known = values[values > -1]  # -1: a class without objects in this size range
    return float(known.mean() * 100) if known.size else None
