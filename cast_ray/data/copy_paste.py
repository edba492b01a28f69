"""Copy-paste of instances: those of one sample laid over another, in both of its views."""

from __future__ import annotations

import cv2
import numpy as np

from cast_ray.contracts.soft_targets import grid_hw

Sample = dict[str, np.ndarray]
"""A sample as `views.make_sample` makes it."""

SHARE = 0.5
"""Probability of each instance of the source to be pasted."""


def copy_paste(sample: Sample, source: Sample, rng: np.random.Generator, min_visible_px: int) -> Sample:
    """The sample with some of the source's instances on top.

    Each instance of the source is taken with probability SHARE, at its place and size in the source's own random crop,
    without blending. Pasted pixels no longer belong to the sample's instances and ignore regions, and instances that
    keep fewer than `min_visible_px` pixels are dropped. In the truth maps, if these are known, pasted instances get the
    numbers after those of the sample.

    Args:
        sample, source: samples of one crop size; the source has its instances, and truth maps if the sample has them.
        rng: random numbers of this sample, independent of those of other samples.
        min_visible_px: fewest pixels that an instance of the sample must keep, not to be dropped.

    Returns:
        a new sample, or the same one where nothing is taken.

    Source: Ghiasi et al. 2021 (simple copy-paste). Deviations: the sample and the source have the crops of
    `data.scale_jitter`, which may be smaller than the paper's .1 to 2.
    """
    taken = rng.random(len(source["labels"])) < SHARE
    if not taken.any():
        return sample
    pasted = source["masks"][taken]
    over = pasted.any(0)
    left = sample["masks"] & ~over
    kept = left.sum((1, 2)) >= min_visible_px
    weak = np.where(over, source["weak"], sample["weak"])
    both_weak = sample["strong"] is sample["weak"]
    result = {
        "weak": weak,
        "strong": weak if both_weak else np.where(over, source["strong"], sample["strong"]),
        "valid": sample["valid"] | over,
        "masks": np.concatenate([left[kept], pasted]),
        "labels": np.concatenate([sample["labels"][kept], source["labels"][taken]]),
        "weights": np.concatenate([sample["weights"][kept], source["weights"][taken]]),
        "ignore": sample["ignore"] & ~over,
        "truth_instance": sample["truth_instance"].copy(),
        "truth_class": sample["truth_class"].copy(),
    }
    if (sample["truth_class"] >= 0).any():
        first = int(sample["truth_instance"].max()) + 1
        for number, (mask, label) in enumerate(zip(pasted, source["labels"][taken]), first):
            result["truth_instance"][mask], result["truth_class"][mask] = number, label
    if "mask_probs" in sample:
        rows, columns = grid_hw(over.shape)
        certain = np.eye(sample["class_probs"].shape[1], dtype=np.float32)[source["labels"][taken]]
        levels = [cv2.resize(mask * np.uint8(255), (columns, rows), interpolation=cv2.INTER_AREA) for mask in pasted]
        result["class_probs"] = np.concatenate([sample["class_probs"][kept], certain])
        result["mask_probs"] = np.concatenate([sample["mask_probs"][kept], np.stack(levels)])
    return result
