"""Numbers and classes from features, by folds of subjects: ridge and logistic regression, and nearest neighbours."""

import sys

import numpy as np
import pytest
import torch

from asa.evaluation.probe import (
    FITS,
    INNER_FOLDS,
    LOGISTIC_PENALTIES,
    PENALTIES,
    Fit,
    folds_of,
    logistic,
    nearest,
    predict_by_folds,
    probe_classes,
    probe_numbers,
    ridge,
)


def by_hand(train: np.ndarray, targets: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge with an intercept that is not penalised, from the normal equations."""
    x = np.column_stack([np.ones(len(train)), train])
    shrunk = penalty * np.eye(x.shape[1])
    shrunk[0, 0] = 0
    return np.column_stack([np.ones(len(test)), test]) @ np.linalg.solve(x.T @ x + shrunk, x.T @ targets)


@pytest.mark.parametrize("width", [4, 30])
def test_the_penalty_is_the_one_with_the_least_error_of_scans_that_were_left_out(width: int) -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(15, width)), rng.normal(size=(5, width))
    targets = train[:, :2] + rng.normal(size=(15, 2))
    errors = []
    for penalty in PENALTIES:
        rest = [np.delete(np.arange(15), k) for k in range(15)]
        left = [by_hand(train[some], targets[some], train[k : k + 1], penalty) for k, some in enumerate(rest)]
        errors.append(np.square(np.concatenate(left) - targets).sum())
    expected = by_hand(train, targets, test, PENALTIES[int(np.argmin(errors))])
    np.testing.assert_allclose(ridge(train, targets, np.arange(15), test), expected, atol=1e-6)


def test_the_neighbours_are_as_many_as_have_the_least_error_of_scans_that_were_left_out() -> None:
    rng = np.random.default_rng(3)
    train, test = rng.normal(size=(12, 3)), rng.normal(size=(4, 3))
    targets = np.sin(2 * train[:, :2]) + 0.1 * rng.normal(size=(12, 2))

    def mean_of_nearest(others: np.ndarray, values: np.ndarray, place: np.ndarray, count: int) -> np.ndarray:
        order = sorted(range(len(others)), key=lambda k: float(np.sum((others[k] - place) ** 2)))
        return sum(values[k] for k in order[:count]) / count

    errors = {}
    for count in range(1, 12):
        rest = [np.delete(np.arange(12), k) for k in range(12)]
        left = [mean_of_nearest(train[some], targets[some], train[k], count) for k, some in enumerate(rest)]
        errors[count] = np.square(np.array(left) - targets).sum()
    best = min(errors, key=errors.__getitem__)
    expected = [mean_of_nearest(train, targets, place, best) for place in test]
    np.testing.assert_allclose(nearest(train, targets, np.arange(12), test), expected)


@pytest.mark.parametrize(("width", "classes"), [(3, 3), (30, 3), (3, 2), (30, 2)])
def test_the_logistic_regression_is_that_of_gradient_descent_with_the_likeliest_penalty(
    width: int, classes: int
) -> None:
    rng = np.random.default_rng(4)
    train, test = rng.normal(size=(40, width)), rng.normal(size=(9, width))
    truth = (train[:, :classes] + rng.normal(size=(40, classes))).argmax(axis=1)
    targets = np.eye(classes)[truth]

    def descended(penalty: float, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Probabilities of a linear map whose cross-entropy, plus penalty / 2 of its squared weights, is least."""
        x = torch.from_numpy(train[rows] - train.mean(axis=0))
        weights, bias = torch.zeros(width, classes).double(), torch.zeros(classes).double()
        known = [weights.requires_grad_(), bias.requires_grad_()]
        optimizer = torch.optim.LBFGS(known, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logs = (x @ weights + bias).log_softmax(dim=1)
            value = -(torch.from_numpy(targets[rows]) * logs).sum() + penalty / 2 * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            return (torch.from_numpy(places - train.mean(axis=0)) @ weights + bias).softmax(dim=1).numpy()

    fold, everyone = np.arange(40) % INNER_FOLDS, np.ones(40, dtype=bool)
    likelihood = {}
    for penalty in LOGISTIC_PENALTIES:
        found = np.empty((40, classes))
        for own in range(INNER_FOLDS):
            found[fold == own] = descended(penalty, fold != own, train[fold == own])
        likelihood[penalty] = np.log(found[np.arange(40), truth]).sum()
    best = max(likelihood, key=likelihood.__getitem__)
    found = logistic(train, targets, np.arange(40), test)
    np.testing.assert_allclose(found, descended(best, everyone, test), atol=2e-3)


@pytest.mark.parametrize("fit", FITS.values())
def test_training_folds_without_a_class_give_it_no_probability_and_a_single_scan_is_copied(fit: Fit) -> None:
    rng = np.random.default_rng(7)
    targets = np.eye(3)[[0, 0, 0, 1, 1, 1, 2]]
    features, fold = rng.normal(size=(7, 4)), np.array([0, 1, 0, 1, 0, 1, 0])
    found = predict_by_folds(features, targets, list("abcdefg"), fold, fit)
    assert np.isfinite(found).all() and np.abs(found[fold == 0, 2]).max() < 1e-6
    copied = predict_by_folds(features[:2], targets[2:4], list("ab"), fold[:2], fit)
    np.testing.assert_array_equal(copied, targets[[3, 2]])


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'policy=probe needs it: run pip install "asa-mri\[probe\]"'):
        probe_numbers(np.zeros((4, 2)), list("1234"), list("abcd"), 2, ridge)


def test_a_gap_is_the_score_of_a_group_less_that_of_the_others() -> None:
    rng = np.random.default_rng(5)
    age, group = rng.uniform(20, 80, 80), np.arange(80) % 2 == 0
    features = np.column_stack([age + np.where(group, 12, 2) * rng.normal(size=80), rng.normal(size=80)])
    subjects = [f"s{k}" for k in range(80)]
    found = probe_numbers(features, [str(value) for value in age], subjects, 5, ridge)
    errors, less = np.abs(found.predicted - found.truth), found.gap(group)
    assert less["gap"] == pytest.approx(errors[group].mean() - errors[~group].mean())
    assert 0 < less["low"] < less["gap"] < less["high"]
    other = found.gap(~group)  # with two groups there is one interval
    assert [other["gap"], other["low"], other["high"]] == [-less["gap"], -less["high"], -less["low"]]
    assert all(np.isnan(value) for value in found.gap(np.ones(80, dtype=bool)).values())


@pytest.mark.parametrize("kind", FITS)
def test_every_probe_reads_a_planted_class_and_no_noise(kind: str) -> None:
    rng = np.random.default_rng(6)
    site, features = rng.integers(0, 2, 60), rng.normal(size=(60, 5))
    features[:, 2] += 4 * site
    subjects, noise = [f"s{k}" for k in range(60)], [("f", "m")[k % 2] for k in range(60)]
    assert probe_classes(features, [f"site{k}" for k in site], subjects, 5, FITS[kind]).scores["low"] > 0.7
    assert probe_classes(features, noise, subjects, 5, FITS[kind]).scores["low"] < 0.5


def test_a_prediction_comes_from_folds_without_the_scans_subject() -> None:
    rng = np.random.default_rng(1)
    subjects = [f"s{k // 2}" for k in range(20)]
    fold, features, targets = folds_of(subjects, 5), rng.normal(size=(20, 3)), rng.normal(size=(20, 1))
    assert all(fold[k] == fold[k + 1] for k in range(0, 20, 2)) and np.array_equal(np.bincount(fold), [4] * 5)
    found = predict_by_folds(features, targets, subjects, fold, ridge)
    changed = targets + 100 * (fold == fold[0])[:, None]  # what is true of a fold does not reach its predictions
    np.testing.assert_array_equal(
        predict_by_folds(features, changed, subjects, fold, ridge)[fold == fold[0]], found[fold == fold[0]]
    )


@pytest.mark.parametrize("kind", ["ridge", "knn", "logistic"])
def test_law_a_penalty_is_not_chosen_by_what_recognises_a_subject(kind: str) -> None:
    """Of a subject with several scans, one that is left out alone is recognised by the others."""
    rng = np.random.default_rng(5)
    people = rng.normal(size=(30, 40))
    known = people[:, 0] + 2 * rng.normal(size=30)
    features = np.repeat(people, 4, axis=0) + 0.05 * rng.normal(size=(120, 40))
    subjects = np.repeat(np.arange(30), 4)
    targets = np.repeat(np.eye(2)[(known > 0).astype(int)] if kind == "logistic" else known[:, None], 4, axis=0)
    fold = folds_of([f"s{k}" for k in subjects], 5)

    def error(one_by_one: bool) -> float:
        def fit(train: np.ndarray, values: np.ndarray, people: np.ndarray, test: np.ndarray) -> np.ndarray:
            return FITS[kind](train, values, np.arange(len(train)) if one_by_one else people, test)

        found = predict_by_folds(features, targets, [f"s{k}" for k in subjects], fold, fit)
        return float(np.square(found - targets).mean() / targets.var())

    assert error(one_by_one=True) > 1.5 > 1.25 > error(one_by_one=False)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_law_features_that_are_all_equal_have_an_auc_of_a_half(kind: str) -> None:
    """Folds with more of a class than others would be predicted lower, by trainings that have fewer of it."""
    subjects, values = [f"s{k}" for k in range(20)], ["a"] * 10 + ["b"] * 10
    found = probe_classes(np.ones((20, 3)), values, subjects, 5, FITS[kind])
    assert found.score(np.arange(20)) == 0.5
    fold = folds_of(subjects, 5, values)
    assert all(np.array_equal(np.bincount(fold[part]), [2] * 5) for part in (np.s_[:10], np.s_[10:]))


def test_planted_numbers_and_classes_are_read_and_noise_is_not() -> None:
    rng = np.random.default_rng(2)
    age, site = rng.uniform(20, 80, 60), rng.integers(0, 2, 60)
    features = rng.normal(size=(60, 10))
    features[:, 3] += age / 10
    features[:, 7] += 3 * site
    subjects, sexes = [f"s{k}" for k in range(60)], [("f", "m")[k % 2] for k in range(60)]
    ages = probe_numbers(features, [f"{value:.2f}" for value in age], subjects, 5, ridge)
    scores = ages.scores
    residual, spread = np.square(ages.predicted - ages.truth).sum(), np.square(ages.truth - ages.truth.mean()).sum()
    assert scores["r2"] == pytest.approx(1 - residual / spread)  # as of a regression
    assert scores["r2"] > 0.6 and scores["low"] < scores["mean_absolute_error"] < scores["high"] < scores["of_the_mean"]
    assert scores["r2_low"] < scores["r2"] < scores["r2_high"] and f"R2 {scores['r2']:.3f} (" in ages.text()
    sites = probe_classes(features, [f"site{k}" for k in site], subjects, 5, ridge).scores
    assert sites["low"] > 0.8 and 0.5 < sites["accuracy_low"] < sites["balanced_accuracy"] < sites["accuracy_high"] <= 1
    sex = probe_classes(features, sexes, subjects, 5, ridge)
    assert sex.scores["low"] < 0.5 and set(sex.predicted) == {"f", "m"}
    some = age > 50
    older = ages.only(some)
    assert older.scores["mean_absolute_error"] == pytest.approx(np.abs(ages.predicted - ages.truth)[some].mean())


def test_too_few_subjects_and_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="from 2 to that of the subjects, 2"):
        folds_of(["a", "a", "b"], 3)
    with pytest.raises(ValueError, match="two or more"):
        probe_classes(np.zeros((4, 2)), ["x"] * 4, list("abcd"), 2, ridge)
