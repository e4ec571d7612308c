"""The stages against slow, obvious references, where axes are reversed, voxels are not 1 mm and sizes are odd."""

import warnings

import nibabel as nib
import numpy as np
import pytest
from heads import centred, turn
from scipy.ndimage import gaussian_filter1d

from asa.data.io.nifti import Volume, axis_codes
from asa.data.preprocessing.alignment import align
from asa.data.preprocessing.midsagittal import MidsagittalPlane
from asa.data.preprocessing.pipeline import STAGES, Case, prepare_case, stored_indices, to_native, to_prepared
from asa.data.preprocessing.resampling import FWHM_PER_SIGMA, grid_map, sample_affine, sample_image
from asa.data.preprocessing.scan import make_thumbnail
from asa.data.preprocessing.settings import PrepareSettings
from asa.data.store import read_box
from asa.ops.labels import IGNORED

AXES = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


def ramp(code: str, spacing: tuple[float, float, float], tilt: float = 0.0) -> Volume:
    """A scan whose axes point to the three letters, of the value 1000 + 3 x + 2 y + z at (x, y, z) in mm."""
    shape = (24, 27, 22)
    axes = np.array([AXES[letter] for letter in code], float).T
    affine = centred(shape, turn((tilt, tilt, tilt)) @ axes * spacing)
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    image = 1000 + (grid @ affine[:3, :3].T + affine[:3, 3]) @ (3, 2, 1)
    return Volume(image.astype(np.float32), affine, nib.Nifti1Image(image, affine).header)


def made(foreground: np.ndarray, affine: np.ndarray, plane: MidsagittalPlane | None = None) -> Case:
    """A case after the alignment, with another value in each voxel."""
    image = np.arange(1, foreground.size + 1, dtype=np.float32).reshape(1, *foreground.shape)
    label = np.where(foreground, 1, 0).astype(np.uint8)[None]
    return Case(image, foreground[None].copy(), label, affine, plane=plane, quality={"brain_ml": 0})


def box(shape: tuple[int, int, int], *sides: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[sides] = True
    return mask


# ---------------------------------------------------------------------------------------------- positions


@pytest.mark.filterwarnings("ignore:the crop to")
@pytest.mark.parametrize("crop", ["none", [15, 17, 13], [31, 14, 40]], ids=str)
@pytest.mark.parametrize("spacing", [None, 0.8])
@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "SLA"])
def test_the_stored_affine_gives_the_place_of_every_voxel(code, spacing, crop):
    scan = ramp(code, (1.0, 1.2, 0.9), tilt=7.0 if code != "RAS" else 0.0)
    case = prepare_case({"t1": scan}, None, {}, PrepareSettings(spacing=spacing, crop=crop))
    assert axis_codes(case.affine) == "RAS"
    (step,) = (step for step in case.chain["steps"] if step["stage"] == "normalise")
    values = case.image[0] * (step["high"][0] - step["low"][0]) + step["low"][0]
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in values.shape), indexing="ij"), -1)[..., ::-1]
    stored = np.array(case.chain["stored_affine"])
    expected = 1000 + (grid @ stored[:3, :3].T + stored[:3, 3]) @ (3, 2, 1)
    # Padding and clipped voxels are left out, and those beyond the outer voxels of the scan, whose edge is repeated.
    at = (grid @ stored[:3, :3].T + stored[:3, 3] - scan.affine[:3, 3]) @ np.linalg.inv(scan.affine[:3, :3]).T
    known = ((at > -1e-6) & (at < np.array(scan.data.shape) - 1 + 1e-6)).all(-1) & (case.image[0] > 0)
    known &= case.image[0] < 1
    assert known.mean() > 0.2
    np.testing.assert_allclose(values[known], expected[known], atol=0.02)
    shown = to_prepared(scan, case.chain)
    np.testing.assert_allclose(shown[known], expected[known], atol=0.02)


@pytest.mark.parametrize("code", ["LPS", "PIR", "SLA"])
def test_without_a_crop_a_map_returns_to_the_axes_of_the_file(code):
    scan = ramp(code, (1.0, 1.0, 1.0))
    case = prepare_case({"t1": scan}, None, {}, PrepareSettings(crop="none"))
    back = to_native(case.image, case.chain)[0]
    low, high = np.percentile(scan.data, (0.5, 99.9))
    np.testing.assert_allclose(back, np.clip((scan.data - low) / (high - low), 0, 1), atol=1e-5)


@pytest.mark.filterwarnings("ignore:the crop to")
@pytest.mark.parametrize("size", [[9, 14, 7], [30, 25, 33]], ids=str)
def test_a_crop_keeps_the_plane_and_the_affine_of_what_it_keeps(size):
    shape, affine = (21, 24, 26), centred((26, 24, 21), turn((5, -4, 9)) * (0.8, 1.5, 2.0))
    plane = MidsagittalPlane(6.0, -9.0, 3.5, correlation=0.9)
    case = made(box(shape, slice(3, 15), slice(4, 21), slice(9, 24)), affine, plane)
    before = case.image, plane.distances(shape, (2.0, 1.5, 0.8))[None]
    step = STAGES["crop"][0](case, PrepareSettings(crop=size))
    assert step is not None and step["start"] == [
        (3 + 15 - size[0]) // 2,
        (4 + 21 - size[1]) // 2,
        (9 + 24 - size[2]) // 2,
    ]
    image, distances = (read_box(array, step["start"], size) for array in before)
    np.testing.assert_array_equal(case.image, image)
    inside = image[0] > 0
    assert case.plane is not None
    found = case.plane.distances(tuple(size), (2.0, 1.5, 0.8))
    np.testing.assert_allclose(found[inside], distances[0][inside], atol=1e-4)
    d, h, w = (int(first[0]) for first in inside.nonzero())
    old = affine @ [w + step["start"][2], h + step["start"][1], d + step["start"][0], 1]
    np.testing.assert_allclose(case.affine @ [w, h, d, 1], old, atol=1e-9)


@pytest.mark.parametrize("side", [slice(2, 11), slice(9, 18), slice(8, 12), slice(0, 20)], ids=str)
def test_a_crop_of_an_aligned_scan_is_as_wide_on_either_side_of_the_middle(side):
    settings, shape = PrepareSettings(midway=True, margin=1), (12, 10, 20)
    case = made(box(shape, slice(4, 9), slice(3, 8), side), np.eye(4), MidsagittalPlane(0, 0, 0, 1))
    step = STAGES["crop"][0](case, settings)
    reach = min(
        10, max(10 - side.start, side.stop - 10) + settings.margin
    )  # from the middle, and no further than needed
    assert step is not None and (step["start"], step["size"]) == ([3, 2, 10 - reach], [7, 7, 2 * reach])
    assert case.plane is not None and case.plane.shift == pytest.approx(0)
    fixed = made(box(shape, slice(4, 9), slice(3, 8), side), np.eye(4))
    with pytest.warns(UserWarning, match="leaves out"):
        STAGES["crop"][0](fixed, PrepareSettings(midway=True, crop=[6, 6, 2]))
    np.testing.assert_array_equal(fixed.image[0, 0, 0] % 20, [10, 11])  # voxels 9 and 10, on either side of the middle


@pytest.mark.parametrize("midway", [False, True])
def test_the_plane_stays_where_it_is_in_the_head_on_another_grid(midway, monkeypatch):
    plane, own = MidsagittalPlane(8.0, -5.0, 3.0, correlation=0.9), np.array([0.9, 1.2, 1.0])
    monkeypatch.setattr("asa.data.preprocessing.alignment.find_midsagittal_plane", lambda *_: plane)
    inside = box((31, 27, 29), slice(3, 22), slice(5, 26), slice(4, 20))
    settings = PrepareSettings(spacing=2.4, midway=midway)
    new = align(inside.astype(np.float32), inside, np.diag([*own[::-1], 1.0]), settings)
    assert new.matrix is not None and new.plane is not None
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in new.shape), indexing="ij"), -1)
    points = (grid @ new.matrix[:3, :3].T + new.matrix[:3, 3] - (np.array(inside.shape) - 1) / 2) * own
    expected = points @ plane.pose()[:3, 2] - plane.shift
    if midway:  # the plane is the middle, between two voxels
        assert new.shape[2] % 2 == 0
        found = np.broadcast_to((np.arange(new.shape[2]) - (new.shape[2] - 1) / 2) * 2.4, new.shape)
    else:
        found = new.plane.distances(new.shape, (2.4, 2.4, 2.4))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_grid_is_kept_if_its_voxels_have_the_size_that_is_asked_for_to_a_thousandth():
    inside = box((20, 20, 20), slice(5, 15), slice(5, 15), slice(5, 15))
    for size, kept in ((1.0, True), (1.0004, True), (0.9996, True), (1.002, False), (0.998, False)):
        affine = np.diag([1.0, size, 1.0, 1.0])
        found = align(inside.astype(np.float32), inside, affine, PrepareSettings(spacing=1.0))
        assert (found.matrix is None) == kept and (found.affine is affine) == kept


def test_the_midline_of_a_thumbnail_lies_in_the_plane():
    shape, spacing, plane = (21, 24, 30), np.array([1.5, 1.2, 0.9]), MidsagittalPlane(20.0, -15.0, 4.0, 1.0)
    brain = box(shape, slice(4, 13), slice(6, 21), slice(5, 26))
    chain = {"stored_affine": np.diag([*spacing[::-1], 1.0]).tolist(), "plane": [plane.yaw, plane.roll, plane.shift]}
    midline = make_thumbnail(brain.astype(np.float32), brain, chain).midline
    assert midline is not None
    (back, front), (bottom, top) = midline
    ends = np.array([(8, 0, back), (8, 23, front), (0, 13, bottom), (20, 13, top)])  # d = 8, h = 13: the brain's middle
    points = (ends - (np.array(shape) - 1) / 2) * spacing
    np.testing.assert_allclose(points @ plane.pose()[:3, 2], plane.shift, atol=1e-9)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("settings", [{}, {"normalise": "zscore"}, {"window": [0, 80]}], ids=str)
def test_after_normalisation_the_background_is_0(settings):
    inside = box((6, 7, 8), slice(1, 5), slice(2, 6), slice(1, 7))
    case = made(inside, np.eye(4))
    STAGES["normalise"][0](case, PrepareSettings(**settings))
    assert (case.image[0][~inside] == 0).all() and (case.image[0][inside] != 0).mean() > 0.9


@pytest.mark.parametrize(("voxel", "warned"), [(8.4, True), (8.5, False), (13.1, False), (13.3, True)])
def test_a_stripped_brain_of_less_than_600_or_more_than_2300_ml_is_warned_about(voxel, warned):
    case = made(np.ones((10, 10, 10), bool), np.diag([voxel, voxel, voxel, 1]))  # of voxel**3 ml
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        STAGES["align"][0](case, PrepareSettings(strip="robex"))
    told = [str(one.message) for one in caught]
    assert any(f"the brain mask has {voxel**3:.0f} ml, not 600 to 2300" in message for message in told) == warned
    assert case.quality["brain_ml"] == pytest.approx(voxel**3, abs=0.1)


def test_indices_follow_the_order_of_the_values_however_labels_are_declared():
    values = np.array([[0, 9, 2], [300, 7, 9]])
    names = {300: "d", 2: "a", 9: "c", 7: "b"}
    for declared in (names, dict(sorted(names.items())), dict(sorted(names.items(), reverse=True))):
        np.testing.assert_array_equal(stored_indices(values, declared, [], "s"), [[0, 3, 1], [4, 2, 3]])
    np.testing.assert_array_equal(
        stored_indices(values, {9: "c", 2: "a"}, [300, 7], "s"), [[0, 2, 1], [IGNORED, IGNORED, 2]]
    )


def test_the_254th_label_has_an_index_of_its_own():
    labels = {value: f"label {value}" for value in range(1, 255)}
    values = np.array([0, 1, 253, 254, 777])
    np.testing.assert_array_equal(stored_indices(values, labels, [777], "s"), [0, 1, 253, 254, IGNORED])


# ---------------------------------------------------------------------------------------------- resampling


def test_an_image_is_smoothed_along_the_axes_that_become_coarser_and_no_others():
    """New axes (d, h, w) are the old w with steps of 3, the old d backwards with steps of 1.5, and the old h."""
    image = np.random.default_rng(0).random((31, 12, 37), dtype=np.float32) + 1
    matrix = np.array([[0, -1.5, 0, 30], [0, 0, 1, 0], [3, 0, 0, 0], [0, 0, 0, 1]], float)
    found, inside = sample_image(image, np.ones(image.shape, bool), matrix, (13, 21, 12))
    blurred = image.astype(np.float64)
    for axis, step in ((0, 1.5), (2, 3.0)):
        blurred = gaussian_filter1d(blurred, np.sqrt(step**2 - 1) / FWHM_PER_SIGMA, axis=axis)
    backwards = np.stack([(blurred[30 - (3 * k) // 2] + blurred[30 - (3 * k + 1) // 2]) / 2 for k in range(21)])
    assert inside.all()
    np.testing.assert_allclose(found, backwards[..., ::3].transpose(2, 0, 1), rtol=1e-5)


def test_a_voxel_is_foreground_if_half_of_it_is():
    image = np.ones((6, 6, 8), np.float32) * 5
    inside = box(image.shape, slice(0, 6), slice(0, 6), slice(2, 5))
    for shift, expected in ((0.5, [0, 1, 1, 1, 1, 0, 0]), (0.4, [0, 0, 1, 1, 1, 0, 0]), (0.6, [0, 1, 1, 1, 0, 0, 0])):
        matrix = np.eye(4)
        matrix[2, 3] = shift
        found, kept = sample_image(image * inside, inside, matrix, (6, 6, 7))
        assert kept[3, 3].tolist() == [bool(value) for value in expected]
        np.testing.assert_allclose(found, 5 * kept, rtol=1e-6)


def test_finer_voxels_are_read_without_smoothing():
    image = np.random.default_rng(0).random((9, 8, 7), dtype=np.float32) + 1
    found, _ = sample_image(image, np.ones(image.shape, bool), np.diag([0.5, 0.5, 0.5, 1]), (17, 15, 13))
    np.testing.assert_array_equal(found[::2, ::2, ::2], image)
    np.testing.assert_allclose(found[1::2, ::2, ::2], (image[1:] + image[:-1]) / 2, rtol=1e-6)


def test_beyond_the_array_its_edge_is_repeated_by_a_scaling_and_by_no_rotation():
    array = np.arange(1.0, 5.0)[:, None, None] * np.ones((4, 5, 6))
    finer = np.diag([0.5, 0.5, 0.5, 1])
    finer[:3, 3] = -0.25  # half voxels, of which the outer ones have their centres beyond those of the array
    expected = np.interp(np.arange(8) / 2 - 0.25, np.arange(4), np.arange(1.0, 5.0))
    found = sample_affine(array, finer, (8, 10, 12))
    np.testing.assert_allclose(found, expected[:, None, None] * np.ones((8, 10, 12)))
    turned = np.eye(4)
    turned[:3, :3] = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]  # h is read at -w
    found = sample_affine(array, turned, (4, 5, 6))
    assert found[:, :, 0].all() and not found[:, :, 1:].any()


def test_a_map_of_points_is_a_map_of_voxels_about_the_centres_of_both_grids():
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn((10, 20, 30)), (3, -4, 5)
    new, old, new_mm, old_mm = (5, 8, 7), (9, 6, 4), np.array([0.8, 1.0, 1.5]), np.array([2.0, 0.5, 3.0])
    matrix = grid_map(pose, new, new_mm, old, old_mm)
    for voxel in ((0, 0, 0), (4, 7, 6), (2, 1, 5)):
        point = (np.array(voxel) - (np.array(new) - 1) / 2) * new_mm
        moved = pose[:3, :3] @ point + pose[:3, 3]
        np.testing.assert_allclose((matrix @ [*voxel, 1])[:3], moved / old_mm + (np.array(old) - 1) / 2)


@pytest.mark.parametrize("code", ["LPS", "PIR"])
def test_a_map_returns_from_voxels_of_0_8_mm_and_an_odd_crop_to_the_places_of_the_scan(code):
    scan = ramp(code, (1.0, 1.2, 0.9))
    with pytest.warns(UserWarning, match="the crop to"):
        case = prepare_case({"t1": scan}, None, {}, PrepareSettings(spacing=0.8, crop=[23, 19, 21]))
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in case.image.shape[1:]), indexing="ij"), -1)[..., ::-1]
    places = grid @ case.affine[:3, :3].T + case.affine[:3, 3]
    back = to_native((1000 + places @ (3, 2, 1)).astype(np.float32)[None], case.chain)[0]
    inside = to_native(np.ones(case.image.shape, np.float32), case.chain)[0] == 1
    assert inside.mean() > 0.1
    np.testing.assert_allclose(back[inside], scan.data[inside], atol=0.02)
