"""Means over seeds and 95 % intervals of paired differences: same seeds, same images.

Two things vary when a row is measured again: the seed (labels that are kept, initial weights, order) and the images it
is measured on. With per-image data (`matches-<role>.npz` beside a result) both are resampled, jointly for the two rows
that are compared; without it only seeds are, by Student's t.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.special import ndtri, stdtrit  # scipy.stats loads twenty times as long

from cast_ray.common.files import replaced
from cast_ray.report.content import Cell, Interval, Result
from cast_ray.report.metrics import split_metric
from cast_ray.report.run_folder import matches_file

NUM_REPLICATES = 1000
LEVEL = 0.95
TELL_EVERY_S = 10.0
REPLICATES_FILE = "replicates.npz"


class MatchedImages(Protocol):
    """Which detections met which objects on each image of an evaluation."""

    @property
    def num_images(self) -> int: ...

    def mask_ap(self, image_counts: np.ndarray | None = None) -> float:
        """AP in percent when image i counts `image_counts[i]` times (None: once each)."""
        ...


def load_matches(path: Path) -> MatchedImages | None:
    """The per-image data of one evaluation; None where a result has none."""
    if not path.is_file():
        return None
    from cast_ray.evaluation.matches import load_matches as load

    return load(path)


def value_of(result: Result, metric: str) -> float | None:
    """A finite metric of one result."""
    value = result.measured.get(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def cell_of(values: Sequence[float], interval: Interval | None = None) -> Cell:
    """Mean and sample standard deviation over seeds."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Cell(statistics.fmean(values), sd, len(values), interval)


def joint_interval(values_S: Sequence[float], values_SB: np.ndarray, draws: np.random.Generator) -> Interval | None:
    """Percentile bootstrap over images and seeds of a mean over seeds.

    Each replicate resamples the images (the same ones for all seeds and both rows) and, by itself, the n seeds:
    `mean_s d_s* + k (mean_drawn d_s - mean_s d_s)`, with d_s of all images, d_s* of the resampled ones and
    `k = t(n-1) / z * sqrt(n / (n-1))` at 95 %. Plain resampling of seeds (k = 1) is too narrow for few of them: of
    simulated sweeps of three seeds its intervals hold the truth in 74 %, these in 95 % or more
    (tests/unit/report/test_statistics.py).

    Args:
        values_S: each seed's value, or paired difference, on all images.
        values_SB: [seeds, replicates] the same on the images of each replicate.
        draws: source of the drawn seeds.

    Returns:
        The interval, of images alone for one seed; None where no replicate has a value.

    Source: Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), on the narrowness of small samples.
    """
    num_seeds, num_replicates = values_SB.shape
    mean_B = values_SB.mean(0)
    if num_seeds > 1:
        values = np.asarray(values_S)
        drawn_B = values[draws.integers(0, num_seeds, (num_replicates, num_seeds))].mean(1)
        tail = 0.5 + LEVEL / 2
        widening = stdtrit(num_seeds - 1, tail) / ndtri(tail) * math.sqrt(num_seeds / (num_seeds - 1))
        mean_B = mean_B + widening * (drawn_B - values.mean())
    mean_B = mean_B[np.isfinite(mean_B)]  # a replicate without any object has no AP
    if not mean_B.size:
        return None
    low, high = np.quantile(mean_B, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(float(low), float(high), "images and seeds" if num_seeds > 1 else "images")


def seed_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of a mean over seeds; one value has none."""
    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, 0.5 + LEVEL / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return Interval(mean - half, mean + half, "seeds")


class Resampling:
    """APs of results on resampled images: every result of one image set sees the same draws, so pairs stay pairs.

    The draws of a finished evaluation are kept in `replicates.npz` of the run folder: a page that is rendered again
    while a sweep runs computes only what is new.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        num_replicates: int = NUM_REPLICATES,
        tell: Callable[[str], None] = lambda text: None,
    ):
        """See the class.

        Args:
            run_dir: where the draws are kept; None: nowhere.
            num_replicates: 0: images are not resampled, intervals are over seeds alone.
            tell: called with a line now and then while many evaluations are resampled.
        """
        self.tell, self.told, self.num_new = tell, time.monotonic(), 0
        self.file = Path(run_dir) / REPLICATES_FILE if run_dir is not None else None
        self.num_replicates = num_replicates
        self.replicates: dict[str, np.ndarray] = {}
        self.loaded: dict[Path, np.ndarray | None] = {}
        self.used: set[str] = set()
        if self.file is not None and self.file.is_file():
            try:
                with np.load(self.file) as stored:
                    self.replicates = {key: stored[key] for key in stored.files}
            except (OSError, ValueError, zipfile.BadZipFile):  # half of a file: computed again
                self.replicates = {}
        self.stored = set(self.replicates)

    def interval(self, results: Mapping[int, Result], metric: str) -> Interval | None:
        """Interval of the mean of a metric over seeds (seed -> result)."""
        replicates = [self._replicates(result, metric) for result in results.values()]
        values = [value_of(result, metric) for result in results.values()]
        return self._interval(replicates, [v for v in values if v is not None])

    def difference(self, row: Mapping[int, Result], baseline: Mapping[int, Result], metric: str) -> Interval | None:
        """Interval of the mean paired difference over the seeds that both have."""
        pairs, values = [], []
        for seed in sorted(row.keys() & baseline.keys()):
            ours, theirs = self._replicates(row[seed], metric), self._replicates(baseline[seed], metric)
            are_paired = ours is not None and theirs is not None and images_of(row[seed]) == images_of(baseline[seed])
            pairs.append(ours - theirs if are_paired and ours is not None and theirs is not None else None)
            a, b = value_of(row[seed], metric), value_of(baseline[seed], metric)
            if a is not None and b is not None:
                values.append(a - b)
        return self._interval(pairs, values)

    def save(self) -> None:
        """Keeps what this rendering used for the next one."""
        if self.file is not None and self.used != self.stored:
            kept = {key: self.replicates[key] for key in sorted(self.used)}
            with replaced(self.file) as partial, partial.open("wb") as file:
                np.savez(file, **kept)  # type: ignore[arg-type]
            self.stored = set(self.used)

    def _interval(self, replicates: Sequence[np.ndarray | None], values: Sequence[float]) -> Interval | None:
        known = [r for r in replicates if r is not None]
        if known and len(known) == len(replicates) == len(values):
            return joint_interval(values, np.stack(known), np.random.default_rng(1))
        return seed_interval(values)

    def _replicates(self, result: Result, metric: str) -> np.ndarray | None:
        """AP [replicates] of one result's model, or None without per-image data (AP only: other metrics have none)."""
        role, measure = split_metric(metric)
        if measure != "mask_ap" or result.folder is None or not self.num_replicates:
            return None
        # the final model is the refined student, if the row has one
        for name in (role, "refined", "student") if role == "final" else (role,):
            path = result.folder / matches_file(name)
            if path not in self.loaded:
                self.loaded[path] = self._load(path)
            if self.loaded[path] is not None:
                return self.loaded[path]
        return None

    def _load(self, path: Path) -> np.ndarray | None:
        if not path.is_file():
            return None
        key = f"{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}-{self.num_replicates}"
        if key not in self.replicates:
            try:
                matches = load_matches(path)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                self.tell(f"{path}: cannot be read, so its row has no interval of images: {error}")
                return None
            if matches is None:
                return None
            self.replicates[key] = resampled_ap(matches, self.num_replicates)
            self.num_new += 1
            if time.monotonic() - self.told > TELL_EVERY_S:
                self.told = time.monotonic()
                self.tell(f"intervals: images of {self.num_new} evaluations resampled so far")
        self.used.add(key)
        return self.replicates[key]


def image_counts(num_images: int, num_replicates: int) -> np.ndarray:
    """How often each image is drawn in each replicate: int64 [num_replicates, num_images]; the same at every call."""
    draws = np.random.default_rng(0)
    return draws.multinomial(num_images, np.full(num_images, 1 / num_images), num_replicates)


def resampled_ap(matches: MatchedImages, num_replicates: int = NUM_REPLICATES) -> np.ndarray:
    """AP on resampled images: float32 [num_replicates]; equal images have equal draws, so pairs stay pairs."""
    counts = image_counts(matches.num_images, num_replicates)
    return np.array([matches.mask_ap(count) for count in counts], np.float32)


def images_of(result: Result) -> tuple[object, ...]:
    """What tells the images that a result was measured on from others."""
    content_hash = result.dataset.content_hash if result.dataset else None
    return content_hash, result.setting("evaluation.num_images")
