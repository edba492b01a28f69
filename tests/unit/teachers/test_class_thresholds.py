"""Thresholds by class against counting, and where the recipe allows them."""

from __future__ import annotations

import numpy as np
import pytest

from cast_ray.plan.graph import plan
from cast_ray.recipe import build_recipe
from cast_ray.teachers.class_thresholds import balanced_thresholds


@pytest.mark.parametrize("seed", range(4))
def test_every_class_keeps_as_many_an_image_as_the_labelled_images_have(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {c: rng.permutation(np.linspace(0.1, 0.5 + 0.1 * c, 60 + 10 * c)) for c in range(4)}
    labelled = {0: 5, 1: 12, 2: 1, 3: 40}
    found = balanced_thresholds(scores, labelled, num_labelled=10, num_unlabelled=40)
    kept = {c: int((mine >= found[c]).sum()) for c, mine in scores.items()}
    assert kept == {0: 20, 1: 48, 2: 4, 3: 90}  # of the last there are fewer than the 160 expected: all
    assert found[3] == 0.0


def test_a_class_that_no_labelled_image_shows_is_held_to_nothing_and_a_rare_one_keeps_its_best() -> None:
    scores = {7: np.array([0.4, 0.9]), 8: np.array([0.3, 0.8, 0.6])}
    assert balanced_thresholds(scores, {8: 1}, num_labelled=100, num_unlabelled=20) == {7: 0.0, 8: 0.8}
    assert balanced_thresholds({}, {8: 1}, num_labelled=1, num_unlabelled=1) == {}


def test_they_are_another_label_stage_and_offline_only() -> None:
    fixed, balanced = (
        plan(build_recipe("shapes", "smoke", {"pseudo.class_thresholds": kind}), "h").roles["label-teacher"]
        for kind in ("fixed", "balanced")
    )
    default = plan(build_recipe("shapes", "smoke"), "h").roles["label-teacher"]
    assert fixed.fingerprint == default.fingerprint != balanced.fingerprint
    with pytest.raises(ValueError, match=r"pseudo\.class_thresholds is balanced and labels\.mode online"):
        build_recipe("shapes", "smoke", {"pseudo.class_thresholds": "balanced", "labels.mode": "online"})
