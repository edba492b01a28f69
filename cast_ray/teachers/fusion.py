"""Instances of several sources about one image as one list: class by class, by how much their masks overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import numpy as np
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, Instances, SourcedInstance, rle_of

AnyInstance = TypeVar("AnyInstance", bound=Instance)


def suppress(instances: Sequence[AnyInstance], iou_threshold: float) -> list[AnyInstance]:
    """Non-maximum suppression of masks: among masks of one class that overlap by `iou_threshold`, the one with the
    highest score stays.

    Returns:
        The instances that stay, in falling score order.
    """
    return [group[0] for group in group_instances(instances, iou_threshold)]


def vote(instances: Sequence[SourcedInstance], iou_threshold: float, num_sources: int) -> Instances:
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
    fused: Instances = []
    for group in group_instances(instances, iou_threshold):
        best: dict[int, SourcedInstance] = {}
        for instance in group:  # in falling score order
            best.setdefault(instance["source"], instance)
        members = list(best.values())
        weights = np.array([m["score"] for m in members])
        rle = members[0]["rle"]
        if len(members) > 1:
            shares = np.tensordot(
                weights / max(weights.sum(), 1e-9), coco_mask.decode([rle_of(m) for m in members]), axes=(0, 2)
            )
            rle = coco_mask.encode(np.asfortranarray(shares > 0.5, dtype=np.uint8))["counts"]
            if not (shares > 0.5).any():  # no pixel has a majority
                rle = members[0]["rle"]
        fused.append(
            {
                **without_source(members[0]),
                "rle": rle,
                "score": sum(m["score"] for m in members) / num_sources,
                "mask_quality": sum(m["mask_quality"] for m in members) / num_sources,
            }
        )
    return sorted(fused, key=lambda instance: -instance["score"])


def without_source(instance: SourcedInstance) -> Instance:
    """Returns the instance without the number of the answer that it comes from."""
    return cast(Instance, {key: value for key, value in instance.items() if key != "source"})


def group_instances(instances: Sequence[AnyInstance], iou_threshold: float) -> list[list[AnyInstance]]:
    """Groups of one class: the surest instance left and all left that overlap it by at least `iou_threshold`."""
    left = sorted(instances, key=lambda instance: -instance["score"])
    groups: list[list[AnyInstance]] = []
    by_label: dict[int, list[AnyInstance]] = {}
    for instance in left:
        by_label.setdefault(instance["label"], []).append(instance)
    for same in by_label.values():
        rles = [rle_of(instance) for instance in same]
        overlap_NN = coco_mask.iou(rles, rles, [0] * len(same))
        free = np.ones(len(same), dtype=bool)
        for n in range(len(same)):
            if free[n]:
                mine = np.flatnonzero(free & (overlap_NN[n] >= iou_threshold))
                free[mine] = False
                free[n] = False  # an empty mask overlaps nothing, not even itself
                groups.append([same[i] for i in dict.fromkeys([n, *mine.tolist()])])
    return sorted(groups, key=lambda group: -group[0]["score"])
