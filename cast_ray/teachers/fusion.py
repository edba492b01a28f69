"""Instances of several sources about one image as one list: class by class, by how much their masks overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from cast_ray.teachers.protocol import Instances


def suppress(instances: Instances, iou_threshold: float) -> Instances:
    """Non-maximum suppression of masks: of those of one class that overlap by `iou_threshold` the surest stays.

    Returns:
        The instances that stay, in falling score order.
    """
    return [group[0] for group in group_instances(instances, iou_threshold)]


def vote(instances: Instances, iou_threshold: float, num_sources: int) -> Instances:
    """One instance for each group of overlapping masks of one class, as the sources agree.

    The mask holds the pixels that more than half of the group's score finds inside; score and mask quality are sums
    over the group, each source at most once, divided by `num_sources`: what one source alone sees counts for less.

    Args:
        instances: of one image, each with `source` (0..num_sources-1).
        iou_threshold: see `group_instances`.
        num_sources: that looked at the image.

    Returns:
        In falling score order, without `source`.
    """
    fused = []
    for group in group_instances(instances, iou_threshold):
        best: dict[int, dict[str, Any]] = {}
        for instance in group:  # in falling score order
            best.setdefault(instance["source"], instance)
        members = list(best.values())
        weights = np.array([m["score"] for m in members])
        rle = members[0]["rle"]
        if len(members) > 1:
            shares = np.tensordot(weights / max(weights.sum(), 1e-9), coco_mask.decode(_rles(members)), axes=(0, 2))
            rle = coco_mask.encode(np.asfortranarray(shares > 0.5, dtype=np.uint8))["counts"]
            if not (shares > 0.5).any():  # no pixel has a majority
                rle = members[0]["rle"]
        mean = {k: sum(m[k] for m in members) / num_sources for k in ("score", "mask_quality")}
        first = {k: v for k, v in members[0].items() if k != "source"}
        fused.append({**first, "rle": rle, **mean})
    return sorted(fused, key=lambda instance: -instance["score"])


def group_instances(instances: Instances, iou_threshold: float) -> list[Instances]:
    """Groups of one class: the surest instance left and all left that overlap it by at least `iou_threshold`."""
    left = sorted(instances, key=lambda instance: -instance["score"])
    groups: list[Instances] = []
    by_label: dict[int, Instances] = {}
    for instance in left:
        by_label.setdefault(instance["label"], []).append(instance)
    for same in by_label.values():
        overlap_NN = coco_mask.iou(_rles(same), _rles(same), [0] * len(same))
        free = np.ones(len(same), dtype=bool)
        for n in range(len(same)):
            if free[n]:
                mine = np.flatnonzero(free & (overlap_NN[n] >= iou_threshold))
                free[mine] = False
                free[n] = False  # an empty mask overlaps nothing, not even itself
                groups.append([same[i] for i in dict.fromkeys([n, *mine.tolist()])])
    return sorted(groups, key=lambda group: -group[0]["score"])


def _rles(instances: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"size": list(i["size"]), "counts": i["rle"]} for i in instances]
