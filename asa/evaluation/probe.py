"""What a simple model reads from features, by cross-validation over subjects.

Ridge regression and the nearest neighbours read numbers and classes, logistic regression classes.

Letters: N scans, E features, K targets.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import log_softmax

from asa.evaluation.classification import auc_interval, mean_auc
from asa.evaluation.statistics import LEVEL, bootstrap_interval

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # training features, targets, test features -> (M, K)
MOST_NEIGHBOURS = 50
INNER_FOLDS = 5  # of the training scans, for the penalty of the logistic regression
LOGISTIC_PENALTIES = np.logspace(-2, 4, 7)
RESAMPLES = 1000  # of the subjects, for the interval of a gap

PENALTIES = np.logspace(
    -3, 6, 28
)  # of standardised features; the best is chosen by leave-one-out on the training folds


@dataclass(frozen=True)
class NumberProbe:
    """Numbers of scans, predicted by folds that have not seen their subjects.

    Args:
        predicted, truth: `(N,)`.
        subjects: of each scan, `(N,)`.
        low, high: 95 % interval of the mean absolute error over subjects.
        guessed: `(N,)`, the mean of the training folds.
    """

    predicted: np.ndarray
    subjects: np.ndarray
    low: float
    high: float
    truth: np.ndarray
    guessed: np.ndarray

    def scores(self) -> dict[str, float]:
        """Every score by its name."""
        error, guess = np.abs(self.predicted - self.truth).mean(), np.abs(self.guessed - self.truth).mean()
        squares = np.square(self.guessed - self.truth).sum()
        r2 = 1 - np.square(self.predicted - self.truth).sum() / squares if squares else math.nan
        return {
            "mean_absolute_error": float(error),
            "low": self.low,
            "high": self.high,
            "of_the_mean": float(guess),
            "r2": float(r2),
        }

    def score(self, chosen: np.ndarray) -> float:
        """The mean absolute error of some scans."""
        return float(np.abs(self.predicted - self.truth)[chosen].mean())

    def text(self) -> str:
        """The scores in one line."""
        s = self.scores()
        return (
            f"mean absolute error {s['mean_absolute_error']:.3g} ({self.low:.3g} to {self.high:.3g}), "
            f"of guessing the mean {s['of_the_mean']:.3g}, R2 {s['r2']:.3f}"
        )

    def only(self, chosen: np.ndarray) -> "NumberProbe":
        """The same predictions, scored for some scans, bool `(N,)`."""
        return _number_probe(self.predicted[chosen], self.truth[chosen], self.guessed[chosen], self.subjects[chosen])


@dataclass(frozen=True)
class ClassProbe:
    """Classes of scans, predicted by folds that have not seen their subjects.

    Args:
        predicted: name of the class of each scan, `(N,)`.
        subjects: of each scan, `(N,)`.
        low, high: 95 % interval of the AUC over subjects.
        truth: index of the class in `names`, `(N,)`.
        values: `(N, K)`, larger for likelier classes; no probabilities.
    """

    predicted: np.ndarray
    subjects: np.ndarray
    low: float
    high: float
    truth: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]

    def scores(self) -> dict[str, float]:
        """Every score by its name."""
        right = self.values.argmax(axis=1) == self.truth
        recalls = [right[self.truth == k].mean() for k in range(len(self.names)) if (self.truth == k).any()]
        auc = mean_auc(self.values, self.truth)
        return {"auc": auc, "low": self.low, "high": self.high, "balanced_accuracy": float(np.mean(recalls))}

    def score(self, chosen: np.ndarray) -> float:
        """The AUC of some scans; NaN if they are of one class."""
        return mean_auc(self.values[chosen], self.truth[chosen])

    def text(self) -> str:
        """The scores in one line."""
        s = self.scores()
        return f"AUC {s['auc']:.3f} ({self.low:.3f} to {self.high:.3f}), balanced accuracy {s['balanced_accuracy']:.3f}"

    def only(self, chosen: np.ndarray) -> "ClassProbe":
        """The same predictions, scored for some scans, bool `(N,)`."""
        return _class_probe(self.values[chosen], self.truth[chosen], self.subjects[chosen], self.names)


def probe_numbers(
    features: np.ndarray, values: Sequence[str], subjects: Sequence[str], folds: int, fit: Fit
) -> NumberProbe:
    """Predict numbers from features `(N, E)`.

    Args:
        values: of each scan, as text.
        subjects: of each scan; those of one subject are in one fold.
        folds: number of folds, from 2.
        fit: `ridge` or `nearest`.

    Raises:
        ValueError: fewer subjects than folds.
    """
    truth = np.array([float(value) for value in values])
    fold = folds_of(subjects, folds)
    guessed = np.array([truth[fold != own].mean() for own in fold])
    predicted = predict_by_folds(features, truth[:, None], fold, fit)[:, 0]
    return _number_probe(predicted, truth, guessed, np.array(subjects))


def probe_classes(
    features: np.ndarray, values: Sequence[str], subjects: Sequence[str], folds: int, fit: Fit
) -> ClassProbe:
    """Predict classes from features `(N, E)`: the largest of what is predicted of their indicators wins.

    Args:
        values: the class of each scan.
        subjects, folds: as in `probe_numbers`.
        fit: `ridge`, `nearest` or `logistic`.

    Raises:
        ValueError: fewer subjects than folds, or one class only.
    """
    names = tuple(sorted(set(values)))
    if len(names) < 2:
        raise ValueError(f"all {len(values)} scans are of class {names[0]!r}: a probe needs two or more")
    truth = np.array([names.index(value) for value in values])
    indicators = (truth[:, None] == np.arange(len(names))).astype(float)
    found = predict_by_folds(features, indicators, folds_of(subjects, folds), fit)
    return _class_probe(found, truth, np.array(subjects), names)


def folds_of(subjects: Sequence[str], folds: int) -> np.ndarray:
    """The fold of each scan, int `(N,)`: subjects in the order of their hashes are dealt out in turn.

    Raises:
        ValueError: fewer than 2 folds, or fewer subjects than folds.
    """
    names = sorted(set(subjects), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if not isinstance(folds, int) or folds < 2 or len(names) < folds:
        raise ValueError(f"folds={folds}: give a number from 2 to that of the subjects, {len(names)}")
    place = {name: k % folds for k, name in enumerate(names)}
    return np.array([place[name] for name in subjects])


def gap(found: NumberProbe | ClassProbe, chosen: np.ndarray) -> dict[str, float]:
    """The score (error or AUC) of some scans, bool `(N,)`, less that of the others.

    Returns:
        "gap", and "low" and "high", the ends of its 95 % interval over resampled subjects of each side; NaN where a
        side cannot be scored, and no interval where one has fewer than two subjects.
    """
    sides = [np.flatnonzero(chosen), np.flatnonzero(~chosen)]
    if not all(map(len, sides)):
        return {"gap": math.nan, "low": math.nan, "high": math.nan}
    grouped = [[side[found.subjects[side] == name] for name in np.unique(found.subjects[side])] for side in sides]
    result, generator = {"gap": found.score(sides[0]) - found.score(sides[1])}, np.random.default_rng(0)
    values = np.full(RESAMPLES, math.nan)
    if all(len(rows) > 1 for rows in grouped):
        for k in range(RESAMPLES):
            drawn = [
                np.concatenate([rows[j] for j in generator.integers(len(rows), size=len(rows))]) for rows in grouped
            ]
            values[k] = found.score(drawn[0]) - found.score(drawn[1])
    defined = values[~np.isnan(values)]
    ends = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(defined) else (math.nan, math.nan)
    return result | {"low": float(ends[0]), "high": float(ends[1])}


def predict_by_folds(features: np.ndarray, targets: np.ndarray, fold: np.ndarray, fit: Fit) -> np.ndarray:
    """Predictions `(N, K)` of each fold from the others."""
    found = np.empty_like(targets, dtype=float)
    for own in np.unique(fold):
        train = fold != own
        sd = features[train].std(axis=0)
        scaled = features / np.where(sd > 0, sd, 1.0)  # where a fit has a centre, it is its own
        found[~train] = fit(scaled[train], targets[train], scaled[~train])
    return found


def ridge(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression with an intercept, its penalty chosen by the leave-one-out error, in closed form.

    The residual of a scan that was left out is that of the whole fit, divided by one minus its leverage (Golub, Heath
    and Wahba, 1979).

    Args:
        train: `(N, E)`.
        targets: `(N, K)`.
        test: `(M, E)`.

    Returns:
        `(M, K)`.
    """
    centre, middle = train.mean(axis=0), targets.mean(axis=0)
    u, s, vt = np.linalg.svd(train - centre, full_matrices=False)
    turned = u.T @ (targets - middle)
    errors = []
    for penalty in PENALTIES:
        kept = s**2 / (s**2 + penalty)
        fitted = u @ (kept[:, None] * turned)
        leverage = (np.square(u) * kept).sum(axis=1) + 1 / len(train)
        left_out = (targets - middle - fitted) / np.maximum(1 - leverage, 1e-9)[:, None]
        errors.append(np.square(left_out).sum())
    best = PENALTIES[int(np.argmin(errors))]
    weights = vt.T @ ((s / (s**2 + best))[:, None] * turned)
    return np.asarray((test - centre) @ weights + middle)


def nearest(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The mean target of the nearest training scans, their number (up to 50) chosen by the leave-one-out error.

    Args and result are those of `ridge`; distances are Euclidean.
    """
    counts = np.arange(1, max(1, min(MOST_NEIGHBOURS, len(train) - 1)) + 1)

    def means(distances: np.ndarray) -> np.ndarray:  # (scans, counts, K)
        order = np.argsort(distances, axis=1, kind="stable")[:, : len(counts)]
        return np.cumsum(targets[order], axis=1) / counts[:, None]

    between = cdist(train, train)
    np.fill_diagonal(between, np.inf)
    best = int(np.square(means(between) - targets[:, None]).sum(axis=(0, 2)).argmin())
    return np.asarray(means(cdist(test, train))[:, best])


def logistic(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression with an L2 penalty, chosen by the likelihood in five folds of the training scans.

    Args:
        train: `(N, E)`.
        targets: indicators `(N, K)`.
        test: `(M, E)`.

    Returns:
        Probabilities `(M, K)`.
    """
    centre = train.mean(axis=0)
    u, s, vt = np.linalg.svd(train - centre, full_matrices=False)  # as many unknowns as scans, however many features
    inside, outside, fold = u * s, (test - centre) @ vt.T, np.arange(len(train)) % INNER_FOLDS

    def error(penalty: float) -> float:
        found = [
            (targets[fold == own] * _logistic(inside[fold != own], targets[fold != own], inside[fold == own], penalty))
            for own in np.unique(fold)
        ]
        return -float(sum(one.sum() for one in found))

    best = min(LOGISTIC_PENALTIES, key=error)
    return np.exp(_logistic(inside, targets, outside, best))


def _logistic(train: np.ndarray, targets: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    """Logarithms of the probabilities `(M, K)` of a logistic regression with a free intercept."""
    shape = (train.shape[1] + 1, targets.shape[1])
    free = np.append(np.ones(train.shape[1]), 0.0)[:, None]
    known = np.column_stack([train, np.ones(len(train))])

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logs = log_softmax(known @ weights, axis=1)
        value = -(targets * logs).sum() + penalty / 2 * np.square(free * weights).sum()
        return float(value), (known.T @ (np.exp(logs) - targets) + penalty * free * weights).ravel()

    weights = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B").x.reshape(shape)
    return np.asarray(log_softmax(np.column_stack([test, np.ones(len(test))]) @ weights, axis=1))


FITS: dict[str, Fit] = {"ridge": ridge, "logistic": logistic, "knn": nearest}


def _number_probe(predicted: np.ndarray, truth: np.ndarray, guessed: np.ndarray, subjects: np.ndarray) -> NumberProbe:
    """The predictions with the interval of their error over subjects."""
    error = np.abs(predicted - truth)
    by_subject = np.array([error[subjects == name].mean() for name in dict.fromkeys(subjects)])
    low, high = bootstrap_interval(by_subject)
    return NumberProbe(predicted, subjects, low, high, truth, guessed)


def _class_probe(values: np.ndarray, truth: np.ndarray, subjects: np.ndarray, names: tuple[str, ...]) -> ClassProbe:
    """The predictions with the interval of their AUC over subjects."""
    low, high = auc_interval(values, truth, list(subjects))
    return ClassProbe(np.array(names)[values.argmax(axis=1)], subjects, low, high, truth, values, names)
