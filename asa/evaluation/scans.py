"""Scores of predicted classes, of numbers and of anomaly maps, with intervals over subjects.

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
    """Scores of the predicted classes of a set of scans; see the functions below."""

    scans: int
    subjects: int
    auc: float
    auc_low: float  # end of the 95 % interval over resampled subjects; NaN with fewer than two
    auc_high: float
    balanced_accuracy: float
    ece: float  # `calibration_error`
    confusion: list[list[int]]  # number of scans by true class (row) and predicted class (column)

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
        return {"classes": list(classes), **nullable(asdict(self))}


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of scores `(N,)` and bool `(N,)`, ties as half; NaN where one kind has no scan."""
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
    """Expected calibration error of the most likely class (Guo et al., ICML 2017, Eq. (3)), in 15 bins."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(correct[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def score_classes(probabilities: np.ndarray, truth: np.ndarray, subjects: Sequence[str]) -> ClassScores:
    """All scores of a set of scans, given probabilities `(N, K)` and the true class and the subject of each."""
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
    """What each scan adds to "auc" and "balanced_accuracy" of all, each `(N,)`: their mean is the score.

    A scan's AUC is the share of the scans of the other kind that it is on the right side of, its distance from the AUC
    weighted by N over the scans of its own kind. The variance of the mean of these is that of DeLong et al. (Biometrics
    1988), also for the difference of two runs. Values may leave 0 to 1; the AUC is NaN where all are of one class.
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
    """Scores of the predicted numbers of a set of scans; `_low` and `_high` are the ends of 95 % intervals."""

    scans: int
    subjects: int
    mae: float  # mean absolute error, in the number's units
    mae_low: float
    mae_high: float
    mean_predictor_mae: float  # that of predicting the training scans' mean for every scan
    r2: float  # 1 - squared errors / squared deviations of the truth from its own mean; NaN if the truth is constant
    r2_low: float
    r2_high: float
    correlation: float  # Pearson's, of predicted and true numbers; NaN if either is constant
    correlation_low: float
    correlation_high: float
    bias: float  # mean of predicted - true
    bias_low: float
    bias_high: float
    # Slope of predicted - true on the true number. Below 0, high numbers are predicted too low and low ones too high:
    # the age bias of brain-age models (Le et al., Frontiers in Aging Neuroscience 2018).
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
    """All scores of predicted and true numbers `(N,)`; `training_mean` is that of the training scans, one or `(N,)`."""
    found = measures(predicted, truth)
    for name, ends in resample_subjects(lambda rows: measures(predicted[rows], truth[rows]), subjects).items():
        found[f"{name}_low"], found[f"{name}_high"] = ends
    guess = float(np.abs(training_mean - truth).mean())
    return NumberScores(scans=len(truth), subjects=len(set(subjects)), mean_predictor_mae=guess, **found)


# ---- voxels of a map ----

SCANS = "scans.csv"
VOXEL_SCORES = ("auc", "average_precision", "by_chance", "best_dice", "peak_in_lesion")


def voxel_scores(values: np.ndarray, lesion: np.ndarray) -> dict[str, float]:
    """How well a map finds a lesion, of the map's values `(N,)` in the head and bool `(N,)`, some True and some False.

    Returns `VOXEL_SCORES`: the AUC of the voxels; the average precision, with steps of equal values (as by
    scikit-learn); this by chance, the lesion's fraction of the head; the best Dice, at the threshold that is best for
    this scan, and so too good; "peak_in_lesion", 1 if the highest value is in it.
    """
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # the last voxel of each value
    hits, found, total = np.cumsum(lesion[order])[ends], ends + 1, lesion.sum()
    return {
        "auc": auc(values, lesion),
        "average_precision": float((np.diff(hits, prepend=0) / total * (hits / found)).sum()),
        "by_chance": float(lesion.mean()),
        "best_dice": float((2 * hits / (found + total)).max()),
        "peak_in_lesion": float(lesion[values.argmax()]),
    }
