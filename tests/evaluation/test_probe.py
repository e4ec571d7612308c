"""Ridge regression of numbers and classes from features, by folds of subjects."""

import numpy as np
import pytest

from asa.evaluation.probe import PENALTIES, folds_of, predict_by_folds, probe_classes, probe_numbers, ridge


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
    np.testing.assert_allclose(ridge(train, targets, test), expected, atol=1e-6)


def test_a_prediction_comes_from_folds_without_the_scans_subject() -> None:
    rng = np.random.default_rng(1)
    subjects = [f"s{k // 2}" for k in range(20)]
    fold, features, targets = folds_of(subjects, 5), rng.normal(size=(20, 3)), rng.normal(size=(20, 1))
    assert all(fold[k] == fold[k + 1] for k in range(0, 20, 2)) and np.array_equal(np.bincount(fold), [4] * 5)
    found = predict_by_folds(features, targets, fold)
    changed = targets + 100 * (fold == fold[0])[:, None]  # what is true of a fold does not reach its predictions
    np.testing.assert_array_equal(predict_by_folds(features, changed, fold)[fold == fold[0]], found[fold == fold[0]])


def test_planted_numbers_and_classes_are_read_and_noise_is_not() -> None:
    rng = np.random.default_rng(2)
    age, site = rng.uniform(20, 80, 60), rng.integers(0, 2, 60)
    features = rng.normal(size=(60, 10))
    features[:, 3] += age / 10
    features[:, 7] += 3 * site
    subjects, sexes = [f"s{k}" for k in range(60)], [("f", "m")[k % 2] for k in range(60)]
    ages = probe_numbers(features, [f"{value:.2f}" for value in age], subjects, 5)
    scores = ages.scores()
    assert scores["r2"] > 0.6 and scores["low"] < scores["mean_absolute_error"] < scores["high"] < scores["of_the_mean"]
    assert probe_classes(features, [f"site{k}" for k in site], subjects, 5).low > 0.8
    sex = probe_classes(features, sexes, subjects, 5)
    assert sex.low < 0.5 and set(sex.predicted) == {"f", "m"}
    some = age > 50
    older = ages.only(some)
    assert older.scores()["mean_absolute_error"] == pytest.approx(np.abs(ages.predicted - ages.truth)[some].mean())


def test_too_few_subjects_and_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="from 2 to that of the subjects, 2"):
        folds_of(["a", "a", "b"], 3)
    with pytest.raises(ValueError, match="two or more"):
        probe_classes(np.zeros((4, 2)), ["x"] * 4, list("abcd"), 2)
