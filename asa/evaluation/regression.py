"""Scores of a regression: mean absolute error, R2, correlation and bias, with intervals over subjects.

Letters: N scans; predicted and true numbers `(N,)`, in the same units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asa.evaluation.statistics import LEVEL

RESAMPLES = 2000


@dataclass(frozen=True)
class NumberScores:
    """Scores of a set of scans; `_low` and `_high` are the ends of 95 % intervals over resampled subjects.

    Args:
        mae: mean absolute error, in the number's units.
        mean_predictor_mae: that of predicting the training scans' mean for every scan.
        r2: 1 - squared errors / squared deviations of the truth from its own mean; NaN if the truth is constant.
        correlation: Pearson's, of predicted and true numbers; NaN if either is constant.
        bias: mean of predicted - true.
        bias_slope: slope of predicted - true on the true number. Below 0, high numbers are predicted too low and low
            ones too high: the age bias of brain-age models (Le et al., Frontiers in Aging Neuroscience 2018).
    """

    scans: int
    subjects: int
    mae: float
    mae_low: float
    mae_high: float
    mean_predictor_mae: float
    r2: float
    r2_low: float
    r2_high: float
    correlation: float
    correlation_low: float
    correlation_high: float
    bias: float
    bias_low: float
    bias_high: float
    bias_slope: float
    bias_slope_low: float
    bias_slope_high: float

    def text(self, column: str) -> str:
        """The scores in two lines."""

        def shown(name: str, form: str) -> str:
            value, low, high = (getattr(self, f"{name}{end}") for end in ("", "_low", "_high"))
            return f"{value:{form}} ({low:{form}} to {high:{form}})"

        return (
            f"{column}: MAE {shown('mae', '.3g')}, of the training mean {self.mean_predictor_mae:.3g}, R2 "
            f"{shown('r2', '.3f')}, r {shown('correlation', '.3f')}, {self.scans} scans of {self.subjects} subjects\n"
            f"  error on average {shown('bias', '+.3g')}, and per unit of {column} {shown('bias_slope', '+.3f')}"
        )


def measures(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Error, R2, correlation, bias and its slope of predictions `(N,)`; NaN where one is undefined."""
    error, deviation = predicted - truth, truth - truth.mean()
    squares, spread = float((deviation**2).sum()), predicted - predicted.mean()
    both = math.sqrt(squares * float((spread**2).sum()))
    return {
        "mae": float(np.abs(error).mean()),
        "r2": 1 - float((error**2).sum()) / squares if squares else math.nan,
        "correlation": float((deviation * spread).sum()) / both if both else math.nan,
        "bias": float(error.mean()),
        "bias_slope": float((deviation * error).sum()) / squares if squares else math.nan,
    }


def score_numbers(
    predicted: np.ndarray, truth: np.ndarray, training_mean: float | np.ndarray, subjects: Sequence[str]
) -> NumberScores:
    """Compute all scores of a set of scans.

    The intervals are percentiles over resampled subjects, all scans of a subject together; resamples in which a measure
    is undefined do not count for it. With fewer than two subjects there are none (NaN).

    Args:
        predicted, truth: `(N,)`.
        training_mean: the number's mean over the training scans, one or `(N,)`.
        subjects: of each scan.
    """
    names = np.array(subjects)
    rows = [np.flatnonzero(names == name) for name in np.unique(names)]
    found = measures(predicted, truth)
    ends = {f"{name}_{end}": math.nan for name in found for end in ("low", "high")}
    if len(rows) > 1:
        generator = np.random.default_rng(0)
        drawn = [
            np.concatenate([rows[k] for k in generator.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES)
        ]
        resampled = [measures(predicted[chosen], truth[chosen]) for chosen in drawn]
        for name in found:
            values = np.array([one[name] for one in resampled])
            if not np.isnan(values).all():
                low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
                ends |= {f"{name}_low": low, f"{name}_high": high}
    guess = float(np.abs(training_mean - truth).mean())
    return NumberScores(scans=len(truth), subjects=len(rows), mean_predictor_mae=guess, **found, **ends)
