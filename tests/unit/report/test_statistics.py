"""Means, paired differences and their intervals: against hand-made images whose noise is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_scenes import ROWS, ImageScores, result, save

from cast_ray.report import statistics
from cast_ray.report.content import Report
from cast_ray.report.results import summarise
from cast_ray.report.run_folder import read_results
from cast_ray.report.statistics import Resampling, cell_of, image_counts, joint_interval, seed_interval

NUM_IMAGES = 50
Scores = dict[tuple[str, int], np.ndarray]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Scores:
    """(row, seed) -> scores of its images, read in place of `matches-student.npz`."""
    known: Scores = {}

    def load(path: Path) -> ImageScores:
        _, row, seed = path.parent.name.split("__")
        return ImageScores(known[row, int(seed[1:])])

    monkeypatch.setattr(statistics, "load_matches", load)
    return known


def run_with(tmp_path: Path, scores: Scores, **changes: Any) -> Path:
    """A run folder whose student AP is the mean score of its images."""
    results = [result(row, seed, ap=float(of.mean()), **changes) for (row, seed), of in scores.items()]
    save(tmp_path, results)
    for r in results:
        folder = tmp_path / f"losses__{r['row']}__s{r['seed']}"
        (folder / "matches-student.npz").write_bytes(f"{r['row']} {r['seed']}".encode())
    return tmp_path


def report_of(run: Path, num_replicates: int = 400) -> Report:
    return summarise(read_results(run), resampling=Resampling(run, num_replicates))


def test_images_are_drawn_as_often_as_there_are_and_always_the_same() -> None:
    counts = image_counts(30, 200)
    assert counts.shape == (200, 30) and (counts.sum(1) == 30).all() and counts.min() == 0
    np.testing.assert_array_equal(counts, image_counts(30, 200))
    assert counts.mean(0) == pytest.approx(1, abs=0.3)


def test_one_seed_gives_an_interval_of_the_images_alone(tmp_path: Path, scores: Scores) -> None:
    rng = np.random.default_rng(0)
    scores["sup", 0] = rng.normal(20, 5, NUM_IMAGES)
    scores["sup+semi", 0] = scores["sup", 0] + rng.normal(4, 3, NUM_IMAGES)
    report = report_of(run_with(tmp_path, scores), 4000)
    difference = report.differences_in("student/mask_ap")["sup+semi"]
    assert difference.interval is not None and difference.interval.resampled == "images"
    assert not difference.is_clear  # another seed might turn it round
    each = scores["sup+semi", 0] - scores["sup", 0]
    half = 1.96 * each.std() / math.sqrt(NUM_IMAGES)
    assert (difference.interval.low, difference.interval.high) == pytest.approx(
        (each.mean() - half, each.mean() + half), abs=0.12
    )
    note = next(n for n in report.notes if n.startswith("* 1 seed per row"))
    assert "resampled images alone" in note
    assert not any("Beyond" in n or "noise of the images" in n for n in report.notes)  # no verdict on a row
    own = report.rows[0].cells["student/mask_ap"].interval
    assert own is not None and own.low < scores["sup", 0].mean() < own.high


def test_pairs_see_the_same_images(tmp_path: Path, scores: Scores) -> None:
    """A constant gap on every image has no image noise, however much the images differ."""
    scores["sup", 0] = np.random.default_rng(0).uniform(0, 100, NUM_IMAGES)
    scores["sup+semi", 0] = scores["sup", 0] + 2
    interval = report_of(run_with(tmp_path, scores)).differences_in("student/mask_ap")["sup+semi"].interval
    assert interval is not None and (interval.low, interval.high) == pytest.approx((2, 2), abs=1e-4)


def test_seeds_and_images_widen_the_interval_together(tmp_path: Path, scores: Scores) -> None:
    rng = np.random.default_rng(0)
    gaps = {0: 1.0, 1: 3.0, 2: 2.0}
    for seed, gap in gaps.items():
        scores["sup", seed] = rng.normal(20, 5, NUM_IMAGES)
        scores["sup+semi", seed] = scores["sup", seed] + gap
    report = report_of(run_with(tmp_path, scores), 4000)
    quiet = report.differences_in("student/mask_ap")["sup+semi"]
    assert quiet.interval is not None and quiet.interval.resampled == "images and seeds" and quiet.num_seeds == 3
    seeds_alone = seed_interval(list(gaps.values()))
    assert seeds_alone is not None
    width = quiet.interval.high - quiet.interval.low
    assert width == pytest.approx(seeds_alone.high - seeds_alone.low, rel=0.15)
    for seed in gaps:
        scores["sup+semi", seed] += np.linspace(-25, 25, NUM_IMAGES)
    noisy = report_of(run_with(tmp_path / "b", scores), 4000).differences_in("student/mask_ap")["sup+semi"]
    assert noisy.mean == pytest.approx(quiet.mean, abs=1e-6) and noisy.interval is not None
    assert noisy.interval.high - noisy.interval.low > 1.2 * width


def test_other_images_or_missing_data_fall_back_to_seeds(tmp_path: Path, scores: Scores) -> None:
    rng = np.random.default_rng(0)
    for row in ("sup", "sup+semi"):
        for seed in range(3):
            scores[row, seed] = rng.normal(20 + 3 * (row != "sup"), 5, NUM_IMAGES)
    run = run_with(tmp_path, scores)
    (run / "losses__sup__s1" / "matches-student.npz").unlink()
    interval = report_of(run).differences_in("student/mask_ap")["sup+semi"].interval
    assert interval is not None and interval.resampled == "seeds"
    others = {"recipe": {"preset": "shapes", "scale": "demo", "evaluation": {"num_images": 25}}}
    elsewhere = [
        r.model_copy(update=others) if r.row == "sup" else r for r in read_results(run_with(tmp_path / "b", scores))
    ]
    report = summarise(elsewhere, resampling=Resampling(None, 100))
    interval = report.differences_in("student/mask_ap")["sup+semi"].interval
    assert interval is not None and interval.resampled == "seeds"


def test_replicates_are_kept_and_only_new_results_computed(
    tmp_path: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores["sup", 0] = np.arange(10.0)
    run = run_with(tmp_path, scores)
    first = Resampling(run, 50)
    report = summarise(read_results(run), resampling=first)
    first.save()
    loaded: list[Path] = []
    monkeypatch.setattr(statistics, "load_matches", lambda path: loaded.append(path) or ImageScores(np.arange(10.0)))
    again = Resampling(run, 50)
    assert summarise(read_results(run), resampling=again).rows[0].cells == report.rows[0].cells
    assert loaded == []
    (run / "losses__sup__s0" / "matches-student.npz").write_bytes(b"another evaluation")
    changed = Resampling(run, 50)
    summarise(read_results(run), resampling=changed)
    changed.save()
    assert [p.parent.name for p in loaded] == ["losses__sup__s0"]
    assert len(Resampling(run, 50).replicates) == 1  # what is no longer used goes
    (run / "replicates.npz").write_bytes(b"PK half of a file")
    assert Resampling(run, 50).replicates == {}


def test_the_final_model_is_the_refined_student(tmp_path: Path, scores: Scores) -> None:
    scores["sup", 0] = np.arange(10.0)
    run = run_with(tmp_path, scores)
    (one,) = read_results(run)
    resampling = Resampling(run, 20)
    final = one.model_copy(update={"metrics": {**one.metrics, "final/mask_ap": 4.5}})
    assert resampling.interval({0: final}, "final/mask_ap") == resampling.interval({0: one}, "student/mask_ap")


def test_images_without_objects_do_not_spoil_an_interval() -> None:
    replicates = np.array([[1.0, 2.0, np.nan, 3.0]])
    interval = joint_interval([2.0], replicates, np.random.default_rng(0))
    assert interval is not None and 1 <= interval.low < interval.high <= 3
    assert joint_interval([2.0], np.full((1, 4), np.nan), np.random.default_rng(0)) is None


def test_one_value_has_no_spread() -> None:
    assert cell_of([3.0]).sd is None and seed_interval([3.0]) is None
    assert cell_of([3.0, 5.0]).sd == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize(("image_noise", "joint_noise"), [(0.02, 0.1), (0.5, 0.3), (1.0, 0.5)])
def test_intervals_hold_the_truth_as_often_as_they_say(num_seeds: int, image_noise: float, joint_noise: float) -> None:
    """Simulated sweeps of no difference at all: seed noise 1, noise of the images, and of seeds on images."""
    rng = np.random.default_rng(num_seeds)
    counts = image_counts(60, 300) / 60
    held, held_by_images_and_drawn_seeds = 0, 0
    num_sweeps = 250
    for _ in range(num_sweeps):
        scale = math.sqrt(60)
        each_SI = (
            rng.normal(0, 1, (num_seeds, 1))
            + rng.normal(0, image_noise * scale, (1, 60))
            + rng.normal(0, joint_noise * scale, (num_seeds, 60))
        )
        values_SB = each_SI @ counts.T
        interval = joint_interval(each_SI.mean(1).tolist(), values_SB, rng)
        assert interval is not None
        held += interval.low <= 0 <= interval.high
        drawn = np.take_along_axis(values_SB.T, rng.integers(0, num_seeds, (300, num_seeds)), 1).mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        held_by_images_and_drawn_seeds += low <= 0 <= high
    assert held / num_sweeps >= 0.92
    if num_seeds == 3 and image_noise < 0.1:
        assert held_by_images_and_drawn_seeds / num_sweeps < 0.85  # why seeds are not simply drawn


def test_per_image_data_that_is_cut_costs_its_interval_alone(tmp_path: Path) -> None:
    run = save(tmp_path, [result(row) for row in ROWS[:2]])
    for row in ROWS[:2]:
        (run / f"losses__{row}__s0" / "matches-student.npz").write_bytes(b"PK\x03\x04 half of a file")
    said: list[str] = []
    report = summarise(read_results(run), resampling=Resampling(run, 10, said.append))
    assert report.rows[1].cells["student/mask_ap"].mean == 15.8
    assert len(said) == 2 and "matches-student.npz: cannot be read, so its row has no interval of images" in said[0]
