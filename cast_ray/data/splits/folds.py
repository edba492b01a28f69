"""Parts of the labelled images that a teacher is not trained on, so that its labels of them can be measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from cast_ray.data.splits.fractions import LabelSplit


def fold_rows(num_labelled: int, index: int, num_folds: int) -> np.ndarray:
    """Returns the places in D_l, rising, of one of its folds: every `num_folds`-th image from `index` on.

    D_l is in an order that a hash of the image ids decides, so that this is a random choice of images.
    """
    return np.arange(index, num_labelled, num_folds)


def fold_of(chosen: LabelSplit, part: dict[str, Any]) -> LabelSplit:
    """Returns the images of a stage that leaves out, or labels, a fold of D_l.

    Args:
        chosen: D_l and D_u of the row.
        part: index: 0..of-1; of: number of folds; images: `others` trains on D_l without the fold and on D_u as it is,
            `held out` takes the images of the fold as the unlabelled ones.
    """
    fold = fold_rows(len(chosen.labelled), part["index"], part["of"])
    others = np.delete(chosen.labelled, fold)
    unlabelled = chosen.labelled[fold] if part["images"] == "held out" else chosen.unlabelled
    for rows in (others, unlabelled):
        rows.setflags(write=False)
    facts = {"num_labelled": len(others), "num_unlabelled": len(unlabelled)}
    return LabelSplit(others, unlabelled, chosen.facts | facts)
