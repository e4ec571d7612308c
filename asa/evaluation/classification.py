"""Scores of a classification: AUC with an interval, balanced accuracy, calibration error, confusion matrix.

The AUC and the balanced accuracy are of a set of scans, but each scan has its share in them (`scan_scores`), so that
runs can be averaged and compared scan by scan.

Letters: N scans, K classes; probabilities `(N, K)`, true class indices `(N,)`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from asa.evaluation.statistics import LEVEL

RESAMPLES = 2000
BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """Scores of a set of scans.

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


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scan scores higher than a negative one, ties as half.

    Args:
        scores: `(N,)`.
        positive: bool `(N,)`.

    Returns:
        0 to 1; NaN without positive or without negative scans.
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


def weighted_cross_entropy(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """Mean cross-entropy of probabilities `(N, K)`, each scan weighted by its class, as a classification is trained.

    Args:
        truth: class indices `(N,)`.
        weights: of the classes, `(K,)`.
    """
    true = probabilities[np.arange(len(truth)), truth].clip(min=np.finfo(np.float32).tiny)
    return float((-np.log(true) * weights[truth]).mean())


def scan_scores(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """What each scan adds to the scores of all: values whose mean is the score, and whose spread is its error.

    A scan's AUC is the share of the scans of the other kind that it is on the right side of, its distance from the AUC
    weighted by N over the scans of its own kind. The variance of the mean of these is that of DeLong et al. (Biometrics
    1988), also for the difference of two runs. Likewise its part in the balanced accuracy. Values may leave 0 to 1.

    Args:
        probabilities: `(N, K)`.
        truth: `(N,)`.

    Returns:
        "auc" and "balanced_accuracy", each `(N,)`; the AUC is NaN where all scans are of one class.
    """
    classes = probabilities.shape[1]
    kinds = [1] if classes == 2 else [k for k in range(classes) if 0 < (truth == k).sum() < len(truth)]
    parts = [_auc_of_scans(probabilities[:, k], truth == k) for k in kinds]
    counts = np.bincount(truth, minlength=classes)
    correct = probabilities.argmax(axis=1) == truth
    return {
        "auc": np.mean(parts, axis=0) if parts else np.full(len(truth), math.nan),
        "balanced_accuracy": correct * len(truth) / (counts[truth] * np.count_nonzero(counts)),
    }


def _auc_of_scans(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return np.full(len(scores), math.nan)
    wins = rankdata(scores)  # less its rank among its own kind: scans of the other kind below it, ties as half
    share = np.empty(len(scores))
    share[positive] = (wins[positive] - rankdata(scores[positive])) / m
    share[~positive] = 1 - (wins[~positive] - rankdata(scores[~positive])) / n
    whole = auc(scores, positive)
    return whole + (share - whole) * len(scores) / np.where(positive, n, m)


def auc_interval(probabilities: np.ndarray, truth: np.ndarray, subjects: Sequence[str]) -> tuple[float, float]:
    """Percentile interval of `mean_auc` over resampled subjects; resamples where it is undefined are drawn again."""
    names = np.array(subjects)
    rows = [np.flatnonzero(names == name) for name in np.unique(names)]
    if len(rows) < 2 or math.isnan(mean_auc(probabilities, truth)):
        return math.nan, math.nan
    generator, values = np.random.default_rng(0), list[float]()
    while len(values) < RESAMPLES:
        chosen = np.concatenate([rows[k] for k in generator.integers(len(rows), size=len(rows))])
        value = mean_auc(probabilities[chosen], truth[chosen])
        if not math.isnan(value):
            values.append(value)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def calibration_error(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of the most likely class (Guo et al., ICML 2017, Eq. (3))."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(correct[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def score_classes(probabilities: np.ndarray, truth: np.ndarray, subjects: Sequence[str]) -> ClassScores:
    """Compute all scores of a set of scans.

    Args:
        probabilities: `(N, K)`, rows summing to 1.
        truth: `(N,)`.
        subjects: of each scan.
    """
    classes, predicted = probabilities.shape[1], probabilities.argmax(axis=1)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (truth, predicted), 1)
    present = confusion.sum(axis=1) > 0
    recall = confusion.diagonal()[present] / confusion.sum(axis=1)[present]
    low, high = auc_interval(probabilities, truth, subjects)
    return ClassScores(
        scans=len(truth),
        subjects=len(set(subjects)),
        auc=mean_auc(probabilities, truth),
        auc_low=low,
        auc_high=high,
        balanced_accuracy=float(recall.mean()),
        ece=calibration_error(probabilities, truth),
        confusion=confusion.tolist(),
    )
