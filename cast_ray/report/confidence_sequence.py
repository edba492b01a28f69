"""Bounds of a mean difference over seeds that stay valid however often one looks, and decisions made from them.

The unit is the seed. The values of a row are its paired differences to the baseline, one for each seed: same seed, same
validation images. Images are no units: all images of a seed are measured with the same two trained models, so that more
images say more about these two models and nothing about other seeds. What is bounded is therefore the mean difference
over all seeds that could have been drawn, on this validation set.

One adds seeds until a row is decided, so that the number of seeds depends on what they showed. Intervals for a number
of seeds fixed in advance then hold far less often than they say. The bounds here are a confidence sequence: with the
stated probability they hold at all numbers of seeds together, and so at whichever number one stops.

Source: Lai, "On confidence sequences", Annals of Statistics 4 (1976); Wang and Ramdas, "Anytime-valid t-tests and
confidence sequences for Gaussian means with unknown variance" (2024, arXiv:2310.03722); Holm, "A simple sequentially
rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.special import stdtr  # scipy.stats loads twenty times as long

from cast_ray.report.content import Forecast

ERROR_RATE = 0.05
"""Greatest probability that any decision of a table is false."""
MIXTURE_VARIANCE = 25.0
"""Variance g of the effects that the bounds are made for, in units of the variance over seeds. It is a choice of power,
not of validity: with 25, effects of 2 to 10 standard deviations over seeds are decided by 3 to 10 seeds."""
MAX_FORECAST = 100
"""Most seeds that a forecast looks ahead."""
NUM_FORECASTS = 500

_LARGEST_LOG_T = 14.0

Side = Literal["above", "below", "equal", "undecided"]
_SIDES: dict[int, Side] = {0: "undecided", 1: "above", -1: "below", 2: "equal"}


@dataclass(frozen=True)
class RowDecision:
    """What the seeds of one row show. low, high: bounds of its mean difference, infinite while nothing is known.

    above, below: the mean difference is above or below 0; equal: it is within the smallest effect of interest.
    """

    side: Side
    num_seeds: int
    """Paired seeds that there are."""
    decided_at: int | None
    """Number of seeds at which it was decided."""
    low: float
    high: float
    tail: float
    """Error rate of each of the two bounds."""
    forecast: Forecast | None = None
    """How many more seeds it needs; None of a decided row, and of one without a spread over seeds."""


def log_evidence(t: np.ndarray, num_seeds: np.ndarray, variance: float = MIXTURE_VARIANCE) -> np.ndarray:
    """Logarithm of the evidence of n seeds for a mean above the assumed one, as a function of their t statistic.

    With `t = sqrt(n) (mean - assumed) / sd`, `r = 1 + n g` and `u = t^2 / (n - 1)`:

        E_n = 2 F_n(sqrt(n) c) r^(-1/2) ((1 + u) / (1 + u / r))^(n/2),   c = t sqrt(n g / r) / sqrt((n - 1) (1 + u / r))

    where F_n is the distribution function of Student's t with n degrees of freedom. E_n is the likelihood ratio of
    effects `mean / sd ~ |N(0, g)|` against no effect, both with the scale-invariant prior 1 / sd. If the assumed mean
    is the true one and seeds are Gaussian, E_n is a martingale of mean 1 whatever the sd is, so that by Ville's
    inequality `P(E_n >= 1 / a for any n) <= a`. It increases with t.
    """
    num_seeds = np.asarray(num_seeds, float)
    ratio = 1 + num_seeds * variance
    square = t * t / (num_seeds - 1)
    shrunk = 1 + square / ratio
    centre = t * np.sqrt(num_seeds * variance / ratio) / np.sqrt((num_seeds - 1) * shrunk)
    side = math.log(2) + np.log(stdtr(num_seeds, np.sqrt(num_seeds) * centre))
    return side - 0.5 * np.log(ratio) + 0.5 * num_seeds * (np.log1p(square) - np.log(shrunk))


@lru_cache(maxsize=256)
def critical_t(max_seeds: int, tail: float) -> np.ndarray:
    """The t statistic at which the evidence of 1..max_seeds seeds reaches 1 / tail; infinite where none does."""
    found = np.full(max_seeds, np.inf)
    num_seeds = np.arange(2, max_seeds + 1)
    if not num_seeds.size:
        return found
    low, high = np.full(num_seeds.size, -_LARGEST_LOG_T), np.full(num_seeds.size, _LARGEST_LOG_T)
    is_reached = log_evidence(np.exp(high), num_seeds) >= -math.log(tail)
    for _ in range(60):  # halves the range of log t to below the precision of a float
        middle = (low + high) / 2
        is_enough = log_evidence(np.exp(middle), num_seeds) >= -math.log(tail)
        low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
    found[1:] = np.where(is_reached, np.exp(high), np.inf)
    return found


def least_seeds(num_rows: int, error_rate: float = ERROR_RATE) -> int:
    """The number of seeds below which no row of a table can be decided, whatever they show.

    Args:
        num_rows: rows that are compared with the baseline.
    """
    return int(np.isfinite(critical_t(50, error_rate / (2 * num_rows))).argmax()) + 1


def bounds(values: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of the mean after each number of values, each valid at all of them with 1 - tail.

    `mean_n -+ critical_t(n) sd_n / sqrt(n)`, and the tightest of those so far. Values without any spread have no
    bounds: their sd is not known, and equal digits are no Gaussian sample.

    Args:
        values: [..., N], one for each seed in an order that does not depend on them; a row with fewer ends in nan.

    Returns:
        Two arrays [..., N].
    """
    num_seeds = np.arange(1, values.shape[-1] + 1)
    centred = values - values[..., :1]
    mean = centred.cumsum(-1) / num_seeds
    squares = (centred * centred).cumsum(-1) - num_seeds * mean * mean
    return _running_bounds(mean + values[..., :1], squares, critical_t(values.shape[-1], tail))


def _running_bounds(mean: np.ndarray, squares: np.ndarray, critical: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `bounds`; squares: sums of squared deviations from the mean, [..., N]."""
    num_seeds = np.arange(1, mean.shape[-1] + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        half = critical * np.sqrt(np.maximum(squares, 0) / (num_seeds * np.maximum(num_seeds - 1, 1)))
    is_known = np.isfinite(critical) & (squares > 0)  # false for nan, too
    low, high = np.where(is_known, mean - half, -np.inf), np.where(is_known, mean + half, np.inf)
    return np.maximum.accumulate(low, -1), np.minimum.accumulate(high, -1)


def step_down(
    values: np.ndarray, effect: float | None, error_rate: float = ERROR_RATE, num_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decides the rows of tables after each seed: Holm's step-down over the two sides of each row.

    A table of M rows has 2 M hypotheses: each row's mean is not above 0, and not below 0. Each is tested by one bound,
    at first with error rate a / (2 M). Each row found above or below 0 rejects one of them, and the others are tested
    with a / (2 M - number rejected), also on what they have shown before. A row whose bounds lie within the smallest
    effect of interest rejects none of them (its mean may be 0), so it leaves the error rate of the others as it is.

    The probability that any row is called above with a mean of 0 or less, below with one of 0 or more, or equal with
    one of at least the effect, is at most a, after however many seeds and however the rows depend on each other. For a
    first false decision is a wrong bound of a true hypothesis, and as only false hypotheses were rejected before it,
    there are at most 2 M - number rejected true ones, each of whose bounds is ever wrong with a / that number at most.

    Args:
        values: [..., rows, N], see `bounds`.
        effect: smallest effect of interest, in the units of the values; None: rows are never called equal.
        num_rows: M, where some rows have no values yet; None: that of the values.

    Returns:
        Three arrays [..., rows]: 0 undecided, 1 above, -1 below, 2 equal; the number of seeds at which it was decided
        (0: it was not); how many hypotheses were rejected before.
    """
    num_hypotheses = 2 * (num_rows or values.shape[-2])
    sides, at, rejected_before = (np.zeros(values.shape[:-1], int) for _ in range(3))
    by_rejected: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for n in range(values.shape[-1]):
        while True:  # a decision may be what decides the next row
            num_rejected = (np.abs(sides) == 1).sum(-1, keepdims=True)
            found = np.zeros_like(sides)
            for k in np.unique(num_rejected).tolist():
                if k not in by_rejected:
                    by_rejected[k] = bounds(values, error_rate / (num_hypotheses - k))
                low, high = (bound[..., n] for bound in by_rejected[k])
                found = np.where(num_rejected == k, _sides(low, high, effect), found)
            is_open = sides == 0
            rejected_before = np.where(is_open, num_rejected, rejected_before)
            is_new = is_open & (found != 0)
            if not is_new.any():
                break
            sides, at = np.where(is_new, found, sides), np.where(is_new, n + 1, at)
    return sides, at, rejected_before


def _sides(low: np.ndarray, high: np.ndarray, effect: float | None) -> np.ndarray:
    """What bounds decide: 1 above, -1 below, 2 equal within the effect, 0 nothing yet."""
    found = np.where(low > 0, 1, np.where(high < 0, -1, 0))
    return found if effect is None else np.where((found == 0) & (low > -effect) & (high < effect), 2, found)


def decide(
    differences: Mapping[str, Sequence[float]],
    effect: float | None,
    error_rate: float = ERROR_RATE,
    num_rows: int | None = None,
) -> dict[str, RowDecision]:
    """Decides the rows of one table from the paired differences that there are.

    Args:
        differences: row -> its paired differences in the order of seeds.
        effect: smallest effect of interest; None: rows are never called equal.
        num_rows: how many rows the table compares with its baseline, those included that have no seed yet; None: the
            rows given.
    """
    if not differences:
        return {}
    num_rows = num_rows or len(differences)
    table = np.full((len(differences), max(1, *(len(values) for values in differences.values()))), np.nan)
    for line, values in zip(table, differences.values()):
        line[: len(values)] = values
    sides, at, rejected = (array.tolist() for array in step_down(table, effect, error_rate, num_rows))
    found = {}
    for i, (row, values) in enumerate(differences.items()):
        tail = error_rate / (2 * num_rows - rejected[i])
        used = np.asarray(values[: at[i] or len(values)], float)
        low, high = (float(bound[-1]) for bound in bounds(used, tail)) if used.size else (-math.inf, math.inf)
        forecast = seeds_needed(values, tail, effect) if not at[i] else None
        found[row] = RowDecision(_SIDES[sides[i]], len(values), at[i] or None, low, high, tail, forecast)
    return found


def seeds_needed(
    values: Sequence[float], tail: float, effect: float | None, max_seeds: int = MAX_FORECAST
) -> Forecast | None:
    """A forecast of how many more seeds decide a row: its seeds so far, continued by simulation.

    Each of NUM_FORECASTS continuations draws a variance and a mean that agree with the values so far (the posterior of
    the prior 1 / variance: `(n - 1) sd^2 / variance ~ chi^2(n - 1)`, `mean ~ N(mean_n, variance / n)`), then seeds of
    these. So the forecast is as uncertain as the sd of few seeds is.

    Args:
        tail: error rate of each bound, as it is now.

    Returns:
        None where the values have no spread yet.
    """
    num_seeds = len(values)
    if num_seeds < 2 or num_seeds >= max_seeds or not np.ptp(values):
        return None
    draws = np.random.default_rng(0)
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    variance = (num_seeds - 1) * sd * sd / draws.chisquare(num_seeds - 1, (NUM_FORECASTS, 1))
    means = draws.normal(mean, np.sqrt(variance / num_seeds))
    future = draws.normal(means, np.sqrt(variance), (NUM_FORECASTS, max_seeds - num_seeds))
    whole = np.concatenate([np.broadcast_to(np.asarray(values, float), (NUM_FORECASTS, num_seeds)), future], -1)
    low, high = bounds(whole, tail)
    is_decided = _sides(low, high, effect) != 0
    is_decided[:, :num_seeds] = False
    more = np.where(is_decided.any(-1), is_decided.argmax(-1) + 1 - num_seeds, max_seeds)
    low_q, median, high_q = (int(q) for q in np.quantile(more, [0.1, 0.5, 0.9], method="higher"))
    known = [number if number < max_seeds else None for number in (median, low_q, high_q)]
    return Forecast(*known)
