"""Intervals and tests over cases: bootstrap, Wilcoxon's signed ranks, Holm's correction."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import norm, rankdata
from scipy.stats import t as student

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
FEWEST_RESAMPLED = 4  # values
LONGEST_SIDE = 2.0  # of an interval, in those of Student's
EXACT_UP_TO = 200  # pairs; beyond it the normal approximation has no error that matters


def bootstrap_interval(values: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Interval of the mean: bootstrap-t, which follows the skewness of the values.

    Each resample's mean is brought to its own standard error, and the quantiles of that take the place of Student's
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5). Scores near their ceiling are skewed:
    their interval reaches further down than up. A resample of nearly equal values has next to no standard error, which
    makes the method unstable for few or tied values; each side is therefore at most twice as long as Student's.
    Below four values, where there is too little to resample, the interval is Student's.

    Args:
        values: `(n,)`, finite.
        seed: of the resamples.
        resamples: number of resamples, a multiple of 10.

    Returns:
        The lower and upper end, which may lie outside the values; NaN below two values.
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    error, quantile = sd / math.sqrt(n), float(student.ppf((1 + LEVEL) / 2, n - 1))
    if n < FEWEST_RESAMPLED or sd == 0:
        return mean - quantile * error, mean + quantile * error
    scores = np.concatenate(list(_studentised(values, mean, sd, seed, resamples)))
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    longest = LONGEST_SIDE * quantile
    return mean - min(float(high), longest) * error, mean - max(float(low), -longest) * error


def _studentised(values: np.ndarray, mean: float, sd: float, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Distances of resampled means from the mean, in the resample's standard errors; huge without any."""
    n, generator = len(values), np.random.default_rng(seed)
    for _ in range(10):  # bounds the memory of the draws
        drawn = values[generator.integers(n, size=(resamples // 10, n))]
        gap, spread = drawn.mean(axis=1) - mean, drawn.std(axis=1, ddof=1)
        flat = spread <= 1e-9 * sd
        yield np.where(flat, np.sign(gap) * np.finfo(np.float64).max, gap * math.sqrt(n) / np.where(flat, 1.0, spread))


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that paired differences are symmetric about 0.

    Differences of 0 are left out and equal ones share their mean rank. Up to 200 differences the distribution of the
    rank sum over all signs is exact, with these ties; beyond it is normal.

    Args:
        differences: `(n,)`, finite.

    Returns:
        p; 1 if no difference is left, and never below 2 / 2^n.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    doubled = np.rint(2 * rankdata(np.abs(differences))).astype(np.int64)  # mean ranks of ties are halves
    total = int(doubled.sum())
    smaller = min(int(doubled[differences > 0].sum()), int(doubled[differences < 0].sum()))
    if len(doubled) > EXACT_UP_TO:
        z = (smaller - total / 2) / (math.sqrt(float(np.square(doubled).sum())) / 2)
        return min(1.0, 2 * float(norm.cdf(z)))
    chance = np.zeros(total + 1)  # of each rank sum, one rank after the other
    chance[0] = 1.0
    for rank in doubled:
        chance[rank:] += chance[:-rank].copy()
        chance /= 2
    return min(1.0, 2 * float(chance[: smaller + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected for the number of tests, so that any false finding among them has at most the level's chance.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.

    Args:
        p_values: of a family of tests; NaN where there was no test, which counts for nothing.

    Returns:
        Corrected p in the same order, NaN where there was no test.
    """
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected = np.full(len(p), math.nan)
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected.tolist()
