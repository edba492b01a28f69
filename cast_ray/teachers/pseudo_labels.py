"""From a teacher's predictions to pseudo-labels (steps 1b and 2a)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, PseudoLabel, rle_of
from cast_ray.contracts.records import mask_areas
from cast_ray.recipe import PseudoConfig
from cast_ray.teachers.fusion import group_instances


def pseudo_labels(instances: Sequence[Instance], config: PseudoConfig) -> list[PseudoLabel]:
    """The instances of one image that are trusted as labels.

    Instances above `score_threshold` and, where it is asked, of at least `mask_quality_threshold` are suppressed by
    better ones of their class (`nms_iou`) and then painted one by one, in `order` and at most `max_per_image`: with
    `non_overlapping` each keeps only the pixels that none before it took, whatever its class; one that keeps fewer than
    `min_area_px` pixels, or a smaller share of its mask than `min_visible_share`, is dropped and its pixels stay free.
    A mask predicted with several classes keeps the first of them in `order`, by score the best.

    Args:
        instances: of one image, in the order of the teacher's detector; with
            mask_quality where a threshold asks for it.
        config: the thresholds and the order.

    Returns:
        The same dicts with their masks as painted, in the order in which they were painted, each with `visible_share`,
        the part of its mask that it keeps (0..1), and `num_suppressed`, the predictions that it suppressed.

    Source: the method's labelling rule, score > .3, at most 100, non-overlapping, first wins; the released code's order
    is the detector's. Deviations: the released ADE20K painter restarts instance ids per class and then merges ids
    across classes; here each instance keeps its own.
    """
    return paint(trusted_instances(instances, config), config)


def trusted_instances(instances: Sequence[Instance], config: PseudoConfig) -> list[PseudoLabel]:
    """The instances that `pseudo_labels` paints, in the order in which it does, each with `num_suppressed`."""
    trusted = [i for i in instances if i["score"] > config.score_threshold]
    if config.mask_quality_threshold > 0:
        trusted = [i for i in trusted if i["mask_quality"] >= config.mask_quality_threshold]
    if config.order == "score":
        trusted.sort(key=lambda i: -i["score"])
    return _suppressed(trusted, config.nms_iou)


def paint(trusted: Sequence[PseudoLabel], config: PseudoConfig) -> list[PseudoLabel]:
    """The second half of `pseudo_labels`: what is left of the masks of `trusted_instances`."""
    kept: list[PseudoLabel] = []
    seen: set[bytes] = set()
    taken_HW: np.ndarray | None = None
    for instance in trusted:
        if len(kept) == config.max_per_image:
            break
        if instance["rle"] in seen:
            continue
        seen.add(instance["rle"])
        rle = rle_of(instance)
        if not config.non_overlapping:
            if mask_areas([rle])[0] >= config.min_area_px:
                kept.append({**instance, "visible_share": 1.0})
            continue
        mask_HW = coco_mask.decode(rle).astype(bool)
        if taken_HW is None:
            taken_HW = np.zeros_like(mask_HW)
        area = int(mask_HW.sum())
        mask_HW &= ~taken_HW
        visible = int(mask_HW.sum())
        if visible < max(config.min_area_px, 1) or visible < config.min_visible_share * area:
            continue
        taken_HW |= mask_HW
        painted = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
        kept.append({**instance, "rle": painted["counts"], "visible_share": visible / area})
    return kept


def _suppressed(instances: Sequence[Instance], iou_threshold: float) -> list[PseudoLabel]:
    """The instances that no better one of their class suppresses, in the given order, with `num_suppressed`."""
    if iou_threshold == 1:
        return [{**i, "num_suppressed": 0} for i in instances]
    losers = {id(group[0]): len(group) - 1 for group in group_instances(instances, iou_threshold)}
    return [{**i, "num_suppressed": losers[id(i)]} for i in instances if id(i) in losers]
