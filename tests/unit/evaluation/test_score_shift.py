"""Whether scores have shifted: how often alike images are called different, and that different ones are."""

from __future__ import annotations

import numpy as np
import pytest

from cast_ray.evaluation.matches import DetectionMatches
from cast_ray.evaluation.score_shift import SIGNIFICANT, image_scores, score_shift


def test_alike_images_are_seldom_called_different_and_others_always() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        shift = score_shift(rng.beta(5, 2, 60), rng.beta(5, 2, 200).tolist())
        assert shift is not None
        alarms += shift.is_shifted
    assert alarms <= 300 * SIGNIFICANT + 5
    other = score_shift(rng.beta(5, 2, 60), rng.beta(3, 4, 200).tolist())
    assert other is not None and other.is_shifted and other.words().startswith("the scores are lower on the whole than")
    better = score_shift(rng.beta(3, 4, 60), rng.beta(5, 2, 200).tolist())
    assert better is not None and "higher on the whole" in better.words()
    known = np.linspace(0.4, 0.6, 101)
    wider = score_shift(known, np.linspace(0.0, 1.0, 101).tolist())
    assert wider is not None and wider.is_shifted and "spread differently" in wider.words()
    same = score_shift(known, known.tolist())
    assert same is not None and not same.is_shifted and same.words().startswith("the scores look like those")
    assert score_shift(known[:0], [0.5]) is None and score_shift(known, []) is None


def test_the_score_of_an_image_is_the_mean_of_its_labels() -> None:
    score = np.array([0.9, 0.5, 0.4, 0.6])
    empty = np.zeros((4, 1), dtype=np.uint16)
    image = np.array([2, 0, 0, 0], dtype=np.int32)
    truth = np.zeros((4, 2, 1), dtype=np.uint16)
    matches = DetectionMatches("coco", image, np.zeros(4, dtype=np.int16), score, empty, empty, truth)
    assert image_scores(matches).tolist() == pytest.approx([0.5, 0.0, 0.9, 0.0])
