"""How often intervals hold the true mean, and tests find a difference that is not there, on simulated scores."""

import numpy as np

from asa.engine.statistics import bootstrap_interval, wilcoxon_p

SAMPLES, TESTS, RESAMPLES = 3000, 4000, 2000


def share_held(values: np.ndarray, mean: float, plain: bool = False) -> float:
    """Share of samples `(samples, cases)` whose 95 % interval holds the mean; of plain percentiles if asked."""
    held = 0
    for seed, sample in enumerate(values):
        if plain:
            draws = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
            low, high = np.quantile(sample[draws].mean(axis=1), [0.025, 0.975])
        else:
            low, high = bootstrap_interval(sample, seed, RESAMPLES)
        held += low <= mean <= high
    return held / len(values)


def main() -> None:
    """Print a Markdown table."""
    heads = ["cases", "normal scores", "differences of Dice", "Dice near its ceiling", "skewed Dice", "1 in 10 fails"]
    print(f"| {' | '.join([*heads, 'plain, normal', 'false findings'])} |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for cases in (5, 6, 8, 12, 24, 60):
        generator, size = np.random.default_rng(cases), (SAMPLES, cases)
        normal = generator.normal(0.8, 0.1, size)
        differences = generator.beta(12, 2, size) - generator.beta(12, 2, size)
        ceiling, skewed = generator.beta(24, 4, size), generator.beta(12, 2, size)
        failing = np.where(generator.random(size) < 0.1, generator.beta(4, 4, size), generator.beta(30, 4, size))
        shares = [share_held(normal, 0.8), share_held(differences, 0.0), share_held(ceiling, 24 / 28)]
        shares += [share_held(skewed, 12 / 14), share_held(failing, 0.1 * 0.5 + 0.9 * 30 / 34)]
        shares.append(share_held(normal, 0.8, plain=True))
        alike = generator.beta(12, 2, (2, TESTS, cases))
        shares.append(float(np.mean([wilcoxon_p(pairs) < 0.05 for pairs in alike[0] - alike[1]])))
        print(f"| {cases} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
