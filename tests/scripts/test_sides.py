"""Labels with a side, and the rate of voxels that get the label of the wrong side."""

import importlib

import numpy as np
import pytest

sides = importlib.import_module("scripts.reproduce.sides")


def test_every_region_with_a_side_maps_to_a_label_of_that_side() -> None:
    table = sides.side_table()
    assert {int(table[value]) for value in (101, 207)} == {1} and {int(table[value]) for value in (100, 206)} == {2}
    assert (table[45], table[44]) == (3, 4)
    assert (table[[37, 48, 60]] == 5).all() and (table[[36, 47, 59]] == 6).all()
    assert not table[
        [0, 4, 11, 35, 52, 69, 99, 208]
    ].any()  # background, ventricles, brainstem, cerebellum, optic chiasm
    left, right = ((table[table > 0] % 2) == rest for rest in (1, 0))
    assert left.sum() == right.sum()


def test_the_wrong_side_is_counted_where_both_maps_are_labelled() -> None:
    truth = np.array([[[1, 1, 2, 3, 5, 6, 0, 4]]])
    found = np.array([[[1, 2, 2, 4, 6, 6, 1, 0]]])
    wrong, sided, cortex, white, deep = sides.confusion(truth, found)
    assert wrong == pytest.approx(3 / 6)  # one of cortex, one of white, one of deep; background counts on neither side
    assert cortex == pytest.approx(2 * 3 / (3 + 4)) and white == pytest.approx(2 / 3) and deep == 1
    each = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 0, 0, 0, 2 * 1 / (1 + 2)]
    assert sided == pytest.approx(np.mean(each))
    assert sides.confusion(truth, truth)[:2] == [0, 1]
