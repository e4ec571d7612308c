"""Scores of classes and of numbers that were predicted of whole scans, with intervals over subjects.

The AUC and the balanced accuracy are of a set of scans, but each scan has its share in them (`scan_scores`), so that
runs can be averaged and compared scan by scan.

Letters: N scans, K classes; probabilities `(N, K)`, true class indices `(N,)`; predicted and true numbers `(N,)`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from asa.errors import counted
from asa.evaluation.statistics import in_interval, nullable, resample_subjects

BINS = 15  # of confidence, for the calibration error

# ---- classes ----


@dataclass(frozen=True)
class ClassScores:
    """Scores of the predicted classes of a set of scans.

    Args:
        auc: area under the ROC curve; for more than two classes the mean of one-versus-rest over the classes present.
        auc_low, auc_high: its 95 % interval over resampled subjects; NaN with fewer than two subjects.
        balanced_accuracy: mean recall over the classes present.
        ece: expected calibration error: |accuracy - confidence| in 15 bins of confidence, weighted by their scans.
        confusion: number of scans by true class (row) and predicted class (column).
    """

    scans: int
    subjects: int
    auc: float
    auc_low: float
    auc_high: float
    balanced_accuracy: float
    ece: float
    confusion: list[list[int]]

    def text(self, classes: Sequence[str]) -> str:
        """The scores in a line, and a line for each class."""
        lines = [
            f"AUC {in_interval(self.auc, self.auc_low, self.auc_high)}, balanced accuracy "
            f"{self.balanced_accuracy:.3f}, ECE {self.ece:.3f}, "
            f"{counted(self.scans, 'scan')} of {counted(self.subjects, 'subject')}"
        ]
        for name, row in zip(classes, self.confusion, strict=True):
            found = ", ".join(f"{count} as {other}" for count, other in zip(row, classes, strict=True) if count)
            lines.append(f"  {name}: {found}")
        return "\n".join(lines)

    def as_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """The scores for a JSON file, null where one is undefined."""
        return {"classes": list(classes), **nullable(asdict(self))}


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scan scores higher than a negative one, ties as half.

    Of scores `(N,)` and bool `(N,)`; NaN without positive or without negative scans.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def mean_auc(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """AUC of the second of two classes, or the mean of one-versus-rest over the classes present."""
    if probabilities.shape[1] == 2:
        return auc(probabilities[:, 1], truth == 1)
    values = [auc(probabilities[:, k], truth == k) for k in range(probabilities.shape[1])]
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def balanced_accuracy(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Mean recall of the most likely class over the classes present."""
    correct = probabilities.argmax(axis=1) == truth
    return float(np.mean([correct[truth == k].mean() for k in np.unique(truth)]))


def calibration_error(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of the most likely class (Guo et al., ICML 2017, Eq. (3))."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(correct[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def score_classes(probabilities: np.ndarray, truth: np.ndarray, subjects: Sequence[str]) -> ClassScores:
    """Compute all scores of a set of scans, given probabilities `(N, K)` and the true class and the subject of each."""
    classes = probabilities.shape[1]
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (truth, probabilities.argmax(axis=1)), 1)
    low, high = resample_subjects(lambda rows: {"auc": mean_auc(probabilities[rows], truth[rows])}, subjects)["auc"]
    return ClassScores(
        scans=len(truth),
        subjects=len(set(subjects)),
        auc=mean_auc(probabilities, truth),
        auc_low=low,
        auc_high=high,
        balanced_accuracy=balanced_accuracy(probabilities, truth),
        ece=calibration_error(probabilities, truth),
        confusion=confusion.tolist(),
    )


def weighted_cross_entropy(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """Mean cross-entropy of probabilities `(N, K)`, with the weight `(K,)` of each scan's class, as training has it."""
    true = probabilities[np.arange(len(truth)), truth].clip(min=np.finfo(np.float32).tiny)
    return float((-np.log(true) * weights[truth]).mean())


def scan_scores(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """What each scan adds to the scores of all: values whose mean is the score, and whose spread is its error.

    A scan's AUC is the share of the scans of the other kind that it is on the right side of, its distance from the AUC
    weighted by N over the scans of its own kind. The variance of the mean of these is that of DeLong et al. (Biometrics
    1988), also for the difference of two runs. Likewise its part in the balanced accuracy. Values may leave 0 to 1.

    Returns:
        "auc" and "balanced_accuracy", each `(N,)`; the AUC is NaN where all scans are of one class.
    """
    classes = probabilities.shape[1]
    counts = np.bincount(truth, minlength=classes)
    scored = (1,) if classes == 2 else range(classes)
    parts = [_auc_of_scans(probabilities[:, k], truth == k) for k in scored if 0 < counts[k] < len(truth)]
    correct = probabilities.argmax(axis=1) == truth
    return {
        "auc": np.mean(parts, axis=0) if parts else np.full(len(truth), math.nan),
        "balanced_accuracy": correct * len(truth) / (counts[truth] * np.count_nonzero(counts)),
    }


def _auc_of_scans(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    n, m = int(positive.sum()), int((~positive).sum())
    wins = rankdata(scores)  # less its rank among its own kind: scans of the other kind below it, ties as half
    share = np.empty(len(scores))
    share[positive] = (wins[positive] - rankdata(scores[positive])) / m
    share[~positive] = 1 - (wins[~positive] - rankdata(scores[~positive])) / n
    whole = auc(scores, positive)
    return whole + (share - whole) * len(scores) / np.where(positive, n, m)


# ---- numbers ----


@dataclass(frozen=True)
class NumberScores:
    """Scores of the predicted numbers of a set of scans; `_low` and `_high` are the ends of 95 % intervals.

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
            return in_interval(value, low, high, form)

        return (
            f"{column}: MAE {shown('mae', '.3g')}, of the training mean {self.mean_predictor_mae:.3g}, R2 "
            f"{shown('r2', '.3f')}, r {shown('correlation', '.3f')}, "
            f"{counted(self.scans, 'scan')} of {counted(self.subjects, 'subject')}\n"
            f"  error on average {shown('bias', '+.3g')}, and per unit of {column} {shown('bias_slope', '+.3f')}"
        )

    def as_json(self, column: str) -> dict[str, Any]:
        """The scores for a JSON file, null where one is undefined."""
        return {"column": column, **nullable(asdict(self))}


def measures(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Error, R2, correlation, bias and its slope of predictions `(N,)`; NaN where one is undefined."""
    error, deviation = predicted - truth, (truth - truth.mean()) * (truth.min() < truth.max())  # exactly 0 if constant
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
    """Compute all scores of predicted and true numbers `(N,)`, with intervals over resampled subjects.

    `training_mean` is the number's mean over the training scans, one or `(N,)`.
    """
    intervals = resample_subjects(lambda rows: measures(predicted[rows], truth[rows]), subjects)
    lows = {f"{name}_low": low for name, (low, _) in intervals.items()}
    highs = {f"{name}_high": high for name, (_, high) in intervals.items()}
    guess = float(np.abs(training_mean - truth).mean())
    found = measures(predicted, truth)
    return NumberScores(
        scans=len(truth), subjects=len(set(subjects)), mean_predictor_mae=guess, **found, **lows, **highs
    )
