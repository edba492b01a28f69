"""How good pseudo-labels are, where the ground truth was only hidden: an audit of a labelling stage as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import ClassMap, decode_image_id, mask_areas
from cast_ray.evaluation.coco_ap import AREAS, coco_metrics, match_coco
from cast_ray.evaluation.detections import Detections, Truth, overlaps
from cast_ray.evaluation.matches import DetectionMatches, join

NUM_BINS = 10
NUM_WORST = 12
TOUCHING_IOU = 0.1
ERRORS = ("duplicate", "other class", "poor mask", "background")
"""Kinds of wrong labels. duplicate: a better label has the same object. other class: it lies on an object of another
class. poor mask: it overlaps an object with an IoU below 0.5. background: it overlaps no object."""

LEFT_OVER_SHARE = 0.5
"""A label that keeps a smaller share of its predicted mask than this is a left-over of better labels."""

_COUNTS = ("objects", "found", "labels", "wrong")
_PIXELS = ("truth", "labelled", "both")


@dataclass(frozen=True, eq=False)
class AuditPart:
    """The audit of some images: small arrays that join.

    matches: of the labels, at COCO's thresholds; positions: int64 [I], places of the images among the unlabelled ones;
    image_ids: I record ids; counts: int64 [I, 4] (objects, found, labels, wrong); pixels: float64 [I, 3] (of objects,
    of labels, of both); errors: int64 [C, 4] (see ERRORS); visibility: int64 [2, NUM_BINS], labels by the visible share
    of their mask: all that are counted, and the right ones; num_suppressed: predictions that labels suppressed.
    """

    matches: DetectionMatches
    positions: np.ndarray
    image_ids: list[str]
    counts: np.ndarray
    pixels: np.ndarray
    errors: np.ndarray
    visibility: np.ndarray
    num_suppressed: int


def audit_images(
    truth_rows: Sequence[dict[str, Any]], label_rows: Sequence[dict[str, Any]], classes: ClassMap
) -> AuditPart:
    """Compares pseudo-labels with the hidden ground truth of the same images.

    Args:
        truth_rows: records; images whose instances are null have no ground truth and are left out.
        label_rows: the records of the same images as the labelling job wrote them, with `position`; labels that say
            nothing of their `visible_share` and `num_suppressed` count in neither.
    """
    pairs = [(t, p) for t, p in zip(truth_rows, label_rows, strict=True) if t["instances"] is not None]
    truth = [Truth.of(t, classes) for t, _ in pairs]
    found = [_detections(p, classes) for _, p in pairs]
    matches = _match(truth, found, classes)
    counts = np.zeros((len(pairs), len(_COUNTS)), dtype=np.int64)
    pixels = np.zeros((len(pairs), len(_PIXELS)))
    errors = np.zeros((len(classes), len(ERRORS)), dtype=np.int64)
    visibility = np.zeros((2, NUM_BINS), dtype=np.int64)
    num_suppressed = 0
    first = np.uint16(1)  # the bit of IoU .5
    for i, (objects, labels) in enumerate(zip(truth, found)):
        mine = matches.image == i
        right, ignored = ((bits[mine, 0] & first).astype(bool) for bits in (matches.matched, matches.ignored))
        wrong = ~right & ~ignored
        order = np.lexsort((-labels.scores, labels.labels))  # that of the rows of `matches`
        kinds = _kinds_of_error(labels, objects, order[wrong])
        np.add.at(errors, (labels.labels[order[wrong]], kinds), 1)
        counts[i] = matches.num_truth[i, :, 0].sum(), (right & ~ignored).sum(), len(order), wrong.sum()
        pixels[i] = _common_pixels(objects, labels)
        instances = [instance for instance in pairs[i][1]["instances"] if not instance["is_crowd"]]
        shares = np.array([instance.get("visible_share") for instance in instances], dtype=np.float64)[order]
        for row, chosen in zip(visibility, (~ignored, right & ~ignored)):
            row += np.histogram(shares[chosen & ~np.isnan(shares)], bins=NUM_BINS, range=(0, 1))[0]
        num_suppressed += sum(instance.get("num_suppressed") or 0 for instance in instances)
    positions = np.array([p["position"] for _, p in pairs], dtype=np.int64)
    image_ids = [t["image_id"] for t, _ in pairs]
    return AuditPart(matches, positions, image_ids, counts, pixels, errors, visibility, num_suppressed)


def match_labels(
    truth_rows: Sequence[dict[str, Any]], label_rows: Sequence[dict[str, Any]], classes: ClassMap
) -> DetectionMatches:
    """Matches labels with the ground truth of their images, as an audit does; all arguments as in `audit_images`."""
    truth = [Truth.of(row, classes) for row in truth_rows]
    return _match(truth, [_detections(row, classes) for row in label_rows], classes)


def _match(truth: Sequence[Truth], found: Sequence[Detections], classes: ClassMap) -> DetectionMatches:
    """All labels count, however many an image has."""
    return match_coco(truth, found, len(classes), max_detections=max([1, *(len(f.labels) for f in found)]))


def join_audits(parts: Sequence[AuditPart]) -> AuditPart:
    """The audit of disjoint sets of images as one, by position, however they were divided; at least one part."""
    positions, counts, pixels = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("positions", "counts", "pixels")
    )
    image_ids = [i for p in parts for i in p.image_ids]
    order = np.argsort(positions)
    place = np.argsort(order)
    rows = np.split(place, np.cumsum([len(p.positions) for p in parts])[:-1])
    return AuditPart(
        join([p.matches for p in parts], rows),
        positions[order],
        [image_ids[i] for i in order],
        counts[order],
        pixels[order],
        np.sum([p.errors for p in parts], axis=0),
        np.sum([p.visibility for p in parts], axis=0),
        sum(p.num_suppressed for p in parts),
    )


def summarise_audit(part: AuditPart, classes: ClassMap) -> dict[str, Any] | None:
    """The audit as plain data; None where no image has ground truth.

    Returns:
        num_images, num_objects, num_labels, num_ignored (labels on ignore regions, which count nowhere); ap, ap50 (of
        COCO, by the labels' scores); precision, recall (at IoU .5): percent, None where nothing is counted.
        per_class (see `class_names`), by_size: name -> num_labels, num_objects, precision, recall, ap, ap50 (sizes
        without ap50).
        errors: kind -> count; errors_per_class: name -> kind -> count.
        calibration: edges of equal score bins, and in each the count, mean score and precision (0..1, None where
        empty); ece, the mean distance of the two, weighted by count (0..1).
        coverage: per image, share of objects found and of object pixels labelled: mean (percent) and histogram over the
        images with objects (10 equal bins); pixel_precision (percent of labelled pixels on objects); labels_per_image;
        images_without_label (of those with objects), images_without_object.
        visibility: edges of equal bins of the share of its mask that a label keeps after painting, and in each the
        count and the precision (0..1); left_overs: count and precision (percent) of labels that keep less than half;
        others: the same of the other labels. None where the labels do not say it.
        num_suppressed: predictions that better ones of their class suppressed before painting.
        worst: the images with most errors, wrong labels and missed objects: position, image_id, labels, wrong, missed.
    """
    if not len(part.positions):
        return None
    matches = part.matches
    numbers = coco_metrics(matches, classes.categories)
    objects, found, labels, _ = part.counts.T
    return {
        "num_images": len(part.positions),
        **_rates(matches, 0, None),
        "num_ignored": int((matches.ignored[:, 0] & 1).sum()),
        "ap": numbers["mask_ap"],
        "ap50": numbers["ap50"],
        "per_class": {
            name: _rates(matches, 0, label)
            | {"ap": numbers["per_class"][name], "ap50": numbers["per_class_ap50"][name]}
            for label, name in enumerate(classes.names())
        },
        "by_size": {
            area: _rates(matches, a, None) | {"ap": numbers[f"ap_{area}"]} for a, area in enumerate(AREAS) if a > 0
        },
        "errors": dict(zip(ERRORS, part.errors.sum(0).tolist())),
        "errors_per_class": {n: dict(zip(ERRORS, row)) for n, row in zip(classes.names(), part.errors.tolist())},
        "calibration": _calibration(matches),
        "coverage": {
            "objects": _per_image(found, objects),
            "pixels": _per_image(part.pixels[:, 2], part.pixels[:, 0]),
            "pixel_precision": _percent(part.pixels[:, 2].sum(), part.pixels[:, 1].sum()),
            "labels_per_image": float(labels.mean()),
            "images_without_label": int(((labels == 0) & (objects > 0)).sum()),
            "images_without_object": int((objects == 0).sum()),
        },
        "visibility": _visibility(part.visibility),
        "num_suppressed": part.num_suppressed,
        "worst": _worst(part),
    }


def _detections(row: dict[str, Any], classes: ClassMap) -> Detections:
    size = [row["height"], row["width"]]
    return Detections.of(
        [i | {"label": classes.label(i["category_id"]), "size": size} for i in row["instances"] if not i["is_crowd"]]
    )


def _kinds_of_error(labels: Detections, objects: Truth, wrong: np.ndarray) -> np.ndarray:
    """Index in ERRORS of each wrong label."""
    real = np.flatnonzero(~objects.crowd)
    iou_DG = overlaps(labels, objects)[np.ix_(wrong, real)]
    own_DG = labels.labels[wrong][:, None] == objects.labels[real]
    best = iou_DG.max(1, initial=0.0)
    on_own, on_other = (np.where(mask, iou_DG, 0.0).max(1, initial=0.0) >= 0.5 for mask in (own_DG, ~own_DG))
    return np.select([on_own, on_other, best >= TOUCHING_IOU], [0, 1, 2], 3)


def _common_pixels(objects: Truth, labels: Detections) -> tuple[float, float, float]:
    """Pixels of any object, of any label outside ignore regions, and of both."""
    regions = [
        [r for r, crowd in zip(objects.rles, objects.crowd) if not crowd],
        labels.rles,
        [r for r, crowd in zip(objects.rles, objects.crowd) if crowd],
    ]
    truth, labelled, ignore = (coco_mask.merge(rles) if rles else None for rles in regions)

    def area(*rles: Any) -> float:
        if any(rle is None for rle in rles):
            return 0.0
        return float(mask_areas([coco_mask.merge(list(rles), intersect=True)])[0])

    both = area(truth, labelled)
    if ignore is None or labelled is None:
        return area(truth), area(labelled), both
    # Pixels of an object that an ignore region also claims count: annotators draw crowds around objects they did mark.
    excused = area(labelled, ignore) - area(labelled, ignore, truth)
    return area(truth), area(labelled) - excused, both


def _rates(matches: DetectionMatches, area: int, label: int | None) -> dict[str, Any]:
    """Labels, objects, precision and recall at IoU .5 of a class (None: all) and size range."""
    mine = slice(None) if label is None else matches.label == label
    matched, ignored = (bits[mine, area] & 1 > 0 for bits in (matches.matched, matches.ignored))
    true, counted = int((matched & ~ignored).sum()), int((~ignored).sum())
    truth = matches.num_truth[..., area].astype(np.int64)
    objects = int(truth.sum() if label is None else truth[:, label].sum())
    rates = {"precision": _percent(true, counted), "recall": _percent(true, objects)}
    return {"num_labels": counted, "num_objects": objects, **rates}


def _calibration(matches: DetectionMatches) -> dict[str, Any]:
    counted = matches.ignored[:, 0] & 1 == 0
    score, true = matches.score[counted], (matches.matched[counted, 0] & 1).astype(float)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    bins = np.clip(np.digitize(score, edges[1:-1]), 0, NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    share = np.maximum(count, 1)
    mean_score, precision = (np.bincount(bins, v, minlength=NUM_BINS) / share for v in (score, true))
    ece = float((count * np.abs(mean_score - precision)).sum() / count.sum()) if count.sum() else None
    return {
        "edges": edges.round(6).tolist(),
        "count": count.tolist(),
        "score": [float(v) if n else None for v, n in zip(mean_score, count)],
        "precision": [float(v) if n else None for v, n in zip(precision, count)],
        "ece": ece,
    }


def _visibility(visibility: np.ndarray) -> dict[str, Any] | None:
    count, right = visibility
    if not count.sum():
        return None
    half = round(LEFT_OVER_SHARE * NUM_BINS)
    return {
        "edges": np.linspace(0, 1, NUM_BINS + 1).round(6).tolist(),
        "count": count.tolist(),
        "precision": [float(r / n) if n else None for n, r in zip(count, right)],
        **{
            name: {"num_labels": int(count[bins].sum()), "precision": _percent(right[bins].sum(), count[bins].sum())}
            for name, bins in (("left_overs", slice(half)), ("others", slice(half, None)))
        },
    }


def _per_image(part: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """Mean and histogram of a share over the images where it is defined."""
    shares = part[whole > 0] / whole[whole > 0]
    histogram, _ = np.histogram(shares, bins=NUM_BINS, range=(0, 1))
    return {"mean": float(shares.mean() * 100) if len(shares) else None, "histogram": histogram.tolist()}


def _worst(part: AuditPart) -> list[dict[str, Any]]:
    objects, found, labels, wrong = part.counts.T
    errors = wrong + objects - found
    order = np.lexsort((part.positions, -errors))[:NUM_WORST]
    return [
        {
            "position": int(part.positions[i]),
            "image_id": decode_image_id(part.image_ids[i]),
            "labels": int(labels[i]),
            "wrong": int(wrong[i]),
            "missed": int(objects[i] - found[i]),
        }
        for i in order
        if errors[i]
    ]


def _percent(part: float, whole: float) -> float | None:
    return float(100 * part / whole) if whole else None
