"""What a simple model reads from features, by cross-validation over subjects.

The models are scikit-learn's, from the extra `probe`. Ridge regression and the nearest neighbours read numbers and
classes, logistic regression classes.

Letters: N scans, E features, K targets.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from asa.errors import require
from asa.evaluation.scans import balanced_accuracy, mean_auc, score_numbers
from asa.evaluation.statistics import in_interval, resample_subjects

# Training features, their targets and subjects, and test features -> (M, K).
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
MOST_NEIGHBOURS = 50
INNER_FOLDS = 5  # of the training subjects, to choose a penalty
LOGISTIC_PENALTIES = np.logspace(-2, 4, 7)
PENALTIES = np.logspace(-3, 6, 28)  # of the ridge regression, for standardised features


@dataclass(frozen=True)
class Probe:
    """Scans that were predicted by folds that have not seen their subjects; all `(N,)`."""

    predicted: np.ndarray  # the number, or the name of the class
    truth: np.ndarray  # the number, or the class's index in the sorted names
    subjects: np.ndarray

    def only(self, chosen: np.ndarray) -> Self:
        """The same predictions of some scans, bool `(N,)`."""
        return replace(self, **{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def gap(self, chosen: np.ndarray) -> dict[str, float]:
        """The score (error or AUC) of some scans, bool `(N,)`, less that of the others, as "gap", "low" and "high".

        The last two are the ends of the 95 % interval over resampled subjects of each side. NaN where a side cannot be
        scored, and no interval where one has fewer than two subjects.
        """

        def less(rows: np.ndarray) -> dict[str, float]:
            return {"gap": self.score(rows[chosen[rows]]) - self.score(rows[~chosen[rows]])}

        if chosen.all() or not chosen.any():
            return {"gap": math.nan, "low": math.nan, "high": math.nan}
        if not chosen[0]:  # from one side alone, so that two groups have one interval
            gap, low, high = (-end for end in self.gap(~chosen).values())
            return {"gap": gap, "low": high, "high": low}
        low, high = resample_subjects(less, list(self.subjects), chosen)["gap"]
        return less(np.arange(len(chosen))) | {"low": low, "high": high}

    def score(self, rows: np.ndarray) -> float:
        """The first of the scores, of some scans."""
        raise NotImplementedError


@dataclass(frozen=True)
class NumberProbe(Probe):
    """Predicted numbers; `guessed` `(N,)` are the means of the training folds."""

    guessed: np.ndarray

    @cached_property
    def scores(self) -> dict[str, float]:
        """Mean absolute error, that of guessing the mean, and R2, by name, with 95 % intervals over subjects."""
        found = score_numbers(self.predicted, self.truth, self.guessed, list(self.subjects))
        error = {"mean_absolute_error": found.mae, "low": found.mae_low, "high": found.mae_high}
        r2 = {"r2": found.r2, "r2_low": found.r2_low, "r2_high": found.r2_high}
        return {**error, "of_the_mean": found.mean_predictor_mae, **r2}

    def score(self, rows: np.ndarray) -> float:
        return float(np.abs(self.predicted - self.truth)[rows].mean())

    def text(self) -> str:
        found = self.scores
        error = in_interval(found["mean_absolute_error"], found["low"], found["high"], ".3g")
        r2 = in_interval(found["r2"], found["r2_low"], found["r2_high"])
        return f"mean absolute error {error}, of guessing the mean {found['of_the_mean']:.3g}, R2 {r2}"


@dataclass(frozen=True)
class ClassProbe(Probe):
    """Predicted classes; `values` `(N, K)` are larger for likelier classes, and no probabilities."""

    values: np.ndarray

    @cached_property
    def scores(self) -> dict[str, float]:
        """AUC and balanced accuracy, by name, with 95 % intervals over subjects."""

        def measured(rows: np.ndarray) -> dict[str, float]:
            values, truth = self.values[rows], self.truth[rows]
            return {"auc": mean_auc(values, truth), "balanced_accuracy": balanced_accuracy(values, truth)}

        ends = resample_subjects(measured, list(self.subjects))
        (low, high), (accuracy_low, accuracy_high) = ends["auc"], ends["balanced_accuracy"]
        intervals = {"low": low, "high": high, "accuracy_low": accuracy_low, "accuracy_high": accuracy_high}
        return measured(np.arange(len(self.truth))) | intervals

    def score(self, rows: np.ndarray) -> float:
        return mean_auc(self.values[rows], self.truth[rows])

    def text(self) -> str:
        found = self.scores
        accuracy = in_interval(found["balanced_accuracy"], found["accuracy_low"], found["accuracy_high"])
        return f"AUC {in_interval(found['auc'], found['low'], found['high'])}, balanced accuracy {accuracy}"


def probe_numbers(
    features: np.ndarray, values: Sequence[str], subjects: Sequence[str], folds: int, fit: Fit
) -> NumberProbe:
    """Predict numbers from features `(N, E)` by `ridge` or `nearest`, in two folds or more; raises as `folds_of`.

    Values and subjects are of each scan, as text; the scans of one subject are in one fold.
    """
    truth = np.array([float(value) for value in values])
    fold = folds_of(subjects, folds)
    guessed = np.array([truth[fold != own].mean() for own in fold])
    predicted = predict_by_folds(features, truth[:, None], subjects, fold, fit)[:, 0]
    return NumberProbe(predicted, truth, np.array(subjects), guessed)


def probe_classes(
    features: np.ndarray, values: Sequence[str], subjects: Sequence[str], folds: int, fit: Fit
) -> ClassProbe:
    """Predict classes from features `(N, E)`: the largest of what is predicted of their indicators wins.

    Arguments and errors as of `probe_numbers`; `fit` may also be `logistic`. A ValueError for one class only.
    """
    names, truth = np.unique(values, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all {len(values)} scans are of class {str(names[0])!r}: a probe needs two or more")
    # Folds with more of a class would have trainings with fewer, and an AUC over all folds below 0.5 by chance.
    fold = folds_of(subjects, folds, values)
    found = predict_by_folds(features, np.eye(len(names))[truth], subjects, fold, fit)
    return ClassProbe(names[found.argmax(axis=1)], truth, np.array(subjects), found)


def folds_of(subjects: Sequence[str], folds: int, classes: Sequence[str] | None = None) -> np.ndarray:
    """The fold of each scan, int `(N,)`: subjects in the order of their hashes are dealt out in turn.

    With the scans' `classes` those of one class come after those of another, so that folds have nearly equal numbers
    of each; the class of a subject is that of its first scan. A ValueError for too few folds or subjects.
    """
    first = dict(zip(reversed(subjects), reversed(classes or [""] * len(subjects)), strict=True))
    names = sorted(first, key=lambda name: (first[name], hashlib.sha256(name.encode()).hexdigest()))
    if not isinstance(folds, int) or folds < 2 or len(names) < folds:
        raise ValueError(f"folds={folds}: give a number from 2 to that of the subjects, {len(names)}")
    place = {name: k % folds for k, name in enumerate(names)}
    return np.array([place[name] for name in subjects])


def predict_by_folds(
    features: np.ndarray, targets: np.ndarray, subjects: Sequence[str], fold: np.ndarray, fit: Fit
) -> np.ndarray:
    """Predictions `(N, K)` of each fold from the others."""
    numbers = np.unique(subjects, return_inverse=True)[1]
    found = np.empty_like(targets, dtype=float)
    for own in np.unique(fold):
        train = fold != own
        if train.sum() == 1:
            found[~train] = targets[train]
            continue
        sd = features[train].std(axis=0)
        scaled = features / np.where(sd > 0, sd, 1.0)  # where a fit has a centre, it is its own
        found[~train] = fit(scaled[train], targets[train], numbers[train], scaled[~train])
    return found


# ---- fits ----


def _scikit_learn(module: str) -> Any:
    return require(f"sklearn.{module}", "probe", "policy=probe")


def ridge(train: np.ndarray, targets: np.ndarray, subjects: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression with an intercept, its penalty chosen by the error of subjects that are left out.

    That is one at a time, or a fifth of them where subjects have several scans. From scans `(N, E)` with targets
    `(N, K)`, and subjects `(N,)` as numbers, to others, `(M, E)` -> `(M, K)`.
    """
    inner: dict[str, Any] = {}
    if 1 < (count := len(np.unique(subjects))) < len(subjects):
        grouped = _scikit_learn("model_selection").GroupKFold(min(INNER_FOLDS, count))
        inner = {"cv": list(grouped.split(train, groups=subjects)), "scoring": "neg_mean_squared_error"}
    found = _scikit_learn("linear_model").RidgeCV(alphas=PENALTIES, **inner).fit(train, targets).predict(test)
    return np.asarray(found).reshape(len(test), -1)


def nearest(train: np.ndarray, targets: np.ndarray, subjects: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The mean target of the nearest training scans, their number (up to 50) chosen by the error on the training scans.

    Each of these is predicted without the scans of its subject. Shapes as for `ridge`; distances are Euclidean.
    """
    most = int(np.bincount(subjects).max())  # scans of a subject
    counts = np.arange(1, max(1, min(MOST_NEIGHBOURS, len(train) - most)) + 1)
    search = _scikit_learn("neighbors").NearestNeighbors().fit(train)

    def means(order: np.ndarray) -> np.ndarray:  # neighbours (scans, counts) -> mean targets (scans, counts, K)
        return np.asarray(np.cumsum(targets[order], axis=1) / counts[:, None])

    near = search.kneighbors(train, min(len(train), len(counts) + most), return_distance=False)
    last = np.argsort(subjects[near] == subjects[:, None], axis=1, kind="stable")  # those of the subject itself
    others = np.take_along_axis(near, last, axis=1)[:, : len(counts)]
    best = int(np.square(means(others) - targets[:, None]).sum(axis=(0, 2)).argmin())
    return means(search.kneighbors(test, len(counts), return_distance=False))[:, best]


def logistic(train: np.ndarray, targets: np.ndarray, subjects: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression with an L2 penalty, chosen by the likelihood in five folds over the subjects.

    Shapes as for `ridge`; targets are indicators, and the result is probabilities.
    """
    linear = _scikit_learn("linear_model")
    turned = _scikit_learn("decomposition").PCA().fit(train)  # as many unknowns as scans, however many features
    inside, truth = turned.transform(train), targets.argmax(axis=1)
    turn = {number: k for k, number in enumerate(dict.fromkeys(subjects.tolist()))}
    places = [turn[number] for number in subjects.tolist()] if len(turn) > 1 else range(len(train))
    fold = np.array(places) % INNER_FOLDS

    def predict(penalty: float, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        found, present = np.zeros((len(places), targets.shape[1])), np.unique(truth[rows])
        if len(present) == 1:
            found[:, present] = 1.0
            return found
        # With two classes, scikit-learn penalises the one vector of weights that is the difference of ours.
        strength = (2 if len(present) == 2 else 1) / penalty
        model = linear.LogisticRegression(C=strength, tol=1e-6, max_iter=5000).fit(inside[rows], truth[rows])
        found[:, model.classes_] = model.predict_proba(places)
        return found

    def error(penalty: float) -> float:
        found = np.empty_like(targets)
        for own in np.unique(fold):
            found[fold == own] = predict(penalty, fold != own, inside[fold == own])
        return -float(np.log(found[targets == 1].clip(min=np.finfo(float).tiny)).sum())

    best = min(LOGISTIC_PENALTIES, key=error)
    return predict(best, fold >= 0, turned.transform(test))


FITS: dict[str, Fit] = {"ridge": ridge, "logistic": logistic, "knn": nearest}
