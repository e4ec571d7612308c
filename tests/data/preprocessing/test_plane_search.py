"""What the search for the mid-sagittal plane compares, on a head so small that a search takes half a second."""

import numpy as np
import pytest

from asa.data.preprocessing import midsagittal
from asa.data.preprocessing.midsagittal import MidsagittalPlane, find_midsagittal_plane

SPACING = np.full(3, 3.0)


def small_head(yaw: float = 0.0, roll: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """A head of 7 x 9 x 8 cm, symmetric about a plane at a known place: (D, H, W) of 3 mm."""
    shape = np.array([30, 36, 34])
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    back = np.linalg.inv(MidsagittalPlane(yaw, roll, shift, 1).pose())
    d, h, w = np.moveaxis((grid - (shape - 1) / 2) * SPACING @ back[:3, :3].T + back[:3, 3], -1, 0)
    w = np.abs(w)
    texture = np.cos(w / 6 + h / 9) * np.cos(h / 8 - d / 11) * np.cos(d / 7 + w / 13)
    return np.where((d / 36) ** 2 + (h / 46) ** 2 + (w / 38) ** 2 < 1, 2 + texture, 0)


@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_push_the_plane_off_the_voxel_grid(seed: int) -> None:
    """On the grid nothing is interpolated, so noise is stronger there than at other poses, unless points are random."""
    noisy = small_head() + np.random.default_rng(seed).normal(size=(30, 36, 34))
    found = find_midsagittal_plane(noisy, SPACING)
    np.testing.assert_allclose([found.yaw, found.roll], 0, atol=0.2)


@pytest.mark.parametrize("left", [True, False])
def test_what_is_outside_the_scan_on_one_side_is_compared_with_nothing(left: bool) -> None:
    cut = small_head()[..., 9:] if left else small_head()[..., :-9]
    found = find_midsagittal_plane(cut, SPACING)
    np.testing.assert_allclose([found.yaw, found.roll], 0, atol=1)
    assert found.shift == pytest.approx(-13.5 if left else 13.5, abs=0.3)


def test_a_plane_within_45_degrees_is_returned_and_one_beyond_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midsagittal, "SEARCH_RANGE", 60.0)
    found = find_midsagittal_plane(small_head(yaw=36, roll=28), SPACING)
    assert found.angle == pytest.approx(44.6, abs=0.4)
    for yaw, roll in ((0, 48), (0, -48), (38, 36)):
        with pytest.raises(ValueError, match="no mid-sagittal plane within 45 degrees"):
            find_midsagittal_plane(small_head(yaw, roll), SPACING)


def test_the_angle_is_that_between_the_normal_and_the_left_right_axis() -> None:
    for yaw, roll in ((0, 0), (30, 0), (0, -30), (30, 30), (-60, 20)):
        cosine = np.cos(np.deg2rad(yaw)) * np.cos(np.deg2rad(roll))
        assert MidsagittalPlane(yaw, roll, 5, 1).angle == pytest.approx(np.degrees(np.arccos(cosine)))


def test_distances_are_those_along_the_normal_in_mm_and_positive_on_the_right() -> None:
    plane, shape, spacing = MidsagittalPlane(12, -8, 3, 1), (5, 6, 7), np.array([0.8, 1.5, 2.0])
    found, pose = plane.distances(shape, spacing), plane.pose()
    for voxel in np.ndindex(shape):
        point = (np.array(voxel) - (np.array(shape) - 1) / 2) * spacing
        assert found[voxel] == pytest.approx((np.linalg.inv(pose) @ [*point, 1])[2], abs=1e-5)
    assert found[2, 2, 6] > 0 > found[2, 2, 0]


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (2.0, 3.0, 4.0)])
def test_the_shift_does_not_depend_on_voxel_size_or_odd_widths(spacing: tuple[float, float, float]) -> None:
    shape = np.round(np.array([90, 108, 93]) / spacing).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    d, h, w = np.moveaxis((grid - (shape - 1) / 2) * spacing, -1, 0)
    w = np.abs(w - 4.0)
    texture = np.cos(w / 6 + h / 9) * np.cos(h / 8 - d / 11)
    head = np.where((d / 36) ** 2 + (h / 46) ** 2 + (w / 34) ** 2 < 1, 2 + texture, 0)
    found = find_midsagittal_plane(head, spacing)
    assert found.shift == pytest.approx(4.0, abs=0.1)
    np.testing.assert_allclose([found.yaw, found.roll], 0, atol=0.3)
