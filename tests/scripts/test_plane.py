"""What separating joined sides by the mid-sagittal plane costs."""

import importlib

import numpy as np
import pytest

plane = importlib.import_module("scripts.reproduce.plane")


def test_every_value_is_in_one_pair() -> None:
    values = [value for pair in plane.PAIRS for value in pair]
    assert len(set(values)) == len(values) and not {0, 4, 11, 35, 71, 72, 73, 95} & set(values)


def test_separation_moves_a_voxel_to_its_side_of_the_plane_and_no_other_label() -> None:
    truth = np.array([[[101, 101, 100, 48, 47, 35, 0]]], dtype=np.uint8)
    right = np.array([[[False, True, True, True, True, True, True]]])
    found = plane.separated(truth, right)
    assert found.tolist() == [[[101, 100, 100, 47, 47, 35, 0]]]
    wrong, deep, mean, lowest = plane.measure(truth, found)
    assert (wrong, deep, lowest) == (2 / 5, 1 / 2, 0)
    assert mean == pytest.approx(np.mean([2 / 3, 2 / 3, 0, 2 / 3]))
