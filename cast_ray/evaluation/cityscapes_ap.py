"""Cityscapes' own instance AP: the numbers of cityscapesScripts' evalInstanceLevelSemanticLabeling.

It is another number than COCO's mask AP, on the same predictions: see `match_cityscapes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cast_ray.contracts.records import Category, class_names, mask_areas
from cast_ray.evaluation.detections import VOID_LABEL, Detections, Truth, intersections
from cast_ray.evaluation.matches import NUM_THRESHOLDS, DetectionMatches, join
from cast_ray.evaluation.precision import cityscapes_ap

OVERLAPS = np.arange(0.5, 1.0, 0.05)
"""As the official tool has them; an overlap must be larger."""
MIN_REGION_PX = 100


def match_cityscapes(truth: Sequence[Truth], found: Sequence[Detections], num_classes: int) -> DetectionMatches:
    """Tells true, false and ignored detections of a batch of images apart, by Cityscapes' rules.

    At each overlap threshold an object of at least 100 pixels is found by the detection of its class with the highest
    score among those that overlap it by more; the others of those are wrong. A detection that overlaps a smaller object
    or a group (ignore region of its class) by more is ignored, and so is one without any object whose share of pixels
    in groups, smaller objects and void lies above the threshold. Unlike COCO's, detections do not compete for objects,
    their number is not limited, objects have no size classes, and equal scores are one point of the curve.

    Args:
        truth, found: ground truth and detections of each image. Ignore regions of no class are void; empty
            detections are left out.
        num_classes: C.

    Source: cityscapesScripts 2.2.4, without its distances. Deviations: none in the measure; quirks of the tool kept: a
    group of less than 100 pixels counts twice among the ignored pixels.
    """
    image, label, score, matched, ignored = [], [], [], [], []
    num_truth = np.zeros((len(truth), num_classes, 1), dtype=np.uint16)
    for i, (objects, detections) in enumerate(zip(truth, found, strict=True)):
        pixels = mask_areas(detections.rles)
        kept = np.lexsort((-detections.scores, detections.labels))
        kept = kept[pixels[kept] > 0]
        ranked = Detections(detections.labels[kept], detections.scores[kept], [detections.rles[k] for k in kept])
        valid = ~objects.crowd & (objects.mask_areas >= MIN_REGION_PX)
        np.add.at(num_truth[i, :, 0], objects.labels[valid], 1)
        hits, skipped = _judge(ranked, pixels[kept], objects, valid)
        image.append(np.full(len(kept), i, dtype=np.int32))
        label.append(ranked.labels)
        score.append(ranked.scores)
        matched.append(hits)
        ignored.append(skipped)
    part = DetectionMatches(
        "cityscapes",
        np.concatenate([np.zeros(0, dtype=np.int32), *image]),
        np.concatenate([np.zeros(0, dtype=np.int64), *label]).astype(np.int16),
        np.concatenate([np.zeros(0), *score]),
        np.concatenate([np.zeros(0, dtype=np.uint16), *matched])[:, None],
        np.concatenate([np.zeros(0, dtype=np.uint16), *ignored])[:, None],
        num_truth,
    )
    return join([part], [np.arange(len(truth))])


def _judge(
    detections: Detections, pixels_D: np.ndarray, objects: Truth, valid_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """matched, ignored: uint16 [D], a bit for each threshold; detections in falling score order."""
    matched, ignored = np.zeros(len(pixels_D), dtype=np.uint16), np.zeros(len(pixels_D), dtype=np.uint16)
    if not len(pixels_D):
        return matched, ignored
    common_DG = intersections(detections, pixels_D, objects.rles)
    own_DG = detections.labels[:, None] == objects.labels
    void = objects.labels == VOID_LABEL
    overlap_DG = np.where(own_DG, common_DG / (pixels_D[:, None] + objects.mask_areas - common_DG), 0.0)
    small, groups = objects.mask_areas < MIN_REGION_PX, objects.crowd & ~void
    weight_DG = np.where(own_DG, small.astype(int) + groups, 0) + void
    ignorable_D = (common_DG * weight_DG).sum(1) / pixels_D
    for t, threshold in enumerate(OVERLAPS):
        over_DG = overlap_DG > threshold
        # Objects do not overlap, so a detection has at most one; the first in score order is the one that finds it.
        finds_DG = over_DG & valid_G
        first = finds_DG.argmax(0)[finds_DG.any(0)]
        matched[first] |= np.uint16(1 << t)
        hopeless = (over_DG & ~valid_G).any(1) & ~finds_DG.any(1)
        excused = ~over_DG.any(1) & (ignorable_D > threshold)
        ignored[hopeless | excused] |= np.uint16(1 << t)
    return matched, ignored


def cityscapes_metrics(matches: DetectionMatches, categories: Sequence[Category]) -> dict[str, Any]:
    """The tool's averages over all distances.

    Returns:
        metric ("cityscapes"); mask_ap, ap50 (percent, None where no object to find exists); per_class, per_class_ap50
        (name as in `class_names` -> percent or None); num_images, num_detections.
    """
    ap_CT = cityscapes_ap(matches.ranking(0), np.ones(matches.num_images, dtype=np.int64))
    assert ap_CT.shape[1] == NUM_THRESHOLDS
    return {
        "metric": "cityscapes",
        "mask_ap": _mean_percent(ap_CT),
        "ap50": _mean_percent(ap_CT[:, 0]),
        "per_class": {name: _mean_percent(ap_T) for name, ap_T in zip(class_names(categories), ap_CT)},
        "per_class_ap50": {name: _mean_percent(ap_T[:1]) for name, ap_T in zip(class_names(categories), ap_CT)},
        "num_images": matches.num_images,
        "num_detections": len(matches.image),
    }


def _mean_percent(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]  # nan: a class without objects
    return float(known.mean() * 100) if known.size else None
