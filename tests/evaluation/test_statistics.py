"""Coverage of intervals, error rates of tests, and the correction for multiple tests."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from asa.evaluation import statistics
from asa.evaluation.statistics import (
    MIN_RESAMPLED,
    bootstrap_interval,
    detectable_difference,
    holm,
    interval_kind,
    resample_subjects,
    wilcoxon_p,
)


def test_the_interval_of_one_value_is_undefined_and_of_equal_values_a_point():
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([0.5])))
    assert bootstrap_interval(np.full(7, 0.5)) == (0.5, 0.5)


def test_the_interval_is_equivariant_and_longer_on_the_side_of_the_tail():
    values = np.array([0.91, 0.9, 0.92, 0.89, 0.93, 0.6, 0.9, 0.88])
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high and values.mean() - low > 1.3 * (high - values.mean())
    assert bootstrap_interval(2 * values + 1) == pytest.approx((2 * low + 1, 2 * high + 1))
    assert bootstrap_interval(-values) == pytest.approx((-high, -low))


@pytest.mark.parametrize("values", [[0.9, 0.9, 0.9, 0.9, 0.5], [1.0] * 9 + [0.2], [0.9, 0.9 + 1e-12, 0.9, 0.1]])
def test_the_interval_of_tied_values_is_at_most_twice_students(values):
    values = np.array(values)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    low, high = bootstrap_interval(values)
    assert values.mean() - 2.001 * half <= low < values.mean() < high <= values.mean() + 2.001 * half


@pytest.mark.parametrize("count", [2, 3])
def test_the_interval_of_two_or_three_values_is_students(count):
    values = np.random.default_rng(0).beta(9, 2, count)
    expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert bootstrap_interval(values) == pytest.approx(expected)


def test_the_interval_equals_that_of_a_slow_bootstrap_t():
    values, generator = np.random.default_rng(1).beta(12, 2, 24), np.random.default_rng(2)
    found = []
    for _ in range(4000):
        drawn = generator.choice(values, len(values))
        found.append((drawn.mean() - values.mean()) / stats.sem(drawn))
    ends = [values.mean() - np.quantile(found, level) * stats.sem(values) for level in (0.975, 0.025)]
    assert bootstrap_interval(values) == pytest.approx(ends, abs=0.05 * (ends[1] - ends[0]))


def test_the_deviation_of_a_resample_is_in_its_own_standard_error():
    values = np.array([0.3, 0.5, 0.55, 0.9])
    found = np.concatenate(list(statistics._studentised(values, values.mean(), values.std(ddof=1), 0, 2000)))
    possible = set()
    for chosen in itertools.product(values, repeat=4):
        if len(set(chosen)) > 1:
            possible.add(round((np.mean(chosen) - values.mean()) / stats.sem(chosen), 6))
    assert {round(each, 6) for each in found if abs(each) < 1e100} <= possible


@pytest.mark.slow
@pytest.mark.parametrize("cases", [5, 6, 8, 24])
@pytest.mark.parametrize("kind", ["normal", "differences of Dice", "Dice", "skewed Dice"])
def test_95_percent_of_intervals_contain_the_true_mean(cases, kind):
    generator, repeats = np.random.default_rng(cases), 2000
    if kind == "normal":
        draws, truth = generator.normal(0.8, 0.1, (repeats, cases)), 0.8
    elif kind == "Dice":  # skewed to the left, as scores near their ceiling are
        draws, truth = generator.beta(24, 4, (repeats, cases)), 24 / 28
    elif kind == "skewed Dice":
        draws, truth = generator.beta(12, 2, (repeats, cases)), 12 / 14
    else:
        draws, truth = np.subtract(*generator.beta(12, 2, (2, repeats, cases))), 0.0
    ends = np.array([bootstrap_interval(values, k, 1000) for k, values in enumerate(draws)])
    assert np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1])) == pytest.approx(0.95, abs=0.02)


def brute_force_p(differences: np.ndarray) -> float:
    """Wilcoxon's two-sided p by trying all signs."""
    differences = differences[differences != 0]
    ranks = stats.rankdata(np.abs(differences))
    signs = np.array(list(itertools.product((0, 1), repeat=len(ranks))))
    sums = signs @ ranks
    smaller = min(ranks[differences > 0].sum(), ranks[differences < 0].sum())
    return min(1.0, 2 * float(np.mean(sums <= smaller + 1e-9)))


@pytest.mark.parametrize("seed", range(10))
def test_the_exact_p_equals_enumeration_of_all_signs_with_ties_and_zeros(seed):
    generator = np.random.default_rng(seed)
    differences = np.round(generator.normal(0.3, 1.0, 4 + seed), 0 if seed % 2 else 2)
    assert wilcoxon_p(differences) == pytest.approx(brute_force_p(differences), rel=1e-9)


@pytest.mark.parametrize("pairs", [12, 40, 300])
def test_p_equals_scipys_without_ties(pairs):
    differences = np.random.default_rng(pairs).normal(0.15, 1.0, pairs)
    method = "exact" if pairs <= statistics.EXACT_UP_TO else "approx"
    expected = stats.wilcoxon(differences, method=method, correction=False).pvalue
    assert wilcoxon_p(differences) == pytest.approx(expected, rel=1e-6)
    assert wilcoxon_p(-differences) == pytest.approx(expected, rel=1e-6)


def test_p_without_a_difference_is_1_and_of_few_pairs_never_small():
    assert wilcoxon_p(np.zeros(9)) == 1.0
    assert wilcoxon_p(np.arange(1.0, 6.0)) == 2 / 2**5
    assert wilcoxon_p(np.arange(1.0, 7.0)) == 2 / 2**6 < 0.05


@pytest.mark.parametrize("pairs", [10, 24, 60])
def test_the_false_positive_rate_is_5_percent(pairs):
    runs = np.random.default_rng(pairs).beta(12, 2, (2, 4000, pairs))  # two runs that score alike
    found = [wilcoxon_p(differences) < 0.05 for differences in runs[0] - runs[1]]
    assert np.mean(found) == pytest.approx(0.05, abs=0.02)


def test_holm_is_sequential_and_monotone_and_skips_undefined_p():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.9]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert holm([]) == []


def test_holm_controls_the_family_wise_error_rate():
    runs = np.random.default_rng(0).normal(size=(1000, 6, 20))  # six tests without a difference, a thousand times
    any_found = [min(holm([wilcoxon_p(differences) for differences in family])) < 0.05 for family in runs]
    assert np.mean(any_found) <= 0.05 + 0.02


def test_the_interval_that_is_named_is_the_one_that_is_used() -> None:
    for n in range(2, 8):
        values = np.random.default_rng(n).beta(8, 2, n)
        half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
        is_student = np.allclose(bootstrap_interval(values), (values.mean() - half, values.mean() + half))
        assert interval_kind([n]) == ("Student's t" if is_student else "bootstrap-t")
    assert interval_kind([9, 3, 1]) == f"bootstrap-t or Student's t where fewer than {MIN_RESAMPLED} values are defined"
    assert interval_kind([1, 0]) == "bootstrap-t"


# --- resampled subjects


def test_the_interval_over_subjects_equals_a_slow_bootstrap_of_them() -> None:
    rng = np.random.default_rng(3)
    subjects = [f"s{k // 2}" for k in range(60)]
    values = np.repeat(rng.normal(size=30), 2) + 0.1 * rng.normal(size=60)
    found = resample_subjects(lambda rows: {"mean": values[rows].mean(), "none": math.nan}, subjects)
    pairs = values.reshape(30, 2)
    means = [np.mean([pairs[k] for k in rng.choice(30, 30)]) for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found["mean"] == pytest.approx((low, high), abs=0.06 * (high - low))
    assert all(math.isnan(end) for end in found["none"])


def test_a_score_that_most_resamples_leave_undefined_has_no_interval() -> None:
    values = np.array([1.0, 2.0, 4.0])

    def spread(rows: np.ndarray) -> dict[str, float]:
        return {"spread": float(np.ptp(values[rows])) or np.nan, "mean": float(values[rows].mean())}

    two, three = (resample_subjects(spread, list("abc")[:n]) for n in (2, 3))
    assert np.isnan(two["spread"]).all() and two["mean"] == (1, 2)
    assert three["spread"] == (1, 3)  # undefined in one of nine


def test_the_two_sides_are_resampled_apart_and_need_two_subjects_each() -> None:
    side, subjects = np.arange(12) < 4, list("aabbccddeeff")
    seen: list[np.ndarray] = []
    resample_subjects(lambda rows: {"x": float(seen.append(rows) or 0)}, subjects, side)
    assert all(side[rows].sum() == 4 and len(rows) == 12 for rows in seen) and len(seen) > 1000
    found = resample_subjects(lambda rows: {"x": 1.0}, subjects, np.arange(12) < 2)
    assert all(math.isnan(end) for end in found["x"])


# --- smallest detectable difference


@pytest.mark.parametrize("n", [6, 12, 40])
def test_a_detectable_difference_is_found_in_four_of_five_repeats(n):
    generator = np.random.default_rng(n)
    pattern = generator.normal(size=n)
    pattern = (pattern - pattern.mean()) / pattern.std(ddof=1)  # sd 1
    difference = detectable_difference(pattern)
    assert detectable_difference(3 * pattern + 7) == pytest.approx(3 * difference)
    samples = generator.normal(difference, 1, (4000, n))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)


def test_more_pairs_and_less_variation_detect_smaller_differences():
    wide, narrow = np.array([-2.0, 2, -1, 1, 0.5, -0.5]), np.array([-0.2, 0.2, -0.1, 0.1, 0.05, -0.05])
    assert detectable_difference(np.tile(wide, 4)) < 0.5 * detectable_difference(wide)
    assert detectable_difference(narrow) == pytest.approx(detectable_difference(wide) / 10)
    assert detectable_difference(np.full(8, 0.5)) == 0 and math.isnan(detectable_difference(np.array([0.3])))
