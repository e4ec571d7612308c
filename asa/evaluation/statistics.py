"""Intervals and tests over cases: bootstrap-t, resampled subjects, Wilcoxon's signed-rank test, Holm's correction."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, norm, rankdata
from scipy.stats import t as student

RESAMPLES = 10_000  # of values, for the interval of their mean
SUBJECT_RESAMPLES = 2_000  # of subjects, for the interval of any score
MOSTLY = 0.6  # of the resamples have to define a score; of two subjects half repeat one
LEVEL = 0.95
ENDS = (1 - LEVEL) / 2, (1 + LEVEL) / 2  # quantiles
ALPHA, POWER = 0.05, 0.8  # of the smallest difference that a comparison could have found
SEED = 0
MIN_RESAMPLED = 4  # values; with fewer the interval is Student's
MAX_SIDE = 2.0  # longest side of an interval, as a multiple of Student's
EXACT_UP_TO = 200  # pairs; above, the error of the normal approximation is negligible


def interval_kind(counts: Iterable[int]) -> str:
    """The kinds of interval that `bootstrap_interval` gives for samples of these sizes, in words."""
    sizes = [n for n in counts if n > 1]
    kinds = ["bootstrap-t"] if any(n >= MIN_RESAMPLED for n in sizes) or not sizes else []
    if any(n < MIN_RESAMPLED for n in sizes):
        kinds.append("Student's t" + (f" where fewer than {MIN_RESAMPLED} values are defined" if kinds else ""))
    return " or ".join(kinds)


def interval_as_json(counts: Iterable[int], unit: str = "case") -> dict[str, Any]:
    """What a JSON file says about intervals of samples of these sizes, of cases or subjects."""
    return {"kind": f"{interval_kind(counts)}, over {unit}s", "level": LEVEL, "resamples": RESAMPLES, "seed": SEED}


def means_by_subject(values: Sequence[float], subjects: Sequence[str]) -> list[float]:
    """The mean of each subject's defined values, NaN where it has none: scans of one subject are not independent."""
    own: dict[str, list[float]] = {subject: [] for subject in subjects}
    for value, subject in zip(values, subjects, strict=True):
        if not math.isnan(value):
            own[subject].append(value)
    return [sum(found) / len(found) if found else math.nan for found in own.values()]


def bootstrap_interval(values: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Bootstrap-t interval of the mean, which follows the skewness of the values.

    Quantiles of the resamples' deviations, each in the resample's own standard error, replace Student's (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5). A resample of nearly equal values has an error
    close to 0, which makes the method unstable for few or tied values: each side is at most twice Student's. Below four
    values it is Student's.

    Lower and upper end, which may lie outside the values, for finite values `(n,)`; NaN below two. `resamples` is a
    multiple of 10.
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    error, quantile = sd / math.sqrt(n), float(student.ppf((1 + LEVEL) / 2, n - 1))
    if n < MIN_RESAMPLED or sd == 0:
        return mean - quantile * error, mean + quantile * error
    scores = np.concatenate(list(_studentised(values, mean, sd, seed, resamples)))
    low, high = np.quantile(scores, ENDS)
    longest = MAX_SIDE * quantile
    return mean - min(float(high), longest) * error, mean - max(float(low), -longest) * error


def _studentised(values: np.ndarray, mean: float, sd: float, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Deviations of resampled means from the mean, in the resample's standard errors; huge where that is 0."""
    n, generator = len(values), np.random.default_rng(seed)
    for _ in range(10):  # in ten parts, to bound the memory
        drawn = values[generator.integers(n, size=(resamples // 10, n))]
        gap, own_sd = drawn.mean(axis=1) - mean, drawn.std(axis=1, ddof=1)
        flat = own_sd <= 1e-9 * sd
        yield np.where(flat, np.sign(gap) * np.finfo(np.float64).max, gap * math.sqrt(n) / np.where(flat, 1.0, own_sd))


def resample_subjects(
    scores: Callable[[np.ndarray], Mapping[str, float]], subjects: Sequence[str], side: np.ndarray | None = None
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of scores over resampled subjects, all scans of a subject together: lower and upper ends.

    They are NaN for a score that is undefined (NaN) in many resamples, and where fewer than two subjects are resampled.

    Args:
        scores: indices of the scans of a resample, some of them repeated -> its scores by name.
        subjects: of each scan, N names.
        side: bool `(N,)`; the subjects of these scans and those of the others are resampled apart.
    """
    names = np.asarray(subjects)
    sides = [np.ones(len(names), dtype=bool)] if side is None else [side, ~side]
    groups = [[np.flatnonzero(own & (names == name)) for name in np.unique(names[own])] for own in sides]
    ends = dict.fromkeys(scores(np.arange(len(names))), (math.nan, math.nan))
    if any(len(group) < 2 for group in groups):
        return ends
    generator, drawn = np.random.default_rng(SEED), []
    for _ in range(SUBJECT_RESAMPLES):
        rows = [group[k] for group in groups for k in generator.integers(len(group), size=len(group))]
        drawn.append(scores(np.concatenate(rows)))
    for name in ends:
        values = np.array([found[name] for found in drawn])
        if (defined := values[~np.isnan(values)]).size > MOSTLY * len(values):
            low, high = np.quantile(defined, ENDS).tolist()
            ends[name] = low, high
    return ends


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that paired differences `(n,)` are symmetric about 0.

    Differences of 0 are excluded, and tied ones get their mean rank. Up to 200 differences the distribution of the rank
    sum is exact, ties included; above, normal. p is at least 2 / 2^n, and 1 if no difference is left.
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
    probability = np.zeros(total + 1)  # of each rank sum, built up rank by rank
    probability[0] = 1.0
    for rank in doubled:
        probability[rank:] += probability[:-rank].copy()
        probability /= 2
    return min(1.0, 2 * float(probability[: smaller + 1].sum()))


def detectable_difference(differences: np.ndarray) -> float:
    """Smallest mean difference that a comparison of so many pairs, as variable as these, finds in 4 of 5 repeats.

    For a two-sided paired t-test at 0.05, from the noncentral t distribution (Cohen, Statistical Power Analysis, 1988);
    Wilcoxon's test has nearly the same power for differences near normal, and more where a few are large. A correction
    for several tests makes it larger. NaN below two differences.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    critical = float(student.ppf(1 - ALPHA / 2, n - 1))
    effect = brentq(lambda x: POWER - float(nct.sf(critical, n - 1, x)), 0.0, critical + 10.0)  # in standard errors
    return float(effect) * float(differences.std(ddof=1)) / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected for the number of tests (Holm, Scandinavian Journal of Statistics 1979); NaN stands for no test."""
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected = np.full(len(p), math.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return corrected.tolist()


def smallest_holm(pairs: Sequence[int]) -> float:
    """The smallest `holm` of Wilcoxon tests of so many pairs each that any differences could give, 1 at most."""
    tested = [n for n in pairs if n]
    return min(1.0, len(tested) * 2.0 ** (1 - max(tested))) if tested else 1.0


def in_interval(value: float | None, low: float | None, high: float | None, form: str = ".3f") -> str:
    """A number as text, "undefined" where it is, with the ends of its interval, if it has one."""
    if value is None or math.isnan(value):
        return "undefined"
    if low is None or high is None or math.isnan(low):
        return f"{value:{form}}"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def nullable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for JSON, with null for NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
