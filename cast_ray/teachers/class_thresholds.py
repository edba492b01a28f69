"""A score threshold for each class, so that pseudo-labels have the classes of the labelled images; what reaches one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Label = TypeVar("Label", bound=Mapping[str, Any])


def reaching(labels: Sequence[Label], thresholds: Mapping[int, float], class_key: str) -> list[Label]:
    """Returns the labels whose score is at least the threshold of their class; of a class without one, none.

    Args:
        thresholds: class -> least score.
        class_key: key of a label under which its class stands: `label` or `category_id`.
    """
    return [label for label in labels if label["score"] >= thresholds.get(label[class_key], np.inf)]


def balanced_thresholds(
    scores: Mapping[int, np.ndarray], labelled: Mapping[int, int], num_labelled: int, num_unlabelled: int
) -> dict[int, float]:
    """The least score of a label, for each class that the labelled images have.

    A class that has n_l instances on |D_l| labelled images is expected to have n_u = n_l |D_u| / |D_l| on D_u: its
    threshold is the n_u-th highest score of its predictions there (n_u rounded, at least 1), or 0 where it has fewer.
    One threshold for all classes would take few labels of the classes that the teacher is less sure of, and too many of
    the others.

    Args:
        scores: class -> scores of its predictions on D_u, any order.
        labelled: class -> n_l, the true instances on D_l.
        num_labelled, num_unlabelled: |D_l| and |D_u|, images.

    Returns:
        class -> threshold, of the classes in `scores`; one that D_l does not show is held to nothing (0).

    Source: Chen et al. 2022 (LabelMatch, arXiv 2206.06608), adaptive label-distribution-aware confidence thresholds.
    Deviations: once for the whole of D_u, of a frozen teacher, where theirs follow a teacher in training.
    """
    found = {}
    for label, mine in scores.items():
        wanted = round(labelled.get(label, 0) * num_unlabelled / max(num_labelled, 1))
        is_known = labelled.get(label, 0) > 0
        found[label] = float(np.sort(mine)[-max(wanted, 1)]) if is_known and len(mine) >= max(wanted, 1) else 0.0
    return found
