"""Coverage of the intervals and false positives of the test on simulated scores, the tables of docs/evaluation.md.

python -m scripts.reproduce.intervals
"""

import numpy as np

from asa.evaluation.statistics import bootstrap_interval, wilcoxon_p

SAMPLES, TESTS, RESAMPLES = 3000, 4000, 2000
FAILING_MEAN = 0.1 * 0.5 + 0.9 * 30 / 34


def intervals_that_hold(values: np.ndarray, mean: float, plain: bool = False) -> np.ndarray:
    """For each sample of `(samples, cases)`, whether its 95 % interval (bootstrap-t or percentile) holds the mean."""
    held = np.zeros(len(values), bool)
    for seed, sample in enumerate(values):
        if plain:
            draws = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
            low, high = np.quantile(sample[draws].mean(axis=1), [0.025, 0.975])
        else:
            low, high = bootstrap_interval(sample, seed, RESAMPLES)
        held[seed] = low <= mean <= high
    return held


def draw_failing(generator: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores with one failure around 0.5 in ten, and which are failures; their mean is `FAILING_MEAN`."""
    fails = generator.random(size) < 0.1
    return np.where(fails, generator.beta(4, 4, size), generator.beta(30, 4, size)), fails


def print_coverage() -> None:
    """Print the coverage of the intervals and the false positives of the test by distribution of the scores."""
    heads = ["cases", "normal scores", "differences of Dice", "Dice near its ceiling", "skewed Dice", "1 in 10 fails"]
    print(f"| {' | '.join([*heads, 'plain, normal', 'false findings'])} |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for cases in (5, 6, 8, 12, 24, 60):
        generator, size = np.random.default_rng(cases), (SAMPLES, cases)
        normal = generator.normal(0.8, 0.1, size)
        differences = generator.beta(12, 2, size) - generator.beta(12, 2, size)
        ceiling, skewed = generator.beta(24, 4, size), generator.beta(12, 2, size)
        failing, _ = draw_failing(generator, size)
        drawn = [(normal, 0.8), (differences, 0.0), (ceiling, 24 / 28), (skewed, 12 / 14), (failing, FAILING_MEAN)]
        rates = [float(intervals_that_hold(values, mean).mean()) for values, mean in drawn]
        rates.append(float(intervals_that_hold(normal, 0.8, plain=True).mean()))
        alike = generator.beta(12, 2, (2, TESTS, cases))
        rates.append(float(np.mean([wilcoxon_p(pairs) < 0.05 for pairs in alike[0] - alike[1]])))
        print(f"| {cases} | " + " | ".join(f"{100 * rate:.1f} %" for rate in rates) + " |", flush=True)


def print_failures() -> None:
    """Print the coverage for scores with one failure in ten, in samples with and without a failure."""
    heads = ["cases", "intervals that hold the mean", "samples without a failure", "of these", "of the others"]
    print(f"| {' | '.join(heads)} |\n|---:|---:|---:|---:|---:|")
    for cases in (8, 12, 20, 50, 100):
        values, fails = draw_failing(np.random.default_rng([1, cases]), (SAMPLES, cases))
        held, seen = intervals_that_hold(values, FAILING_MEAN), fails.any(axis=1)
        without = f"{100 * held[~seen].mean():.1f} %" if not seen.all() else ""
        rates = f"{100 * held.mean():.1f} % | {100 * (1 - seen.mean()):.1f} % | {without}"
        print(f"| {cases} | {rates} | {100 * held[seen].mean():.1f} % |", flush=True)


def main() -> None:
    """Print both tables."""
    print_coverage()
    print()
    print_failures()


if __name__ == "__main__":
    main()
