"""Score thresholds that hold a precision: chosen on labelled images, with a confidence bound for the images to come.

What is promised: of all labels of a class (or of a group of small classes) whose score reaches its threshold, on
images drawn like the labelled ones, at least the share `precision` is right at mask IoU 0.5. The promise of each class
or group holds with probability `1 - error` over the draw of the labelled images. It is not one promise for all classes
together.

How it is kept: labels are ranked by score. Each of a few thresholds is tested by the lower Clopper-Pearson bound of
the share of right labels above it. The thresholds are tested from high to low, so that a lower one is only accepted
below an unbroken row of accepted ones; the rows begin at a few places that only depend on how many labels there are,
and share the error rate. The lowest accepted threshold is chosen.

Labels of one image are not independent: one blurred image has many wrong ones. Images are the units that were drawn.
The bound therefore counts `n / (1 + (m - 1) r)` labels instead of n, where m is the size of the image in which an
average label lies and r the intraclass correlation of being right within images. r is estimated on all labels and is
the one assumption here: that it is not larger at high scores than over all scores. Nothing is assumed of scores.

Source: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test: calibrating predictive algorithms to achieve
risk control" (2021, arXiv:2110.01052), fixed sequence testing with several starts; Clopper and Pearson, Biometrika 26
(1934); Kish, "Survey sampling" (1965), design effect; Korn and Graubard, Survey Methodology 24 (1998), Clopper-Pearson
bounds with the effective sample size. Deviations: Korn and Graubard also correct for the number of clusters by
quantiles of t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import betaincinv

from cast_ray.evaluation.matches import DetectionMatches

GROWTH = 1.1
"""Ratio between the numbers of labels above two neighbouring thresholds."""


@dataclass(frozen=True)
class GroupThreshold:
    """The threshold of one class, or of several small classes together.

    labels: the classes, 0..C-1; threshold: least score of a label, None where no threshold holds the precision.
    num_labels, num_right: calibration labels that reach it and those of them that are right, of all scores where there
    is no threshold; bound: lower confidence bound of their precision (0..1), at the error rate that one row of tests
    has; num_images: images that have a label of the group at any score.
    """

    labels: tuple[int, ...]
    threshold: float | None
    num_labels: int
    num_right: int
    bound: float
    num_images: int


@dataclass(frozen=True, eq=False)
class _Scored:
    """Labels in falling score order: image int64 [N], score float64 [N], right bool [N]."""

    image: np.ndarray
    score: np.ndarray
    right: np.ndarray


def precision_thresholds(matches: DetectionMatches, precision: float, error: float) -> list[GroupThreshold]:
    """Chooses the lowest score threshold of every class that holds a precision.

    Classes with so few labels that even without one wrong label no bound would reach the precision are taken together
    and have one threshold, whose promise is about all of them together. Which these are depends on numbers of labels
    alone, so that the choice does not weaken the promise.

    Args:
        matches: labels of labelled images by a teacher that has not been trained on these images, of all scores that a
            label may have. Labels on ignore regions count neither as right nor as wrong.
        precision: share of right labels to hold at mask IoU 0.5, between 0 and 1.
        error: probability that the precision of a class, or group of small classes, is lower all the same.

    Returns:
        Every class in exactly one group, in the order of the first class of each group; classes without a label too.
    """
    if not 0 < precision < 1 or not 0 < error < 1:
        raise ValueError(f"precision is {precision} and error {error}: expected numbers between 0 and 1")
    counted = (matches.ignored[:, 0] & 1) == 0
    label, right = matches.label[counted], (matches.matched[counted, 0] & 1).astype(bool)
    image, score = matches.image[counted].astype(np.int64), matches.score[counted]
    numbers = np.bincount(label, minlength=matches.num_classes)
    is_small = numbers < least_labels(precision, error)
    groups: list[tuple[int, ...]] = [(int(c),) for c in np.flatnonzero(~is_small)]
    if is_small.any():
        groups.append(tuple(int(c) for c in np.flatnonzero(is_small)))
    overall = intraclass_correlation(image, right)
    found = []
    for group in sorted(groups):
        mine = np.flatnonzero(np.isin(label, group))
        mine = mine[np.argsort(-score[mine], kind="stable")]
        scored = _Scored(image[mine], score[mine], right[mine])
        correlation = max(overall, intraclass_correlation(scored.image, scored.right))
        found.append(_lowest_threshold(group, scored, correlation, precision, error))
    return found


def least_labels(precision: float, error: float) -> int:
    """Returns how many labels, all of them right and in different images, a precision needs: log(error) / log(p)."""
    return int(np.ceil(np.log(error) / np.log(precision) - 1e-9))


def lower_bound(num_right: np.ndarray | int, num_labels: np.ndarray | int, error: float) -> np.ndarray:
    """Returns the lower one-sided Clopper-Pearson bound of a share, the `error` quantile of Beta(right, wrong + 1).

    Numbers need not be whole, so that they can be divided by a design effect.
    """
    right, count = np.asarray(num_right, float), np.asarray(num_labels, float)
    return np.where(right > 0, betaincinv(np.maximum(right, 1e-12), np.maximum(count - right, 0.0) + 1, error), 0.0)


def intraclass_correlation(image: np.ndarray, right: np.ndarray) -> float:
    """Returns how alike labels of one image are in being right, between 0 (independent) and 1 (all equal).

    With n_i labels of image i, r_i of them right, p their share and m = sum n_i^2 / sum n_i:

        deff = I / (I - 1) sum (r_i - p n_i)^2 / (sum n_i  p (1 - p)),    r = (deff - 1) / (m - 1)

    It is 0 where no image has two labels, or all labels are right or all wrong: there is nothing to estimate it from.

    Args:
        image: int [N], image of each label.
        right: bool [N].
    """
    _, place = np.unique(image, return_inverse=True)
    size = np.bincount(place).astype(float)
    num_right = np.bincount(place, weights=right, minlength=len(size))
    total = size.sum()
    share = num_right.sum() / max(total, 1)
    mean_size = (size * size).sum() / max(total, 1)
    if share in (0, 1) or len(size) < 2 or mean_size <= 1:
        return 0.0
    spread = len(size) / (len(size) - 1) * ((num_right - share * size) ** 2).sum()
    design_effect = spread / (total * share * (1 - share))
    return float(np.clip((design_effect - 1) / (mean_size - 1), 0, 1))


def _lowest_threshold(
    group: tuple[int, ...], scored: _Scored, correlation: float, precision: float, error: float
) -> GroupThreshold:
    starts, ranks = _ranks(scored.score, precision, error)
    num_images = len(np.unique(scored.image))
    everything = GroupThreshold(group, None, len(scored.score), int(scored.right.sum()), 0.0, num_images)
    if not len(ranks):
        return everything
    num_right = np.cumsum(scored.right)[ranks - 1]
    effect = 1 + (_mean_image_sizes(scored.image, ranks) - 1) * correlation
    bound = lower_bound(num_right / effect, ranks / effect, error / len(starts))
    is_held = bound >= precision
    chosen = -1
    for start in starts:
        place = int(start)
        while place < len(ranks) and is_held[place]:
            chosen = max(chosen, place)
            place += 1
    if chosen < 0:
        return replace(everything, bound=float(bound[-1]))
    threshold = float(scored.score[ranks[chosen] - 1])
    return GroupThreshold(
        group, threshold, int(ranks[chosen]), int(num_right[chosen]), float(bound[chosen]), num_images
    )


def _ranks(score: np.ndarray, precision: float, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of labels above the thresholds that are tested, rising, and the places among them where rows begin.

    Both depend on scores alone, never on what is right. Rows begin at all labels and at the best half, quarter, ... of
    them, as long as that many labels could pass. Labels of equal score are above a threshold together.
    """
    total = len(score)
    num_starts = 0
    while total / 2**num_starts >= least_labels(precision, error / (num_starts + 1)):
        num_starts += 1
    if not num_starts:
        return np.array([], dtype=int), np.array([], dtype=int)
    begin = [max(1, round(total / 2**k)) for k in range(num_starts)]
    wanted = set(begin)
    number = float(min(begin))
    while number < total:
        wanted.add(round(number))
        number = max(number + 1, number * GROWTH)
    ties = np.searchsorted(-score, -score[np.array(sorted(wanted)) - 1], side="right")
    ranks = np.unique(ties)
    starts = np.unique(np.searchsorted(ranks, np.searchsorted(-score, -score[np.array(begin) - 1], side="right")))
    return starts, ranks


def _mean_image_sizes(image: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Labels in the image of an average label, among the best n labels for each n in `ranks`: float64 [len(ranks)]."""
    order = np.argsort(image, kind="stable")
    first = np.flatnonzero(np.diff(image[order], prepend=-1))
    sizes = np.diff(np.append(first, len(image)))
    place = np.empty(len(image), dtype=np.int64)  # how many labels of the same image rank higher
    place[order] = np.arange(len(image)) - np.repeat(first, sizes)
    squares = np.cumsum(2 * place + 1)  # (k + 1)^2 - k^2
    return squares[ranks - 1] / ranks


def thresholds_of_classes(groups: Sequence[GroupThreshold]) -> dict[int, float | None]:
    """Returns class -> least score of a label, None where the class is left unlabelled."""
    return {label: group.threshold for group in groups for label in group.labels}
