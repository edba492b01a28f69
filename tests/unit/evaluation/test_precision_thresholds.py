"""Thresholds that hold a precision, by simulation: as often as promised, and not by leaving everything out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from cast_ray.evaluation.matches import DetectionMatches
from cast_ray.evaluation.precision_thresholds import (
    intraclass_correlation,
    least_labels,
    lower_bound,
    precision_thresholds,
    thresholds_of_classes,
)

PRECISION, ERROR = 0.9, 0.1


@dataclass(frozen=True)
class World:
    """How images and labels arise: P(right | score s, image) = expit(base + slope (s - .3) + spread N(0, 1))."""

    base: float
    slope: float = 0.0
    spread: float = 0.0
    per_image: float = 4.0

    def draw(self, rng: np.random.Generator, num_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image, score, right of the labels of one class."""
        image = np.repeat(np.arange(num_images), rng.poisson(self.per_image, num_images))
        effect = rng.normal(0, self.spread, num_images)[image]
        score = 0.3 + 0.7 * rng.beta(1.5, 1, len(image))
        chance = 1 / (1 + np.exp(-(self.base + self.slope * (score - 0.3) + effect)))
        return image, score, rng.random(len(image)) < chance

    def precision_above(self, threshold: float) -> float:
        """Of a very large number of images; measured once."""
        return float(self._curve[1][np.searchsorted(-self._curve[0], -threshold, side="right") - 1])

    def share_above(self, threshold: float) -> float:
        """Share of all labels that reach a threshold."""
        return float(np.searchsorted(-self._curve[0], -threshold, side="right") / len(self._curve[0]))

    @property
    def _curve(self) -> tuple[np.ndarray, np.ndarray]:
        if self not in CURVES:
            _, score, right = self.draw(np.random.default_rng(99), 60_000)
            order = np.argsort(-score)
            CURVES[self] = (score[order], np.cumsum(right[order]) / np.arange(1, len(order) + 1))
        return CURVES[self]


CURVES: dict[World, tuple[np.ndarray, np.ndarray]] = {}
RISING = World(0.0, slope=6.0)
WORLDS = {
    "just below the promise at all scores": World(2.09),
    "just below, images differ": World(2.5, spread=1.0),
    "rising": RISING,
    "rising, images differ": World(0.0, slope=6.0, spread=1.0),
    "rising, images differ, many labels": World(0.0, slope=6.0, spread=1.0, per_image=12.0),
    "just below, images differ much": World(3.35, spread=2.0),
}


def matches_of(*classes: tuple[np.ndarray, np.ndarray, np.ndarray], num_images: int = 0) -> DetectionMatches:
    num_images = num_images or 1 + max((int(image.max()) for image, _, _ in classes if len(image)), default=0)
    label = np.repeat(np.arange(len(classes)), [len(image) for image, _, _ in classes]).astype(np.int16)
    image, score, right = (np.concatenate([c[i] for c in classes]) for i in range(3))
    order = np.lexsort((image, -score, label))
    matched = right[order].astype(np.uint16)[:, None]
    truth = np.ones((num_images, len(classes), 1), dtype=np.uint16)
    return DetectionMatches(
        "coco", image[order].astype(np.int32), label[order], score[order], matched, np.zeros_like(matched), truth
    )


@pytest.mark.parametrize("num_images", [20, 60, 300])
@pytest.mark.parametrize("name", WORLDS)
def test_the_promise_holds_at_least_as_often_as_promised(name: str, num_images: int) -> None:
    world, rng, draws = WORLDS[name], np.random.default_rng(num_images), 200
    broken = 0
    for _ in range(draws):
        (group,) = precision_thresholds(matches_of(world.draw(rng, num_images)), PRECISION, ERROR)
        broken += group.threshold is not None and world.precision_above(group.threshold) < PRECISION
    assert broken <= stats.binom.ppf(0.99, draws, ERROR), f"{broken} of {draws}"


@pytest.mark.parametrize("num_images, least_share", [(60, 0.4), (200, 0.65), (1000, 0.85)])
def test_it_keeps_most_of_what_could_be_kept(num_images: int, least_share: float) -> None:
    rng = np.random.default_rng(1)
    best = max(t for t in np.linspace(0.3, 1, 300) if RISING.precision_above(t) < PRECISION)
    shares = []
    for _ in range(60):
        (group,) = precision_thresholds(matches_of(RISING.draw(rng, num_images)), PRECISION, ERROR)
        shares.append(0.0 if group.threshold is None else RISING.share_above(group.threshold))
    assert np.mean(shares) >= least_share * RISING.share_above(best)


def test_a_class_that_cannot_hold_it_is_left_out_and_small_ones_share_a_threshold() -> None:
    rng = np.random.default_rng(3)
    good, bad, small = World(4.5), World(0.0), World(4.5, per_image=0.15)
    classes = [small.draw(rng, 100), good.draw(rng, 100), bad.draw(rng, 100), small.draw(rng, 100)]
    assert max(len(classes[0][0]), len(classes[3][0])) < least_labels(PRECISION, ERROR)
    image, score, is_right = (column[:0] for column in classes[0])
    groups = precision_thresholds(matches_of(*classes, (image, score, is_right)), PRECISION, ERROR)
    assert [group.labels for group in groups] == [(0, 3, 4), (1,), (2,)]
    by_class = thresholds_of_classes(groups)
    assert by_class[2] is None and by_class[0] == by_class[3] == by_class[4] is not None
    assert by_class[1] is not None and groups[1].bound >= PRECISION
    assert groups[2].num_labels == len(classes[2][0]) and groups[2].bound < PRECISION
    for group in groups[:2]:
        above = sum((classes[label][1] >= group.threshold).sum() for label in group.labels if label < 4)
        right = sum(
            classes[label][2][classes[label][1] >= group.threshold].sum() for label in group.labels if label < 4
        )
        assert (group.num_labels, group.num_right) == (above, right)


def test_more_precision_or_less_error_asks_for_a_higher_score() -> None:
    matches = matches_of(RISING.draw(np.random.default_rng(7), 400))
    by_precision = [precision_thresholds(matches, p, ERROR)[0].threshold for p in (0.8, 0.85, 0.9, 0.95)]
    assert None not in by_precision and by_precision == sorted(by_precision)  # type: ignore[type-var]
    assert precision_thresholds(matches, 0.999, ERROR)[0].threshold is None
    daring, careful = (precision_thresholds(matches, 0.9, error)[0].threshold for error in (0.3, 0.001))
    assert daring is not None and careful is not None and daring < careful


def test_labels_on_ignore_regions_and_of_equal_score_do_not_change_what_is_counted() -> None:
    image, score, right = RISING.draw(np.random.default_rng(11), 200)
    plain = matches_of((image, score, right))
    excused = matches_of((image, score, right), (image, score, np.zeros_like(right)), num_images=plain.num_images)
    excused.ignored[excused.label == 1] = 1
    assert precision_thresholds(excused, PRECISION, ERROR)[0] == precision_thresholds(plain, PRECISION, ERROR)[0]
    coarse = matches_of((image, np.ceil(score * 20) / 20, right))
    (group,) = precision_thresholds(coarse, PRECISION, ERROR)
    assert group.threshold is not None and group.num_labels == (coarse.score >= group.threshold).sum()


def test_the_bound_and_the_correlation_are_those_of_their_definitions() -> None:
    assert least_labels(0.9, 0.1) == 22 and lower_bound(22, 22, 0.1) >= 0.9 > lower_bound(21, 21, 0.1)
    for right, count in ((0, 5), (3, 9), (40, 41)):
        bound = float(lower_bound(right, count, 0.05))
        assert right == 0 or stats.binom.sf(right - 1, count, bound) == pytest.approx(0.05)
        assert right > 0 or bound == 0.0
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(2000), 5)
    assert intraclass_correlation(image, rng.random(10_000) < 0.7) < 0.03
    assert intraclass_correlation(image, np.repeat(rng.random(2000) < 0.7, 5)) == pytest.approx(1, abs=0.01)
    beta = np.repeat(rng.beta(1.5, 0.5, 2000), 5)  # of correlation 1 / (1 + 1.5 + .5)
    assert intraclass_correlation(image, rng.random(10_000) < beta) == pytest.approx(1 / 3, abs=0.04)
    for nothing_to_see in (np.ones(4, bool), np.zeros(4, bool)):
        assert intraclass_correlation(np.array([0, 0, 1, 1]), nothing_to_see) == 0.0


@pytest.mark.parametrize("precision, error", [(0.0, 0.1), (1.0, 0.1), (0.9, 0.0), (0.9, 1.5)])
def test_shares_are_between_0_and_1(precision: float, error: float) -> None:
    with pytest.raises(ValueError, match="expected numbers between 0 and 1"):
        precision_thresholds(matches_of(RISING.draw(np.random.default_rng(0), 5)), precision, error)
