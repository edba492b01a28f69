"""From ranked, matched detections to precision, recall and AP, by COCO's rules and by Cityscapes'.

Both follow the official tools to the last bit. They count by images' weights, so that a bootstrap sample costs a few
cumulative sums, and look at true positives only: between two of them precision falls, so no curve needs the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

RECALLS = np.linspace(0.0, 1.0, 101)
NUM_THRESHOLDS = 10


@dataclass(frozen=True, eq=False)
class Ranking:
    """Detections of one size range, sorted by label and falling score (see `DetectionMatches`).

    matched, ignored: uint16 [N], a bit for each IoU threshold; num_truth: uint16 [I, C].
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    num_truth: np.ndarray

    @cached_property
    def classes(self) -> list[ClassRanking]:
        bounds = np.searchsorted(self.label, np.arange(self.num_truth.shape[1] + 1))
        return [
            ClassRanking(*(column[a:b] for column in (self.image, self.score, self.matched, self.ignored)))
            for a, b in pairwise(bounds)
        ]

    def num_positives(self, image_counts: np.ndarray) -> np.ndarray:
        """Objects of each class: int64 [C]."""
        return image_counts.astype(np.int64) @ self.num_truth

    @cached_property
    def place(self) -> np.ndarray:
        """int64 [N]: how many detections of the same image and class rank higher."""
        order = np.lexsort((self.image, self.label))
        new = np.diff(self.image[order], prepend=-1) | np.diff(self.label[order], prepend=-1) != 0
        positions = np.arange(len(order))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = positions - np.maximum.accumulate(np.where(new, positions, 0))
        return place


@dataclass(frozen=True, eq=False)
class ClassRanking:
    """The detections of one class in falling score order."""

    image: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray

    @cached_property
    def hits(self) -> list[np.ndarray]:
        """Positions of the true positives at each threshold."""
        return [np.flatnonzero(self.matched & ~self.ignored & (1 << t)) for t in range(NUM_THRESHOLDS)]

    @cached_property
    def excluded(self) -> list[np.ndarray]:
        """Positions that do not count at each threshold."""
        return [np.flatnonzero(self.ignored & (1 << t)) for t in range(NUM_THRESHOLDS)]

    @cached_property
    def _follows(self) -> np.ndarray:
        """bool [n]: same image and score as the detection before."""
        return (np.diff(self.image, prepend=-1) == 0) & (np.diff(self.score, prepend=np.inf) == 0)

    @cached_property
    def order_matters(self) -> bool:
        """Whether detections of one image that tie are of different worth: then copies of it interleave."""
        here = np.flatnonzero(self._follows)
        return bool(
            (self.matched[here] != self.matched[here - 1]).any() or (self.ignored[here] != self.ignored[here - 1]).any()
        )

    def repeated(self, counts: np.ndarray) -> ClassRanking:
        """Each image `counts` times over: tied detections d1 d2 of an image become d1 d2 d1 d2, not d1 d1 d2 d2."""
        starts = np.flatnonzero(~self._follows)
        lengths = np.diff(starts, append=len(self.image))
        sizes = lengths * counts[starts]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        index = np.repeat(starts, sizes) + offsets % np.repeat(lengths, sizes)
        return ClassRanking(self.image[index], self.score[index], self.matched[index], self.ignored[index])


def coco_precision(ranking: Ranking, image_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COCO's interpolated precision at 101 recalls, and the final recall.

    Args:
        ranking: detections of one size range, ranked by class.
        image_counts: int [I], how often each image counts.

    Returns:
        precision [T, R, C] and recall [T, C]; -1 for classes without an object, as pycocotools has it.
    """
    num_positives = ranking.num_positives(image_counts)
    precision_TRC = -np.ones((NUM_THRESHOLDS, len(RECALLS), len(num_positives)))
    recall_TC = -np.ones((NUM_THRESHOLDS, len(num_positives)))
    for c, (rows, positives) in enumerate(zip(ranking.classes, num_positives)):
        if not positives:
            continue
        counts = image_counts[rows.image].astype(np.int64)
        if rows.order_matters and (counts > 1).any():
            rows = rows.repeated(counts)
            counts = np.ones(len(rows.image), dtype=np.int64)
        seen = np.cumsum(counts)
        for t in range(NUM_THRESHOLDS):
            hits, excluded = rows.hits[t], rows.excluded[t]
            true = np.cumsum(counts[hits]).astype(float)
            counted = seen[hits]
            if len(excluded):
                skipped = np.concatenate([[0], np.cumsum(counts[excluded])])
                counted = counted - skipped[np.searchsorted(excluded, hits)]
            # false + true + spacing(1) in pycocotools; the sum of two whole numbers is exact
            raw = true / (counted.astype(float) + np.spacing(1))
            envelope = np.maximum.accumulate(raw[::-1])[::-1]
            recall = true / positives
            index = np.searchsorted(recall, RECALLS, side="left")
            reached = index < len(recall)
            precision_TRC[t, :, c] = 0
            precision_TRC[t, reached, c] = envelope[index[reached]]
            recall_TC[t, c] = recall[-1] if len(recall) else 0.0
    return precision_TRC, recall_TC


def cityscapes_ap(ranking: Ranking, image_counts: np.ndarray) -> np.ndarray:
    """Cityscapes' AP: the area under the precision-recall curve through every distinct score.

    Returns:
        AP [C, T], 0..1; nan for classes without an object.
    """
    num_positives = ranking.num_positives(image_counts)
    ap_CT = np.full((len(num_positives), NUM_THRESHOLDS), np.nan)
    for c, (rows, positives) in enumerate(zip(ranking.classes, num_positives)):
        if not positives:
            continue
        counts = image_counts[rows.image].astype(np.int64)
        for t in range(NUM_THRESHOLDS):
            used = (rows.ignored & (1 << t) == 0) & (counts > 0)
            score, weight = rows.score[used], counts[used]
            last = np.flatnonzero(np.diff(score, append=-np.inf) != 0)
            true = np.cumsum(weight * (rows.matched[used] >> t & 1))[last]
            counted = np.cumsum(weight)[last]
            # Falling thresholds from right to left, then the curve's artificial first point.
            precision = np.append((true / counted)[::-1], 1.0)
            recall = np.append((true / positives)[::-1], 0.0)
            padded = np.concatenate([recall[:1], recall, [0.0]])
            ap_CT[c, t] = np.dot(precision, np.convolve(padded, [-0.5, 0, 0.5], "valid"))
    return ap_CT
