"""Scans find their grid, labels find their way back, and the mid-sagittal plane ends in the middle."""

import hashlib
import itertools
import shlex
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from heads import LABELS, centred, dice, scan, turn
from scipy import ndimage

from asa.data.io.nifti import Volume, read_image, read_label, spacing_of, write_label
from asa.data.preprocessing.alignment import align
from asa.data.preprocessing.brain import brain_mask, correct_bias
from asa.data.preprocessing.midsagittal import MidsagittalPlane, find_midsagittal_plane
from asa.data.preprocessing.pipeline import _undo_align, prepare_case, to_native, to_prepared
from asa.data.preprocessing.registration import FIELD_OF_VIEW, _start, load_map, register_to_template
from asa.data.preprocessing.resampling import sample_affine, sample_image, sample_label
from asa.data.preprocessing.scan import make_thumbnail
from asa.data.preprocessing.settings import PrepareSettings

PYTHON = shlex.quote(sys.executable)
SHARED = Path(__file__).parents[4] / "shared/data"
needs_scans = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real scans are not here: no {SHARED}")
CODES = ["".join(turned) for code in itertools.product("LR", "PA", "IS") for turned in itertools.permutations(code)]


PLANES: dict[bytes, MidsagittalPlane] = {}


@pytest.fixture(autouse=True)
def each_plane_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search takes seconds, and several tests prepare the same scan with other settings."""

    def searched(volume: np.ndarray, spacing: tuple[float, ...]) -> MidsagittalPlane:
        key = hashlib.sha256(f"{volume.shape} {spacing}".encode() + volume.tobytes()).digest()
        if key not in PLANES:
            PLANES[key] = find_midsagittal_plane(volume, spacing)
        return PLANES[key]

    monkeypatch.setattr("asa.data.preprocessing.alignment.find_midsagittal_plane", searched)


def turn_pose(yaw: float) -> np.ndarray:
    """A head turned by an angle about its vertical axis (4, 4)."""
    pose = np.eye(4)
    pose[:3, :3] = turn((0.0, 0.0, yaw))
    return pose


@lru_cache(maxsize=8)
def randomly_posed(seed: int) -> tuple[Volume, Volume]:
    """The head in a random orientation, spacing and obliquity, itself turned in the scanner; not to be written to."""
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.9, 1.6, 3)
    spacing[rng.integers(3)] *= rng.uniform(1, 2)
    shape = tuple(int(np.ceil(190 / side)) for side in spacing)  # the head reaches 84 mm from its centre
    signs = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    axes = np.zeros((3, 3))
    for column, letter in enumerate(CODES[rng.integers(len(CODES))]):
        row, sign = signs[letter]
        axes[row, column] = sign * spacing[column]
    oblique = turn(tuple(rng.uniform(-18, 18, 3)))
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn(tuple(rng.uniform(-8, 8, 3))), rng.uniform(-6, 6, 3)
    image, label = scan(shape, centred(shape, oblique @ axes), pose)
    image.data.setflags(write=False)
    label.data.setflags(write=False)
    return image, label


# ------------------------------------------------------------------------------------------------- grids


def naive_label(label: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every label's share everywhere, then the largest."""
    values = np.unique([0, *np.unique(label)])
    shares = [sample_affine((label == value).astype(np.float32), matrix, shape) for value in values]
    return values[np.argmax(shares, axis=0)].astype(label.dtype)


@pytest.mark.parametrize("seed", range(4))
def test_a_resampled_label_map_equals_that_of_whole_masks(seed):
    rng = np.random.default_rng(seed)
    label = np.kron(rng.choice([0, 0, 3, 9, 250], (4, 5, 4)), np.ones((4, 4, 4))).astype(np.uint8)
    matrix = np.eye(4)
    matrix[:3, :3] = (turn(tuple(rng.uniform(-30, 30, 3))) if seed else np.eye(3)) * rng.uniform(0.7, 1.4, (3, 1))
    if not seed:
        matrix[:3, :3] = np.diag(np.diagonal(matrix[:3, :3]))
    matrix[:3, 3] = rng.uniform(-3, 3, 3)
    shape = (15, 18, 17)
    np.testing.assert_array_equal(sample_label(label, matrix, shape), naive_label(label, matrix, shape))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("part", [np.s_[3:7, 5:9, 2:5], np.s_[:4, 6:, 3:], np.s_[:0], np.s_[:1, :1, :1]])
def test_undoing_an_alignment_equals_sampling_everywhere(part, turned):
    rng = np.random.default_rng(0)
    array = np.zeros((2, 12, 14, 10), np.float32)
    array[1][part] = rng.random(array[1][part].shape)
    matrix = np.diag([0.8, 1.3, 0.9, 1.0])
    matrix[:3, :3] = (turn((10, -20, 5)) if turned else np.eye(3)) @ matrix[:3, :3]
    matrix[:3, 3] = (2.3, -5.2, 1.1) if turned else (-0.3, 0.2, 0.4)
    before = (15, 11, 13)
    found = _undo_align(array, {"matrix": matrix.tolist(), "before": before})
    expected = np.stack([sample_affine(one, np.linalg.inv(matrix), before) for one in array])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_resampling_to_another_voxel_size_gives_no_warning_of_scipy():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = sample_affine(np.ones((6, 6, 6)), np.diag([2.0, 2.0, 2.0, 1.0]), (3, 3, 3))
    assert np.array_equal(half, np.ones((3, 3, 3)))


def test_the_background_stays_0_and_the_edge_of_the_brain_keeps_its_intensity():
    image, _ = scan((90, 100, 80), centred((90, 100, 80), 2.0 * np.eye(3)))
    flat = np.where(image.data > 0, 100.0, 0).astype(np.float32).transpose(2, 1, 0)
    matrix = np.eye(4)
    matrix[:3, :3] = turn((5, 8, -11)) * 1.3
    moved, inside = sample_image(flat, flat > 0, matrix, (70, 80, 70))
    assert (moved[~inside] == 0).all()
    np.testing.assert_allclose(moved[inside], 100, rtol=1e-4)


# --------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [{"midway": True}, {"midway": True, "spacing": 1.0}], ids=str)
def test_a_label_returns_from_any_orientation_spacing_and_obliquity(seed, settings, tmp_path):
    image, label = randomly_posed(seed)
    case = prepare_case({"t1": image}, label, LABELS, PrepareSettings(**settings))
    values = np.array([0, *sorted(LABELS)], np.uint8)
    back = to_native(values[case.label], case.chain)[0]
    for value in LABELS:
        assert dice(back == value, label.data == value) > 0.99
    write_label(tmp_path / "back.nii.gz", back, label)
    written = read_label(tmp_path / "back.nii.gz")
    assert written.data.dtype == label.data.dtype
    np.testing.assert_allclose(written.affine, label.affine, atol=1e-5)
    np.testing.assert_allclose(spacing_of(written.affine), label.header.get_zooms(), rtol=1e-5)


@pytest.mark.parametrize("crop", ["foreground", 128, [96, 128, 112], "none"])
def test_midway_alignment_puts_the_plane_in_the_middle_of_the_stored_volume(crop):
    image, label = randomly_posed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a small crop leaves out
        case = prepare_case({"t1": image}, label, LABELS, PrepareSettings(midway=True, spacing=1.5, crop=crop))
    assert case.image.shape[3] % 2 == 0
    found = find_midsagittal_plane(case.image[0], (1.5, 1.5, 1.5))
    np.testing.assert_allclose([found.yaw, found.roll, found.shift], 0, atol=0.2)
    assert dice(case.label[0] == 1, case.label[0, ..., ::-1] == 1) > 0.97
    assert case.plane.shift == pytest.approx(0) and case.plane.angle == 0


def test_a_tilted_scan_is_warned_about_and_an_aligned_one_is_not():
    image, _ = randomly_posed(3)
    with pytest.warns(UserWarning, match="mid-sagittal plane is off by yaw .* prepare.midway=true"):
        case = prepare_case({"t1": image}, None, {}, PrepareSettings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aligned = prepare_case({"t1": image}, None, {}, PrepareSettings(midway=True))
    # found before it was undone; the shift is the stored volume's own
    assert aligned.quality["yaw_degrees"] == pytest.approx(case.quality["yaw_degrees"], abs=1e-6)


def test_the_shift_is_that_of_the_cropped_volume():
    shape = (200, 220, 180)
    image, _ = scan(shape, centred(shape, np.eye(3)) + np.array([[0, 0, 0, 30.0], *[[0] * 4] * 3]))
    case = prepare_case({"t1": image}, None, {}, PrepareSettings())
    assert abs(case.quality["shift_mm"]) < 0.6  # 30 mm in the scan, but the crop is around the head
    with pytest.warns(UserWarning, match="mid-sagittal"):
        whole = prepare_case({"t1": image}, None, {}, PrepareSettings(crop="none"))
    assert whole.quality["shift_mm"] == pytest.approx(-30, abs=0.3)


def test_an_odd_width_is_refused_where_the_middle_matters():
    with pytest.raises(ValueError, match="an even width keeps the mid-sagittal plane in the middle"):
        PrepareSettings(midway=True, crop=[128, 128, 127])
    PrepareSettings(crop=[128, 128, 127])


def test_a_channel_that_is_absent_is_0_and_the_others_are_as_without_it():
    image, _ = randomly_posed(2)
    alone = prepare_case({"t1": image}, None, {}, PrepareSettings(midway=True, spacing=2.0))
    case = prepare_case({"flair": None, "t1": image}, None, {}, PrepareSettings(midway=True, spacing=2.0))
    assert case.first == 1 and not case.image[0].any()
    np.testing.assert_array_equal(case.image[1], alone.image[0])
    with pytest.raises(ValueError, match="none of the channels flair, t1"):
        prepare_case({"flair": None, "t1": None}, None, {}, PrepareSettings())


# --------------------------------------------------------------------------------------------- registration


def test_a_registration_starts_where_centres_of_mass_and_volumes_match() -> None:
    sitk = pytest.importorskip("SimpleITK")
    spacing, (template, affine) = np.array([3.0, 2.0, 1.5]), load_map("t1")
    distance = [(np.arange(n) - n / 3) * mm for n, mm in zip((32, 45, 70), spacing, strict=True)]
    brain = np.float32(np.sqrt(sum(part**2 for part in np.meshgrid(*distance, indexing="ij"))) < 24)
    start = _start(sitk, brain, tuple(spacing), turn((5, -8, 12)))
    centre = np.argwhere(template > 0).mean(axis=0)[::-1] + affine[:3, 3]
    expected = (np.argwhere(brain).mean(axis=0) - (np.array(brain.shape) - 1) / 2) * spacing
    np.testing.assert_allclose(start.TransformPoint(centre.tolist()), expected[::-1], atol=1e-6)
    larger = np.linalg.det(np.reshape(start.GetMatrix(), (3, 3)))
    assert larger == pytest.approx(brain.sum() * spacing.prod() / (template > 0).sum())


def test_a_registration_that_changes_nothing_returns_its_start(monkeypatch) -> None:
    sitk = pytest.importorskip("SimpleITK")
    seen, spacing, (template, affine) = [], (3.0, 2.0, 1.5), load_map("t1")

    def stay(_, fixed, moving, starts):
        seen.append((fixed, moving))
        return starts[1]

    monkeypatch.setattr("asa.data.preprocessing.registration._optimise", stay)
    brain = np.zeros((40, 50, 60), dtype=np.float32)
    brain[8:30, 9:40, 20:55] = 1
    rotation = turn((5, -8, 12))
    found = register_to_template(brain, spacing, rotation)
    size = (brain.sum() * np.prod(spacing) / (template > 0).sum()) ** (1 / 3)
    np.testing.assert_allclose(found[:3, :3], size * rotation, atol=1e-6)
    centre = np.argwhere(template > 0).mean(axis=0) + affine[:3, 3][::-1]
    expected = (np.argwhere(brain).mean(axis=0) - (np.array(brain.shape) - 1) / 2) * spacing
    np.testing.assert_allclose(found[:3] @ [*centre, 1], expected, atol=1e-6)
    # Both images lie in the spaces that the map joins.
    ((fixed, moving),) = seen
    assert fixed.TransformIndexToPhysicalPoint((0, 0, 0)) == pytest.approx(affine[:3, 3])
    inside = np.argwhere(brain).min(axis=0)
    first = [int(n) for n in np.argwhere(sitk.GetArrayFromImage(moving)).min(axis=0)]
    point = moving.TransformIndexToPhysicalPoint(first[::-1])
    assert point[::-1] == pytest.approx((inside - (np.array(brain.shape) - 1) / 2) * spacing)


def test_the_field_of_view_is_symmetric_and_holds_the_template_brain() -> None:
    template, affine = load_map("t1")
    assert FIELD_OF_VIEW[2][0] == -FIELD_OF_VIEW[2][1]
    assert tuple(high - low for low, high in FIELD_OF_VIEW) == (192, 224, 192)  # whole patches of 32 mm
    inside = np.argwhere(template > 0) + affine[:3, 3][::-1]
    for (low, high), brain in zip(FIELD_OF_VIEW, inside.T, strict=True):
        assert low < brain.min() and brain.max() < high


def warped_template(seed: int, shape: tuple[int, int, int], spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """The template under a random affine map, and the map: template point -> scan point, (d, h, w) in mm."""
    rng = np.random.default_rng(seed)
    template, affine = load_map("t1")
    true = np.eye(4)
    true[:3, :3] = turn(tuple(rng.uniform(-12, 12, 3))) @ np.diag(rng.uniform(0.85, 1.1, 3))
    true[:3, 3] = rng.uniform(-10, 10, 3)
    to_voxel = np.eye(4)
    to_voxel[:3, 3] = -affine[:3, 3][::-1]
    matrix = to_voxel @ np.linalg.inv(true) @ from_corner(shape, spacing) @ np.diag([spacing] * 3 + [1])
    return sample_affine(template, matrix, shape), true


def from_corner(shape: tuple[int, ...], spacing: float) -> np.ndarray:
    """(4, 4), point in mm from an array's first voxel -> point from its centre."""
    middle = np.eye(4)
    middle[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    return middle


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_template_itself_is_brought_back_from_an_affine_map(seed):
    pytest.importorskip("nilearn")
    brain, true = warped_template(seed, (80, 94, 80), 2.5)
    found = register_to_template(brain, (2.5,) * 3, np.eye(3))
    corners = np.array([(*corner, 1) for corner in itertools.product((-50, 60), (-90, 60), (-60, 60))])
    assert np.linalg.norm((corners @ (found - true).T)[:, :3], axis=1).max() < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_map_is_the_same_to_the_bit_and_does_not_depend_on_the_field_of_view(seed, monkeypatch):
    pytest.importorskip("nilearn")
    # This holds for any number of samples and levels.
    monkeypatch.setattr("asa.data.preprocessing.registration.SAMPLED", 0.03)
    monkeypatch.setattr("asa.data.preprocessing.registration.LEVELS", ((4, 2.0),))
    spacing, shape = 3.0, (66, 78, 66)
    brain, _ = warped_template(seed, shape, spacing)
    found = register_to_template(brain, (spacing,) * 3, np.eye(3))
    np.testing.assert_array_equal(register_to_template(brain, (spacing,) * 3, np.eye(3)), found)  # to the bit, always
    box = ndimage.find_objects((brain > 0).astype(np.uint8))[0]  # a field of view as tight as the brain: the same map
    tight = register_to_template(brain[box], (spacing,) * 3, np.eye(3))
    tight[:3, 3] += [(side.start + side.stop - 1) / 2 * spacing for side in box] + from_corner(shape, spacing)[:3, 3]
    np.testing.assert_allclose(tight, found, atol=1e-3)


@pytest.mark.filterwarnings("ignore:registered, the brain overlaps", "ignore:the crop to")
def test_a_crop_of_a_registered_brain_lies_in_the_same_place_of_the_template(monkeypatch):
    pytest.importorskip("nilearn")
    settings, affines = PrepareSettings(register=True, spacing=2, crop=[80, 96, 80]), []
    for rise in (0, 12):  # mm that this brain reaches above the template's
        pose = np.eye(4)
        pose[0, 3] = rise
        monkeypatch.setattr("asa.data.preprocessing.alignment.register_to_template", lambda *_, pose=pose: pose)
        image, _ = scan((110, 120, 110), centred((110, 120, 110), 2 * np.eye(3)))
        affines.append(np.array(prepare_case({"t1": image}, None, {}, settings).chain["stored_affine"]))
    np.testing.assert_array_equal(*affines)
    template, affine = load_map("t1")
    places = np.argwhere(template > 0)
    middle = affine @ [*((places.min(axis=0) + places.max(axis=0)) / 2)[::-1], 1]
    assert np.abs(affines[0] @ [39.5, 47.5, 39.5, 1] - middle).max() <= 1  # half a voxel


def halved(volume: Volume) -> Volume:
    """Every second voxel along each axis."""
    return Volume(volume.data[::2, ::2, ::2], volume.affine @ np.diag([2, 2, 2, 1]), volume.header)


@pytest.mark.slow
@needs_scans
def test_a_real_brain_is_registered_with_any_orientation_in_its_header(monkeypatch):
    monkeypatch.setattr("asa.data.preprocessing.registration.SAMPLED", 0.05)  # a fifth: the law is no easier so
    volume = halved(read_image(SHARED / "oasis15/1001_SS.nii.gz"))
    label = halved(read_label(SHARED / "oasis15/1001_tissues.nii.gz"))
    labels = {1: "csf", 2: "gm", 3: "wm"}
    settings = PrepareSettings(register=True, midway=True)
    case = prepare_case({"t1": volume}, label, labels, settings)
    assert case.quality["template_dice"] > 0.93
    mask = case.label[0] > 0
    back = to_native(mask[None].astype(np.uint8), case.chain)[0]
    assert dice(back > 0, label.data > 0) > 0.99
    axes = np.linalg.inv(case.chain["stored_affine"])  # the middle voxels straddle x = 0 of the template's space
    assert (axes[0, 3] + 0.5) == pytest.approx(case.image.shape[3] / 2)
    oblique = np.eye(4)
    oblique[:3, :3] = turn((0, 0, 25))
    other = prepare_case({"t1": Volume(volume.data, oblique @ volume.affine, volume.header)}, None, {}, settings)
    assert other.quality["template_dice"] == pytest.approx(case.quality["template_dice"], abs=0.01)


@pytest.mark.filterwarnings("ignore:after registration the Dice")
def test_law_registration_gets_all_of_a_brain_and_one_above_0_as_it_is(monkeypatch):
    pytest.importorskip("nilearn")
    seen = []
    monkeypatch.setattr("asa.data.preprocessing.alignment._plane", lambda *_, **__: None)
    monkeypatch.setattr(
        "asa.data.preprocessing.alignment.register_to_template", lambda brain, *_: seen.append(brain) or np.eye(4)
    )
    image, inside = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32) + 1, np.zeros((40, 40, 40), bool)
    inside[8:32, 8:32, 8:32] = True
    for brain in (image, image - 1.5):  # of a z-score, half is below 0
        align(brain, inside, np.eye(4), PrepareSettings(spacing=4.0, register=True))
    np.testing.assert_array_equal(seen[0], np.where(inside, image, 0))
    assert np.array_equal(seen[1] > 0, inside) and np.corrcoef(*(one[inside] for one in seen))[0, 1] > 0.999


@pytest.mark.slow
def test_law_a_z_scored_brain_is_registered_like_the_raw_one(monkeypatch):
    pytest.importorskip("nilearn")
    monkeypatch.setattr("asa.data.preprocessing.registration.SAMPLED", 0.05)
    monkeypatch.setattr("asa.data.preprocessing.registration.LEVELS", ((4, 2.0),))
    raw, _ = warped_template(1, (80, 94, 80), 2.5)
    scored = (raw - raw[raw > 0].mean()) / raw[raw > 0].std()
    affine = np.diag([2.5, 2.5, 2.5, 1])
    overlaps = [
        align(image, raw > 0, affine, PrepareSettings(spacing=4.0, register=True)).overlap for image in (raw, scored)
    ]
    assert overlaps[1] == pytest.approx(overlaps[0], abs=0.01)


def test_registration_of_a_head_with_its_skull_is_warned_about(monkeypatch):
    pytest.importorskip("nilearn")
    monkeypatch.setattr("asa.data.preprocessing.alignment.register_to_template", lambda *_: np.eye(4))
    noise = np.random.default_rng(0).random((60, 60, 60)).astype(np.float32) + 1
    with pytest.warns(UserWarning, match="the skull is not stripped; set prepare.strip"):
        align(noise, np.ones(noise.shape, bool), np.eye(4), PrepareSettings(register=True))


# ------------------------------------------------------------------------------------- bias field and skull


def test_n4_removes_a_known_field():
    pytest.importorskip("SimpleITK")
    shape = (96, 112, 96)
    label = scan(shape, centred(shape, 2.0 * np.eye(3)))[1].data.transpose(2, 1, 0)
    inside, noise = label > 0, np.random.default_rng(0).normal(1, 0.02, label.shape)
    clean = (np.select([label == 2, label == 7], [500, 300], 0) * noise).astype(np.float32)
    ramp = np.exp(np.linspace(-0.3, 0.3, shape[1]))[None, :, None].astype(np.float32)
    corrected = correct_bias(clean * ramp, inside, (2, 2, 2))
    assert (corrected[~inside] == 0).all()
    before, after = (np.std(np.log(part[inside] / clean[inside])) for part in (clean * ramp, corrected))
    assert after < before / 3


THRESHOLD = """
import sys
import nibabel, numpy
image = nibabel.load(sys.argv[1])
nibabel.save(nibabel.Nifti1Image((image.get_fdata() > 100).astype("uint8"), image.affine), sys.argv[2])
"""


def test_any_command_can_strip_the_skull(tmp_path):
    (tmp_path / "strip it.py").write_text(THRESHOLD)
    shape = (50, 60, 50)
    image, label = scan(shape, centred(shape, np.diag([-3.6, 3.6, 3.6])))
    command = f"{PYTHON} '{tmp_path}/strip it.py' {{image}} {{mask}}"
    case = prepare_case({"t1": image, "t2": image}, None, {}, PrepareSettings(strip=command, crop="none"))
    np.testing.assert_array_equal(case.brain[:, :, ::-1].transpose(2, 1, 0), label.data > 0)
    assert (case.image[:, ~case.brain] == 0).all()
    assert case.quality["brain_ml"] == pytest.approx((label.data > 0).sum() * 3.6**3 / 1000, abs=0.1)


def test_a_thumbnail_shows_what_the_strip_removed(tmp_path):
    (tmp_path / "strip it.py").write_text(THRESHOLD.replace("> 100", "> 450"))
    shape = (50, 60, 50)
    image, _ = scan(shape, centred(shape, np.diag([-3.6, 3.6, 3.6])))
    command = f"{PYTHON} '{tmp_path}/strip it.py' {{image}} {{mask}}"
    for settings in (PrepareSettings(strip=command), PrepareSettings(strip=command, midway=True, crop=[48, 60, 48])):
        case = prepare_case({"t1": image}, None, {}, settings)
        head = to_prepared(image, case.chain)
        inside = ndimage.binary_erosion(case.brain)  # the prepared brain, before its intensities were normalised
        assert np.corrcoef(head[inside], case.image[0][inside])[0, 1] > 0.999
        shown, bare = (make_thumbnail(part, case.brain, case.chain) for part in (head, case.image[0]))
        assert all((grey[~mask] > 40).mean() > 0.02 for grey, mask in zip(shown.grey, shown.brain, strict=True))
        assert all((grey[~mask] == 0).all() for grey, mask in zip(bare.grey, bare.brain, strict=True))


def test_a_head_with_its_skull_is_warned_about(tmp_path):
    shape = (50, 60, 50)
    brain, _ = scan(shape, centred(shape, 3.6 * np.eye(3)))
    larger, _ = scan(shape, centred(shape, 3.6 * np.eye(3)), np.diag([1.3, 1.3, 1.3, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_case({"t1": brain}, None, {}, PrepareSettings()).quality["brain_ml"] < 2300
    with pytest.warns(UserWarning, match=r"the foreground has \d+ ml, .* at most 2300: .*strip=deepbet"):
        prepare_case({"t1": larger}, None, {}, PrepareSettings())
    with warnings.catch_warnings():  # nothing here strips CT
        warnings.simplefilter("error")
        prepare_case({"ct": larger}, None, {}, PrepareSettings(window=[0, 1000]))


def test_volume_and_pose_are_those_of_the_scan_before_registration(monkeypatch):
    pytest.importorskip("nilearn")
    shape, settings = (66, 74, 66), PrepareSettings(register=True, spacing=3)
    image, label = scan(shape, centred(shape, 3 * np.eye(3)), turn_pose(yaw=7.0))
    own = prepare_case({"t1": image}, None, {}, PrepareSettings(crop="none")).quality
    pose = np.diag([0.9, 0.9, 0.9, 1.0]) @ find_midsagittal_plane(image.data.transpose(2, 1, 0), (3.0,) * 3).pose()
    monkeypatch.setattr("asa.data.preprocessing.alignment.register_to_template", lambda *_: pose)
    for midway in (False, True):
        found = prepare_case({"t1": image}, None, {}, replace(settings, midway=midway)).quality
        assert found["brain_ml"] == own["brain_ml"] == pytest.approx((label.data > 0).sum() * 27 / 1000, abs=0.1)
        assert abs(own["yaw_degrees"]) == pytest.approx(7, abs=0.5) and abs(found["yaw_degrees"]) < 0.5
        for key in ("yaw_degrees", "roll_degrees", "shift_mm"):
            assert found[f"raw_{key}"] == pytest.approx(own[key], abs=0.5)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no_such_tool {image} {mask}", "cannot start 'no_such_tool'"),
        (f"{PYTHON} -c 'raise SystemExit(3)' {{image}} {{mask}}", "ends with code 3"),
        (f"{PYTHON} -c 'print(\"done\")' {{image}} {{mask}}", "writes no {mask}: done"),
        (f"{PYTHON} -c '{THRESHOLD.replace('> 100', '> 1e9')}' {{image}} {{mask}}", "finds no brain"),
    ],
)
def test_a_command_that_fails_is_named_with_its_output(command, reason):
    image, _ = scan((30, 36, 30), centred((30, 36, 30), 6.0 * np.eye(3)))
    with pytest.raises(ValueError, match=reason.replace("{", r"\{")):
        brain_mask(command, image.data.transpose(2, 1, 0), image.affine)


def test_an_unknown_strip_method_is_refused():
    with pytest.raises(ValueError, match="choose none, deepbet, robex, or a command"):
        PrepareSettings(strip="bet")
