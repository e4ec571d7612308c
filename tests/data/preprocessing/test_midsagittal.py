"""The mid-sagittal plane is found where it is."""

from pathlib import Path

import numpy as np
import pytest
from heads import centred, head_at, scan, turn
from scipy import ndimage

from asa.data.io.nifti import read_image, spacing_of, to_ras
from asa.data.preprocessing.midsagittal import BEND, MidsagittalPlane, bent_distances, find_midsagittal_plane
from asa.data.preprocessing.registration import load_map

SCANS = Path(__file__).parents[4] / "shared/data/oasis15"
needs_scans = pytest.mark.skipif(not SCANS.is_dir(), reason=f"the real scans are not here: no {SCANS}")


def posed(yaw: float, roll: float, shift: float, shape=(86, 104, 84), spacing=2.0) -> np.ndarray:
    """The symmetric head (D, H, W) with its plane at a known place, sampled without interpolation."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    points = (grid - (np.array(shape) - 1) / 2) * spacing
    back = np.linalg.inv(MidsagittalPlane(yaw, roll, shift, 1).pose())
    return head_at((points @ back[:3, :3].T + back[:3, 3])[..., ::-1])[0]


def moved(volume: np.ndarray, spacing: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """The volume read at the posed points, linearly: what alignment does."""
    centre = (np.array(volume.shape) - 1) / 2
    matrix = np.diag(1 / spacing) @ pose[:3, :3] @ np.diag(spacing)
    return ndimage.affine_transform(volume, matrix, centre + pose[:3, 3] / spacing - matrix @ centre, order=1)


@pytest.mark.parametrize("place", [(0, 0, 0), (1.3, -0.7, 0.4), (-9, 6, 7), (19, -17, -11), (0.2, 0.1, -0.15)])
def test_an_injected_yaw_roll_and_shift_are_found_to_a_tenth(place):
    found = find_midsagittal_plane(posed(*place), (2, 2, 2))
    np.testing.assert_allclose([found.yaw, found.roll, found.shift], place, atol=0.1)


@pytest.mark.parametrize("value", [1e7, -1e7])
def test_one_extreme_voxel_does_not_move_the_plane(value):
    volume = posed(8, -5, 6)
    volume[20, 30, 10] = value
    found = find_midsagittal_plane(volume, (2, 2, 2))
    np.testing.assert_allclose([found.yaw, found.roll, found.shift], [8, -5, 6], atol=0.1)


def test_alignment_is_idempotent():
    volume, spacing = posed(8, -5, 6), np.full(3, 2.0)
    once = moved(volume, spacing, find_midsagittal_plane(volume, spacing).pose())
    again = find_midsagittal_plane(once, spacing)
    np.testing.assert_allclose([again.yaw, again.roll, again.shift], 0, atol=0.1)


def test_a_flipped_head_has_the_mirrored_plane():
    one = find_midsagittal_plane(posed(7, -4, 5), (2, 2, 2))
    other = find_midsagittal_plane(posed(7, -4, 5)[..., ::-1], (2, 2, 2))
    np.testing.assert_allclose([other.yaw, other.roll, other.shift], [-one.yaw, -one.roll, -one.shift], atol=0.02)


def test_pitch_and_the_other_shifts_do_not_matter():
    shape = (60, 70, 60)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn((11, 0, 0)), (0, 6, -8)
    image, _ = scan(shape, centred(shape, 3.0 * np.eye(3)), pose)
    found = find_midsagittal_plane(image.data.transpose(2, 1, 0), (3, 3, 3))
    np.testing.assert_allclose([found.yaw, found.roll, found.shift], 0, atol=0.1)


def test_the_plane_is_found_with_thick_slices_and_noise():
    shape = (160, 200, 44)
    image, _ = scan(shape, centred(shape, np.diag([1.0, 1.0, 4.0])))
    noisy = image.data + np.abs(np.random.default_rng(0).normal(0, 30, shape)).astype(np.float32)
    found = find_midsagittal_plane(noisy.transpose(2, 1, 0), (4, 1, 1))
    np.testing.assert_allclose([found.yaw, found.roll, found.shift], 0, atol=0.25)


def test_the_symmetric_template_is_symmetric_to_rounding():
    pytest.importorskip("nilearn")
    found = find_midsagittal_plane(load_map("t1")[0], (1, 1, 1))
    np.testing.assert_allclose([found.yaw, found.roll, found.shift], 0, atol=1e-6)
    assert found.correlation == pytest.approx(1)


def test_yaw_turns_the_nose_and_roll_tilts_the_top_to_the_left():
    nose, top = np.array([0.0, 50.0, 0.0]), np.array([50.0, 0.0, 0.0])  # d, h, w
    assert (MidsagittalPlane(10, 0, 0, 1).pose()[:3, :3] @ nose)[2] < 0
    assert (MidsagittalPlane(0, 10, 0, 1).pose()[:3, :3] @ top)[2] < 0
    assert MidsagittalPlane(0, 0, 4, 1).pose()[2, 3] == pytest.approx(4)


def test_a_plane_relative_to_one_of_its_points_has_no_shift():
    plane = MidsagittalPlane(12, -8, 5, 1)
    pose = plane.pose()
    on_it = pose[:3, 3] + pose[:3, :3] @ np.array([13.0, -21.0, 0.0])
    assert plane.relative_to(on_it).shift == pytest.approx(0)
    assert plane.relative_to(on_it).yaw == 12


@pytest.mark.parametrize("volume", [np.ones((40, 40, 40)), np.random.default_rng(0).random((6, 40, 40))])
def test_a_volume_that_is_constant_or_too_small_is_refused(volume):
    with pytest.raises(ValueError, match="is too small, or constant"):
        find_midsagittal_plane(volume, (1, 1, 1))


@needs_scans
@pytest.mark.parametrize("name", ["1000", pytest.param("1006", marks=pytest.mark.slow)])
def test_injected_poses_of_a_real_brain_are_found_and_undone(name):
    volume = read_image(SCANS / f"{name}_SS.nii.gz")
    turned, affine, _ = to_ras(volume.data, volume.affine)
    brain, spacing = np.ascontiguousarray(turned.transpose(2, 1, 0)), spacing_of(affine)[::-1]
    upright = moved(brain, spacing, find_midsagittal_plane(brain, spacing).pose())
    rng = np.random.default_rng(int(name))
    for _ in range(2):
        place = [*rng.uniform(-15, 15, 2), rng.uniform(-8, 8)]
        injected = moved(upright, spacing, np.linalg.inv(MidsagittalPlane(*place, 1).pose()))
        found = find_midsagittal_plane(injected, spacing)
        np.testing.assert_allclose([found.yaw, found.roll, found.shift], place, atol=0.25)
        undone = find_midsagittal_plane(moved(injected, spacing, found.pose()), spacing)
        np.testing.assert_allclose([undone.yaw, undone.roll, undone.shift], 0, atol=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_a_mapped_plane_contains_the_mapped_points(seed):
    rng = np.random.default_rng(seed)
    plane = MidsagittalPlane(*rng.uniform(-20, 20, 3), correlation=0.9)
    pose = np.eye(4)
    pose[:3, :3] += rng.uniform(-0.3, 0.3, (3, 3))  # with shear and zoom
    pose[:3, 3] = rng.uniform(-10, 10, 3)
    points = plane.pose() @ np.concatenate([rng.uniform(-50, 50, (2, 20)), np.zeros((1, 20)), np.ones((1, 20))])
    mapped = plane.mapped(pose)
    assert np.abs((np.linalg.inv(mapped.pose()) @ pose @ points)[2]).max() < 1e-9
    assert plane.mapped(np.eye(4)).pose() == pytest.approx(plane.pose())


# ---- bent along the fissure ----


def hemispheres(plane: MidsagittalPlane, bend: float, spacing: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of an ellipsoid on each side of a fissure of 2 mm that bends by so many mm: bool masks (D, H, W)."""
    shape = np.array([100, 120, 96])
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    d, h, w = np.moveaxis((grid - (shape - 1) / 2) * spacing @ plane.pose()[:3, :3], -1, 0)
    w = w - plane.shift
    inside = (d / 60) ** 2 + (h / 75) ** 2 + (w / 60) ** 2 < 1
    past = w - bend * np.sin(h / 20) * np.exp(-(((d - 20) / 30) ** 2))  # as where an occipital pole reaches over
    return inside & (past < -1), inside & (past > 1)


@pytest.mark.parametrize("place", [(0, 0, 0), (-2, 1.5, 3), (10, -10, 5)], ids=str)
@pytest.mark.parametrize("bend", [0.0, 6.0])
def test_a_plane_bent_along_the_fissure_tells_the_sides(place, bend) -> None:
    plane = MidsagittalPlane(*place, correlation=1.0)
    left, right = hemispheres(plane, bend)
    flat, bent = plane.distances(left.shape, np.full(3, 1.5)), bent_distances(plane, left | right, np.full(3, 1.5))
    before, after = (np.mean((d > 0)[left | right] != right[left | right]) for d in (flat, bent))
    assert after <= 0.001
    assert before > 0.01 or not bend  # the law can fail: without the bend, the plane does


def test_without_paired_voxels_near_it_the_plane_stays_flat() -> None:
    plane, spacing = MidsagittalPlane(8, -5, 4, 1), (1.0, 1.5, 2.0)
    flat = plane.distances((60, 70, 50), spacing)
    for paired in (np.zeros(flat.shape, bool), np.abs(flat) > BEND + 4):
        np.testing.assert_array_equal(bent_distances(plane, paired, spacing), flat)


def test_a_bent_plane_stays_within_some_millimetres_of_the_flat_one() -> None:
    rng = np.random.default_rng(0)
    paired = ndimage.gaussian_filter(rng.normal(size=(60, 70, 50)), 2) > 0
    plane = MidsagittalPlane(0, 0, 0, 1)
    flat, bent = plane.distances(paired.shape, (2, 2, 2)), bent_distances(plane, paired, (2, 2, 2))
    assert 0 < np.abs(bent - flat).max() <= BEND
    far = np.abs(flat) >= BEND
    np.testing.assert_array_equal(bent[far], flat[far])


@needs_scans
@pytest.mark.parametrize("id", ["1002", "1014"])
def test_the_bend_takes_a_quarter_or_more_of_the_manual_cortex_off_the_wrong_side(id) -> None:
    image, truth = (read_image(SCANS / f"{id}_{kind}.nii.gz") for kind in ("SS", "glm"))
    volume, affine, _ = to_ras(image.data, image.affine)
    values = to_ras(truth.data, truth.affine)[0].transpose(2, 1, 0).astype(int)
    cortex = (values >= 100) & (values < 208)  # odd values: left
    spacing = spacing_of(affine)[::-1]
    plane = find_midsagittal_plane(volume.transpose(2, 1, 0), spacing)
    paired = cortex | np.isin(values, (38, 39, 40, 41, 44, 45))  # cerebellum and white matter too
    flat, bent = plane.distances(values.shape, spacing), bent_distances(plane, paired, spacing)
    before, after = (np.mean((d > 0)[cortex] == values[cortex] % 2) for d in (flat, bent))
    assert after <= 0.75 * before
