"""Labels with sides on real brains: what is measured."""

import importlib

import numpy as np

sides = importlib.import_module("scripts.reproduce.joined_sides")


def test_every_structure_with_two_values_has_a_right_and_a_left_label() -> None:
    values = [value for own in sides.LABELS.values() for value in own]
    assert len(values) == len(set(values)) == 2 * 10 + 1 + 3
    assert sides.LABELS["right_hippocampus"] == (47,) and sides.LABELS["left_hippocampus"] == (48,)


def test_a_voxel_of_the_wrong_side_costs_dice_only_where_sides_count() -> None:
    right, left, whole = (list(sides.LABELS).index(name) + 1 for name in ("right_caudate", "left_caudate", "brainstem"))
    truth = np.array([right] * 4 + [left] * 4 + [whole] * 2 + [0] * 2)
    found = np.array([right] * 3 + [left] + [left] * 4 + [0] * 2 + [right] * 2)
    wrong, sided, joined = sides.measure(truth[:, None, None], found[:, None, None], sides.LABELS)
    assert wrong == 1 / 8
    np.testing.assert_allclose(sided, (2 * 3 / 9 + 2 * 4 / 9 + 0) / 3)
    np.testing.assert_allclose(joined, (2 * 8 / 18 + 0) / 2)
