"""Whether the scores of new images look like those of the images that thresholds were chosen on.

A precision that was shown on some images holds for images that are drawn like them. Whether new ones are cannot be seen
from their scores alone, but where the scores differ it is clear that they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cast_ray.evaluation.matches import DetectionMatches

SIGNIFICANT = 0.01
"""Probability below which a difference of scores is called a shift."""


@dataclass(frozen=True)
class ScoreShift:
    """How two sets of images differ in their scores, see `score_shift`.

    distance: greatest difference of the two distribution functions (0..1); p_value: probability of such a distance, or
    a greater one, between two samples of one distribution; medians: of the known and of the new images.
    """

    distance: float
    p_value: float
    known_median: float
    new_median: float
    num_known: int
    num_new: int

    @property
    def is_shifted(self) -> bool:
        return self.p_value < SIGNIFICANT

    def words(self) -> str:
        """Returns what the test shows, in a sentence."""
        test = (
            f"two-sample Kolmogorov-Smirnov test of the mean score of each image, {self.num_new:,} against "
            f"{self.num_known:,} images: distance {self.distance:.2f}, p = {self.p_value:.2g}"
        )
        medians = f"median {self.new_median:.2f} against {self.known_median:.2f}"
        if not self.is_shifted:
            return f"the scores look like those of the images that the thresholds were chosen on ({medians}; {test})"
        way = "lower" if self.new_median < self.known_median else "higher"
        way = "spread differently" if abs(self.new_median - self.known_median) < 0.01 else f"{way} on the whole"
        return f"the scores are {way} than those of the images that the thresholds were chosen on ({medians}; {test})"


def score_shift(known: np.ndarray, new: Sequence[float]) -> ScoreShift | None:
    """Compares the scores of new images with those of known ones; None where either has no image.

    The unit is the image, because scores within one image are not independent.

    Args:
        known, new: one number for each image, see `image_scores`.

    Source: Kolmogorov-Smirnov, `scipy.stats.ks_2samp`.
    """
    there = np.asarray(new, dtype=float)
    if not len(known) or not len(there):
        return None
    test = stats.ks_2samp(known, there)
    medians = float(np.median(known)), float(np.median(there))
    return ScoreShift(float(test.statistic), float(test.pvalue), *medians, len(known), len(there))


def image_scores(matches: DetectionMatches) -> np.ndarray:
    """Returns the mean score of the labels of each image, 0 of an image without one: float64 [I]."""
    count = np.bincount(matches.image, minlength=matches.num_images)
    total = np.bincount(matches.image, weights=matches.score, minlength=matches.num_images)
    return total / np.maximum(count, 1)
