"""Scans come to the store as asked, and labels find their way back to the voxel."""

import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from heads import LABELS, centred, dice, scan, turn
from scipy import ndimage
from stores import read_tree, write_tree

import asa
from asa.data.datasets import folder
from asa.data.datasets.record import Record, in_dataset
from asa.data.io.nifti import Volume, check_same_geometry, read_image, read_label, write_label
from asa.data.preprocessing import cohort as prepare
from asa.data.preprocessing import scan as one_scan
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.pipeline import prepare_case, to_native
from asa.data.preprocessing.resampling import sample_image
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings
from asa.data.store import Store

SHARED = Path(__file__).parents[4] / "shared/data"
needs_scans = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real scans are not here: no {SHARED}")

SIDES = ("LR", "PA", "IS")
ORIENTATIONS = ["".join(turned) for code in itertools.product(*SIDES) for turned in itertools.permutations(code)]


def volume(data: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    affine = np.eye(4) if affine is None else affine
    return Volume(data, affine, nib.Nifti1Image(data.astype(np.float32), affine).header)


def turned(data: np.ndarray, code: str) -> Volume:
    """A RAS array as a file whose axes point to the three letters would hold it."""
    orientation = nib.orientations.axcodes2ornt(code)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), orientation)
    affine = nib.orientations.inv_ornt_aff(turn, data.shape)
    return volume(nib.orientations.apply_orientation(data, turn), affine)


def ball(shape: tuple[int, int, int] = (26, 30, 24), spacing: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """An image with texture and its label, two shells of a ball off the centre, on background 0; (x, y, z)."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    reach = np.linalg.norm((grid - np.array(shape) / 2 + 0.7) * spacing, axis=-1) / (min(shape) * spacing)
    label = np.select([reach < 0.22, reach < 0.38], [7, 2], 0)
    image = np.where(label > 0, 50.0 + 30 * (label == 7) + grid[..., 0] + 0.5 * grid[..., 1], 0).astype(np.float32)
    return image, label


# ---------------------------------------------------------------------------------------------- one case


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_a_label_returns_exactly_from_any_orientation(code):
    image, label = (turned(part, code) for part in ball())
    case = prepare_case({"t1": image}, label, LABELS, PrepareSettings(crop=[20, 34, 21]))
    back = to_native(np.array([0, 2, 7])[case.label], case.chain)
    kept = to_native(np.ones_like(case.label), case.chain)[0] > 0
    assert back.shape[1:] == label.data.shape
    np.testing.assert_array_equal(back[0], np.where(kept, label.data, 0))
    assert dice(back[0] > 0, label.data > 0) == 1.0


@pytest.mark.parametrize("code", ["LAS", "PIR", "SLA"])
def test_every_orientation_of_a_head_is_prepared_to_the_same_array(code):
    image, label = ball()
    upright = prepare_case({"t1": volume(image)}, volume(label), LABELS, PrepareSettings())
    case = prepare_case({"t1": turned(image, code)}, turned(label, code), LABELS, PrepareSettings())
    np.testing.assert_array_equal(case.image, upright.image)
    np.testing.assert_array_equal(case.label, upright.label)
    np.testing.assert_allclose(case.chain["stored_affine"], upright.chain["stored_affine"])


def test_arrays_are_stored_inferior_to_superior_posterior_to_anterior_left_to_right():
    image = np.zeros((4, 5, 6), np.float32)
    image[3, 0, 2], image[0, 0, 0] = 10, 5  # right, posterior
    case = prepare_case({"t1": volume(image)}, None, {}, PrepareSettings(crop="none"))
    assert case.image.shape == (1, 6, 5, 4)
    assert case.image[0, 2, 0, 3] == 1


@pytest.mark.parametrize("spacing", [0.7, 0.9, 1.2])
def test_a_smooth_label_returns_from_resampling(spacing):
    image, label = ball((52, 60, 50))
    affine = np.array([[-1.0, 0.1, 0, 30], [0.1, 1.0, 0.05, -20], [0, -0.05, 1.1, 5], [0, 0, 0, 1]])
    case = prepare_case({"t1": volume(image, affine)}, volume(label, affine), LABELS, PrepareSettings(spacing=spacing))
    hard = to_native(case.label, case.chain)[0]
    shares = np.stack([case.label[0] == index for index in range(3)]).astype(np.float32)
    soft = to_native(shares, case.chain).argmax(axis=0)
    for back in (hard, soft):
        assert back.shape == label.shape
        assert dice(back > 0, label > 0) > 0.99
        assert dice(back == 2, label == 7) > 0.96  # a ball of 11 voxels radius only


def test_resampling_keeps_anatomical_positions():
    """A linear ramp is reproduced by trilinear interpolation, so each new voxel must hold its own x in mm."""
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    affine[:3, 3] = (-20, 5, 9)
    ramp = np.broadcast_to((np.arange(20) * 1.5 + 100)[:, None, None], (20, 24, 14)).astype(np.float32)
    case = prepare_case({"t1": volume(ramp, affine)}, None, {}, PrepareSettings(spacing=1.0, crop="none"))
    (step,) = [step for step in case.chain["steps"] if step["stage"] == "normalise"]
    values = case.image[0, 10, 10] * (step["high"][0] - step["low"][0]) + step["low"][0]
    stored = np.array(case.chain["stored_affine"])
    there = stored[0, 0] * np.arange(len(values)) + stored[0, 3] + 20 + 100
    np.testing.assert_allclose(values[3:-3], there[3:-3], atol=1e-3)
    back = to_native(case.image, case.chain)[0]
    scaled = (ramp - step["low"][0]) / (step["high"][0] - step["low"][0])
    np.testing.assert_allclose(back[2:-2], scaled[2:-2], atol=1e-4)


def test_another_voxel_size_and_orientation_give_the_same_image():
    """Rendered in each pose, not interpolated: what differs is what resampling adds."""
    wanted, images = centred((50, 58, 44), np.eye(3) * 3.0), []
    for shape, axes in (((68, 88, 66), np.eye(3) * 2.0), ((106, 126, 100), turn((6, -4, 8)) * 1.5)):
        image, _ = scan(shape, centred(shape, axes))
        matrix = (np.linalg.inv(image.affine) @ wanted)[np.ix_([2, 1, 0, 3], [2, 1, 0, 3])]  # of (d, h, w)
        images.append(sample_image(image.data.T, image.data.T > 0, matrix, (44, 58, 50)))
    (here, inside), (there, also) = images
    assert dice(inside, also) > 0.99
    inside = ndimage.binary_erosion(inside, iterations=2)
    assert np.corrcoef(here[inside], there[inside])[0, 1] > 0.999
    assert np.abs(here - there)[inside].max() < 0.05 * here.max()


@pytest.mark.parametrize("cut", [(1, 0, 0), (1, 2, 3)])
def test_the_amount_of_air_in_a_file_does_not_shift_the_grid(cut):
    image, _ = ball((52, 60, 50))
    affine = np.eye(4)
    affine[:3, 3] = cut
    settings = PrepareSettings(spacing=2.2, margin=0)
    whole = prepare_case({"t1": volume(image)}, None, {}, settings)
    less = prepare_case({"t1": volume(image[cut[0] :, cut[1] :, cut[2] :], affine)}, None, {}, settings)
    np.testing.assert_allclose(whole.image, less.image, atol=1e-5)
    np.testing.assert_allclose(whole.chain["stored_affine"], less.chain["stored_affine"], atol=1e-9)


def test_a_mirrored_head_is_prepared_to_the_mirrored_array():
    image, _ = ball((27, 30, 24))
    for spacing in (None, 1.3):
        settings = PrepareSettings(spacing=spacing, crop="none")
        one = prepare_case({"t1": volume(image)}, None, {}, settings).image
        two = prepare_case({"t1": volume(image[::-1])}, None, {}, settings).image
        np.testing.assert_allclose(one, two[..., ::-1], atol=1e-5)


def test_resampling_does_not_darken_the_edge_of_the_brain():
    flat = (ball()[1] > 0).astype(np.float32) * 100
    flat[13, 15, 12] = 101  # not constant
    for spacing in (0.8, 2.0):
        image = prepare_case({"t1": volume(flat)}, None, {}, PrepareSettings(normalise="zscore", spacing=spacing)).image
        assert len(np.unique(image[image != 0].round(2))) < 40  # the flat brain, and the spot with its surroundings
        assert np.median(np.abs(image[image != 0] - np.median(image[image != 0]))) < 1e-2


def test_intensities_are_percentiles_or_z_scores_of_the_foreground():
    image, _ = ball()
    inside = image > 0
    scaled = prepare_case({"t1": volume(image)}, None, {}, PrepareSettings(crop="none")).image[0].transpose(2, 1, 0)
    low, high = np.percentile(image[inside], (0.5, 99.9))
    np.testing.assert_allclose(scaled[inside], np.clip((image[inside] - low) / (high - low), 0, 1), atol=1e-6)
    assert (scaled[~inside] == 0).all()
    z = (
        prepare_case({"t1": volume(image)}, None, {}, PrepareSettings(normalise="zscore", crop="none"))
        .image[0]
        .transpose(2, 1, 0)
    )
    assert abs(z[inside].mean()) < 1e-5 and abs(z[inside].std() - 1) < 1e-5 and (z[~inside] == 0).all()


@pytest.mark.parametrize("value", [1e7, -1e7])
def test_a_voxel_that_decides_the_z_scores_is_warned_about_and_percentiles_are_not_changed_by_it(value):
    image, _ = ball((24, 26, 25))
    image = image * np.random.default_rng(0).uniform(0.8, 1.2, image.shape)
    spoilt = image.copy()
    spoilt[12, 12, 12] = value
    for settings, warned in ((PrepareSettings(normalise="zscore"), True), (PrepareSettings(), False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept, found = (prepare_case({"t1": volume(one)}, None, {}, settings).image[0] for one in (image, spoilt))
        shown = [str(warning.message) for warning in caught if "SD from the mean" in str(warning.message)]
        assert len(shown) == warned
        assert (np.abs(kept - found)[kept != 0].mean() > 0.5) == warned


def test_without_a_zero_background_everything_is_foreground():
    head = np.random.default_rng(0).normal(100, 5, (12, 13, 14)).astype(np.float32)
    head[0, 0, 0] = 0
    case = prepare_case({"t1": volume(head)}, None, {}, PrepareSettings(normalise="zscore"))
    assert case.image.shape == (1, 14, 13, 12)
    assert case.image[0, 0, 0, 0] < -10


def test_the_bounding_box_has_its_margin_and_stays_inside_the_scan():
    image = np.zeros((20, 20, 20), np.float32)
    image[5:9, 1:6, 10:18] = np.arange(4)[:, None, None] + 1
    case = prepare_case({"t1": volume(image)}, None, {}, PrepareSettings(margin=3))
    assert case.image.shape == (1, 13, 9, 10)  # z 7..20, y 0..9, x 2..12
    assert case.chain["steps"][-1]["start"] == [7, 0, 2]


def test_channels_share_the_box_and_keep_their_own_intensities():
    image, _ = ball()
    second = np.zeros_like(image)
    second[2:4, 2:4, 2:4] = np.arange(8).reshape(2, 2, 2) + 1000
    case = prepare_case({"t1": volume(image), "flair": volume(second)}, None, {}, PrepareSettings(margin=0))
    assert case.image.shape[0] == 2
    assert case.image[0].max() == 1 and case.image[1].max() == 1
    assert (case.image[1] > 0).sum() <= 8


def test_a_crop_that_cuts_the_brain_is_warned_about():
    image, label = ball()
    with pytest.warns(UserWarning, match=r"leaves out \d+\.\d% of the foreground|leaves out \d+ labelled voxels"):
        prepare_case({"t1": volume(image)}, volume(label), LABELS, PrepareSettings(crop=8))


def test_labels_outside_the_grid_are_warned_about():
    image, label = ball()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_case({"t1": volume(image)}, volume(label), LABELS, PrepareSettings(midway=True))
    label[:2] = 2  # far from what the image shows, which the grid is made for
    with pytest.warns(UserWarning, match=rf"the new grid leaves out {label[:2].size} labelled voxels"):
        prepare_case({"t1": volume(image)}, volume(label), LABELS, PrepareSettings(midway=True))


@pytest.mark.parametrize(("zeros", "all_is_foreground"), [(0.005, True), (0.02, False), (0.2, False)])
def test_an_image_without_a_background_of_zeros_is_foreground_everywhere(zeros, all_is_foreground):
    image = np.random.default_rng(0).uniform(50, 90, (20, 20, 20)).astype(np.float32)
    image.flat[: round(zeros * image.size)] = 0
    case = prepare_case({"t1": volume(image)}, None, {}, PrepareSettings(crop="none"))
    assert case.foreground.mean() == (1 if all_is_foreground else 1 - zeros)


def test_results_are_zero_outside_the_crop():
    image, _ = ball()
    with pytest.warns(UserWarning, match=r"leaves out \d+\.\d% of the foreground"):
        case = prepare_case({"t1": volume(image)}, None, {}, PrepareSettings(crop=6))
    back = to_native(np.ones((2, 6, 6, 6), np.float32), case.chain)
    assert back.shape == (2, *image.shape) and back.sum() == 2 * 6**3


def test_the_chain_survives_json():
    image, label = ball()
    case = prepare_case({"t1": volume(image)}, volume(label), LABELS, PrepareSettings(spacing=1.1, crop=30))
    chain = json.loads(json.dumps(case.chain))
    np.testing.assert_array_equal(to_native(case.label, chain), to_native(case.label, case.chain))


def test_label_values_become_consecutive_and_undeclared_ones_are_refused():
    image, label = ball()
    case = prepare_case({"t1": volume(image)}, volume(label), {**LABELS, 9: "absent"}, PrepareSettings())
    assert case.label.dtype == np.uint8 and list(np.unique(case.label)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"sub-1: label value 7 \(\d+ voxels\) is not declared \(declared: 2 outer\)"):
        prepare_case({"t1": volume(image)}, volume(label), {2: "outer"}, PrepareSettings(), name="sub-1")


def test_empty_images_and_images_on_other_grids_are_refused():
    image, label = ball()
    with pytest.raises(ValueError, match="sub-1: an image is empty or constant"):
        prepare_case({"t1": volume(np.zeros_like(image))}, None, {}, PrepareSettings(), name="sub-1")
    with pytest.raises(ValueError, match="t1 and label of sub-1: shapes"):
        prepare_case({"t1": volume(image)}, volume(label[1:]), LABELS, PrepareSettings(), name="sub-1")
    moved = np.eye(4)
    moved[1, 3] = 3
    with pytest.raises(ValueError, match=r"t1 and t2 of sub-1: .* apart"):
        prepare_case({"t1": volume(image), "t2": volume(image, moved)}, None, {}, PrepareSettings(), name="sub-1")


def test_a_result_of_another_shape_is_refused():
    case = prepare_case({"t1": volume(ball()[0])}, None, {}, PrepareSettings())
    with pytest.raises(ValueError, match="is not \\(C, D, H, W\\)"):
        to_native(np.zeros((1, 5, 5, 5)), case.chain)


@pytest.mark.parametrize(
    "wrong",
    [{"normalise": "minmax"}, {"spacing": 0.0}, {"crop": "box"}, {"crop": [64, 64]}, {"crop": 0}, {"margin": -1}],
)
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PrepareSettings(**wrong)


# ---------------------------------------------------------------------------------------------- CT


def head_ct(spacing: tuple[float, float, float] = (2.0, 2.0, 3.0)) -> tuple[Volume, np.ndarray]:
    """A made-up head CT in HU (x, y, z), with a skull, ventricles, sinuses and a table; and its head, bool."""
    shape = tuple(int(230 / side) for side in spacing)
    affine = centred(shape, np.diag(spacing))
    x, y, z = np.moveaxis(
        np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1) @ np.diag(spacing), -1, 0
    )
    x, y, z = (axis - axis.mean() for axis in (x, y, z))
    radius = np.sqrt((x / 72) ** 2 + (y / 90) ** 2 + (z / 80) ** 2)
    hu = np.select([radius < 0.88, radius < 0.96, radius < 1], [35.0, 1000.0, 40.0], -1000.0) + x / 10
    hu[np.sqrt(x**2 + y**2 + z**2) < 20] = 5  # ventricles
    hu[np.sqrt(x**2 + (y - 60) ** 2 + (z + 20) ** 2) < 10] = -1000  # a sinus
    hu[(np.abs(y + 105) < 2) & (np.abs(x) < 100)] = 200  # the table
    return volume(hu.astype(np.float32), affine), radius < 1


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 3.0), pytest.param((1.5, 1.5, 6.0), marks=pytest.mark.slow)])
def test_the_foreground_of_ct_is_the_head_without_air_and_table_and_with_its_sinuses(spacing):
    scanned, head = head_ct(spacing)
    case = prepare_case({"ct": scanned}, None, {}, PrepareSettings(window=[0, 80], crop="none"))
    assert dice(case.brain, head.transpose(2, 1, 0)) > 0.99
    expected = np.where(case.brain, np.clip(scanned.data.transpose(2, 1, 0) / 80, 0, 1), 0)
    np.testing.assert_allclose(case.image[0], expected, atol=1e-6)
    cropped = prepare_case({"ct": scanned}, None, {}, PrepareSettings(window=[0, 80], margin=0)).image
    assert cropped.shape[2] * spacing[1] < 190  # 180 mm of head: neither air nor table
    aligned = prepare_case({"ct": scanned}, None, {}, PrepareSettings(window=[0, 80], midway=True, spacing=3.0))
    assert aligned.image.min() == 0 and aligned.image.max() == 1 and abs(aligned.quality["shift_mm"]) < 0.5


def test_a_ct_window_needs_ct_and_what_is_for_mr_is_refused():
    with pytest.raises(ValueError, match="a: prepare.window= is for CT in HU"):
        prepare_case({"ct": volume(np.full((9, 9, 9), -1000.0))}, None, {}, PrepareSettings(window=[0, 80]), name="a")
    stripped, head = head_ct()
    stripped = volume(np.where(head, np.maximum(stripped.data, 1), 0))
    case = prepare_case({"ct": stripped}, None, {}, PrepareSettings(window=[0, 80], crop="none"))
    assert np.array_equal(case.brain, head.transpose(2, 1, 0))
    stripped.data[tuple(np.argwhere(head)[len(np.argwhere(head)) // 2])] = -400  # air in a sinus, and none around
    case = prepare_case({"ct": stripped}, None, {}, PrepareSettings(window=[0, 80], crop="none"))
    assert np.array_equal(case.brain, head.transpose(2, 1, 0))
    for wrong, said in (
        ({"window": [80, 0]}, "window=.*like"),
        ({"window": [0]}, "window="),
        ({"window": [0, float("inf")]}, "window="),
        ({"window": "brain"}, "window="),
        ({"window": [0, 80], "bias": True}, "no bias field"),
        ({"window": [0, 80], "strip": "robex"}, "no skull strip for CT"),
    ):
        with pytest.raises(ValueError, match=said):
            PrepareSettings(**wrong)


@pytest.mark.parametrize("crop", ["foreground", "none", [4, 4, 4]], ids=str)
def test_an_empty_ct_is_refused_with_the_reason(crop):
    with pytest.raises(ValueError, match="a: an image is empty; check it"):
        prepare_case(
            {"ct": volume(np.zeros((9, 9, 9)))}, None, {}, PrepareSettings(window=[0, 80], crop=crop), name="a"
        )


def test_settings_that_are_not_used_are_as_in_stores_made_before_there_were_any():
    assert not {"window", "nan"} & PrepareSettings().as_json().keys()
    settings = PrepareSettings(window=[0, 80], nan="zero")
    assert PrepareSettings(**json.loads(json.dumps(settings.as_json()))) == settings


# ---------------------------------------------------------------------------------------------- a cohort


@pytest.fixture
def cohort(tmp_path: Path) -> list[Record]:
    """Four small heads with labels on disk."""
    source = tmp_path / "raw"
    source.mkdir()
    for number in range(4):
        image, label = ball((14 + number, 16, 13))
        for name, part in (("t1", image), ("seg", label.astype(np.uint8))):
            nib.save(nib.Nifti1Image(part, np.diag([-1, 1, 1, 1])), source / f"s{number}_{name}.nii.gz")
    return folder.records(source, images={"t1": "*_t1.nii.gz"}, label="*_seg.nii.gz")


def bytes_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def run(records: list[Record], out: Path, **more: object) -> prepare.CohortReport:
    workers = more.pop("workers", 1)
    return prepare_cohort(records, out, CohortSettings(**{"labels": LABELS, **more}), workers=workers, progress=False)


def test_a_second_run_skips_all_scans_without_giving_them_to_workers(cohort, tmp_path, monkeypatch):
    first = run(cohort, tmp_path / "store")
    assert first.prepared == ["s0", "s1", "s2", "s3"] and not first.failures and not first.warnings
    before = bytes_of(tmp_path / "store")
    monkeypatch.setattr(prepare, "prepare_scan", lambda *_, **__: pytest.fail("a scan was prepared again"))
    second = run(cohort, tmp_path / "store", workers=2)
    assert second.skipped == first.prepared and not second.prepared
    assert bytes_of(tmp_path / "store") == before
    assert Store(tmp_path / "store").verify() == []


def test_a_source_is_read_again_only_if_its_path_size_or_time_has_changed(cohort, tmp_path, monkeypatch):
    run(cohort, tmp_path / "store")
    read, digest = [], one_scan.sha256_of
    monkeypatch.setattr(one_scan, "sha256_of", lambda path: (read.append(Path(path).name), digest(path))[1])
    assert len(run(cohort, tmp_path / "store").skipped) == 4 and read == []
    os.utime(cohort[0]["images"]["t1"], ns=(0, 0))  # the same bytes
    assert len(run(cohort, tmp_path / "store").skipped) == 4 and read == ["s0_t1.nii.gz"]
    other = nib.load(cohort[2]["images"]["t1"])
    nib.save(nib.Nifti1Image(other.get_fdata()[:15], other.affine), cohort[1]["images"]["t1"])
    read.clear()
    assert run(cohort, tmp_path / "store").prepared == ["s1"] and read == ["s1_t1.nii.gz"]
    manifest = read_tree(tmp_path / "store")
    for record in manifest["records"]:
        for source in record["sources"].values():
            del source["size"], source["mtime_ns"]  # as earlier versions wrote it
    write_tree(tmp_path / "store", manifest)
    read.clear()
    assert len(run(cohort, tmp_path / "store").skipped) == 4
    assert sorted(set(read)) == sorted(path.name for path in (tmp_path / "raw").iterdir())


def test_workers_write_the_same_bytes_as_one_process(cohort, tmp_path):
    run(cohort, tmp_path / "one")
    run(cohort[::-1], tmp_path / "two", workers=2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


@pytest.mark.slow
def test_workers_that_are_spawned_write_the_same_bytes(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("asa.data.io.parallel.get_all_start_methods", lambda: ["spawn"])  # as on Windows
    monkeypatch.delattr("signal.SIGUSR1")
    run(cohort[:2], tmp_path / "one")
    run(cohort[:2], tmp_path / "two", workers=2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_bad_scan_is_named_and_does_not_affect_the_others(cohort, tmp_path):
    run(cohort, tmp_path / "good")
    Path(cohort[1]["images"]["t1"]).write_bytes(b"\x1f\x8b broken")
    Path(cohort[3]["label"]).unlink()
    report = run(cohort, tmp_path / "store")
    assert report.prepared == ["s0", "s2"]
    assert list(report.failures) == ["s1", "s3"]
    assert "s1_t1.nii.gz: damaged or truncated gzip" in report.failures["s1"]
    assert "s3_seg.nii.gz: no such file" in report.failures["s3"]
    assert all("\n" not in reason for reason in report.failures.values())
    good, some = bytes_of(tmp_path / "good"), bytes_of(tmp_path / "store")
    assert {name for name in good if "/s0" in name or "/s2" in name} | {"manifest.json", "records.jsonl"} == set(some)
    assert all(some[name] == good[name] for name in some if name != "records.jsonl")


def test_an_undeclared_label_names_the_file(cohort, tmp_path):
    report = run(cohort, tmp_path / "store", labels={2: "outer"})
    assert len(report.failures) == 4
    assert "s0_seg.nii.gz: label value 7 (" in report.failures["s0"]


def test_a_replaced_file_is_prepared_again(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    image, _ = ball((17, 16, 13))
    nib.save(nib.Nifti1Image(np.roll(image, 1, axis=1), np.diag([-1, 1, 1, 1])), cohort[3]["images"]["t1"])
    report = run(cohort, tmp_path / "store")
    assert report.prepared == ["s3"] and report.skipped == ["s0", "s1", "s2"]
    run(cohort, tmp_path / "fresh")
    assert bytes_of(tmp_path / "store") == bytes_of(tmp_path / "fresh")


def test_a_scan_that_loses_its_label_map_is_warned_about(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    for record in cohort[:2]:
        del record["label"]
    assert {id: "loses the label map" in said for id, (said,) in run(cohort, tmp_path / "store").warnings.items()} == {
        "s0": True,
        "s1": True,
    }
    assert Store(tmp_path / "store").label("s0") is None and not run(cohort, tmp_path / "store").warnings


def test_a_scan_that_became_invalid_is_removed_from_the_store(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    Path(cohort[2]["images"]["t1"]).write_bytes(b"")
    assert list(run(cohort, tmp_path / "store").failures) == ["s2"]
    assert [record["id"] for record in Store(tmp_path / "store").records] == ["s0", "s1", "s3"]
    assert not (tmp_path / "store/images/s2.npy").exists()


def test_law_a_source_that_cannot_be_read_now_loses_nothing(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    before = bytes_of(tmp_path / "store")
    (tmp_path / "raw").rename(tmp_path / "away")  # a disk that is not mounted
    failed = run(cohort, tmp_path / "store").failures
    assert list(failed) == ["s0", "s1", "s2", "s3"] and "no such file" in failed["s0"]
    assert bytes_of(tmp_path / "store") == before
    ambiguous = [{**cohort[0], "problem": "s0: both s0_a and s0_b match"}]
    assert list(run(ambiguous, tmp_path / "store").failures) == ["s0"] and bytes_of(tmp_path / "store") == before


def test_law_a_channel_that_a_scan_lacks_now_loses_nothing(cohort, tmp_path):
    both = [{**record, "images": {**record["images"], "flair": record["images"]["t1"]}} for record in cohort[:2]]
    filled = [both[0], {**both[1], "images": {**both[1]["images"], "flair": None}}]
    for records, how in ((both, {}), (filled, {"missing": "zero"})):  # its file is away; the setting is forgotten
        run(records, tmp_path / "store", **how)
        before = bytes_of(tmp_path / "store")
        failed = run(filled, tmp_path / "store").failures
        assert list(failed) == ["s1"] and failed["s1"].startswith("has no flair; add the file")
        assert bytes_of(tmp_path / "store") == before


def test_law_the_line_of_a_failed_scan_has_its_id_once(cohort, tmp_path):
    for record in cohort[:2]:
        image = nib.load(record["images"]["t1"])
        nib.save(nib.Nifti1Image(0 * image.get_fdata(), image.affine), record["images"]["t1"])
    records = in_dataset([cohort[0], {**cohort[1], "problem": "s1: both s1_a and s1_b match"}], "adni")
    failed = run(records, tmp_path / "store").failures
    assert list(failed) == ["adni_s0", "adni_s1"] and failed["adni_s1"] == "both s1_a and s1_b match"
    assert "s0" not in failed["adni_s0"]


def test_a_copy_does_not_put_out_the_scan_that_the_store_holds(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    copy = {"id": "a", "subject": "a", "images": cohort[2]["images"], "label": cohort[2]["label"]}
    failed = run([copy, *cohort], tmp_path / "store").failures
    assert list(failed) == ["a"] and "same scan as in s2" in failed["a"]
    assert [record["id"] for record in Store(tmp_path / "store").records] == ["s0", "s1", "s2", "s3"]


def test_regions_of_a_store_stay_where_more_scans_are_prepared_without_any(cohort, tmp_path):
    regions = {"whole": [2, 7]}
    run(cohort[:2], tmp_path / "store", regions=regions)
    run(cohort, tmp_path / "store")
    assert Store(tmp_path / "store").regions == regions


def test_a_missing_array_is_prepared_again(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    before = bytes_of(tmp_path / "store")
    (tmp_path / "store/images/s1.npy").unlink()
    (tmp_path / "store/labels/s2.npy").write_bytes(b"half")
    assert run(cohort, tmp_path / "store").prepared == ["s1", "s2"]
    assert bytes_of(tmp_path / "store") == before


def test_scans_prepared_by_other_versions_are_marked_by_them_and_no_others(cohort, tmp_path, monkeypatch):
    store = tmp_path / "store"
    run(cohort[:2], store)
    manifest, lines = (store / "manifest.json").read_bytes(), (store / "records.jsonl").read_bytes()
    mine, own = asa.__version__, prepare._version
    monkeypatch.setattr(asa, "__version__", "9.9.9")
    monkeypatch.setattr(prepare, "_version", lambda name: None if name == "scipy" else own(name))
    warned = rf"made with other versions \(asa 9.9.9 instead of {mine}, scipy None instead of .*\): scans are marked"
    with pytest.warns(UserWarning, match=warned):
        assert run(cohort, store).prepared == ["s2", "s3"]
    assert (store / "manifest.json").read_bytes() == manifest
    assert (store / "records.jsonl").read_bytes().startswith(lines)
    marked = {"asa": "9.9.9", "scipy": None}
    assert [record.get("software") for record in Store(store).records] == [None, None, marked, marked]
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the versions of the manifest again
        Path(cohort[2]["images"]["t1"]).touch()
        (store / "images" / "s3.npy").unlink()
        assert run(cohort, store).prepared == ["s3"]
    assert [record.get("software") for record in Store(store).records] == [None, None, marked, None]


def test_two_cohorts_are_prepared_into_one_store(cohort, tmp_path):
    run(cohort[:2], tmp_path / "store")
    report = run([{**cohort[2], "id": "other"}], tmp_path / "store")  # of another reader: none of the earlier scans
    assert report.prepared == ["other"] and Store(tmp_path / "store").records.ids == ["other", "s0", "s1"]
    run(cohort[:2], tmp_path / "alone")
    same = bytes_of(tmp_path / "alone")
    assert {name: both for name, both in bytes_of(tmp_path / "store").items() if "/s" in name} == {
        name: one for name, one in same.items() if "/s" in name
    }


def test_a_crop_given_as_a_tuple_continues_its_store(cohort, tmp_path):
    settings = PrepareSettings(crop=(16, 16, 16))
    assert len(run(cohort, tmp_path / "store", settings=settings).prepared) == 4
    assert len(run(cohort, tmp_path / "store", settings=settings).skipped) == 4


def test_a_store_with_other_settings_is_refused(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    for other, reason in (
        ({"settings": PrepareSettings(margin=1)}, r"made with other settings \(prepare.margin: 4 there, 1 here\)"),
        ({"labels": {2: "outer", 7: "core"}}, "made with labels"),
        ({"ignored": [9]}, r"made with ignored \[\], now asked for \[9\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(cohort, tmp_path / "store", **other)


def test_a_refused_cohort_does_not_mark_the_store_as_unfinished(cohort, tmp_path):
    run(cohort, tmp_path / "store")
    before = bytes_of(tmp_path / "store")
    records = [{**record, "id": "S0"} for record in cohort if record["id"] == "s0"]
    with pytest.raises(ValueError, match="differ in case"):
        run(records, tmp_path / "store")
    assert bytes_of(tmp_path / "store") == before


def test_a_store_without_scans_takes_other_settings(cohort, tmp_path):
    assert run(cohort, tmp_path / "store", labels={}).failures  # forgotten: no scan is prepared
    assert (tmp_path / "store" / "records.jsonl").read_bytes() == b""
    run(cohort, tmp_path / "store")
    assert Store(tmp_path / "store").labels and Store(tmp_path / "store").records


def test_an_exception_keeps_the_scans_that_are_done_and_who_reads_them_is_warned(cohort, tmp_path, monkeypatch):
    run(cohort, tmp_path / "whole")
    prepare_scan = prepare.prepare_scan

    def stop_at_the_third(job, **how):
        if job.record["id"] == "s2":
            raise KeyboardInterrupt
        return prepare_scan(job, **how)

    monkeypatch.setattr(prepare, "prepare_scan", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(cohort, tmp_path / "store")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="asa-prepare was stopped, or is still at work: 2 scans so far"):
        Store(tmp_path / "store")
    report = run(cohort, tmp_path / "store")
    assert report.skipped == ["s0", "s1"] and report.prepared == ["s2", "s3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store(tmp_path / "store")
    assert bytes_of(tmp_path / "store") == bytes_of(tmp_path / "whole")


def test_the_picture_of_a_scan_that_was_done_before_is_that_of_a_new_one(raw, tmp_path):
    records, seen = folder.records(raw, images={"t1": "*_T1.nii.gz"})[:1], []
    for _ in range(2):
        prepare_cohort(records, tmp_path / "store", CohortSettings(), progress=False, on_scan=seen.append)
    new, before = (scan.thumbnail for scan in seen)
    np.testing.assert_allclose(before.midline, new.midline, atol=1e-3)
    for one, other in zip(new.grey, before.grey, strict=True):
        assert one.any() and np.abs(np.int16(one) - np.int16(other)).max() <= 1
    for one, other in zip(new.brain, before.brain, strict=True):  # a few darkest voxels of the brain are 0
        assert one.any() and (one != other).mean() < 0.005


def test_a_killed_run_continues_to_the_same_bytes(cohort, tmp_path):
    run(cohort, tmp_path / "whole")
    script = (
        "import os, sys\n"
        "from asa.data.io import files\n"
        "from asa.data.preprocessing import cohort as prepare\n"
        "from asa.data.datasets import folder\n"
        "calls, replace = [], os.replace\n"
        "def die(part, path):\n"  # while the second scan's label lies half-way
        "    calls.append(path)\n"
        "    os._exit(9) if len(calls) == 6 else replace(part, path)\n"
        "os.replace, prepare.SAVE_EVERY = die, 0\n"
        "records = folder.records(sys.argv[1], images={'t1': '*_t1.nii.gz'}, label='*_seg.nii.gz')\n"
        "cohort = prepare.CohortSettings({2: 'outer', 7: 'inner'})\n"
        "prepare.prepare_cohort(records, sys.argv[2], cohort, progress=False)\n"
    )
    root = str(Path(prepare.__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "raw"), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 9
    assert list((tmp_path / "store").rglob(".*.part"))  # the kill left a half-written file
    assert Store(tmp_path / "store").records.ids == ["s0"]
    assert run(cohort, tmp_path / "store").skipped == ["s0"]
    assert bytes_of(tmp_path / "store") == bytes_of(tmp_path / "whole")


def test_finished_scans_are_in_the_store_during_the_run(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0.0)
    counts = []
    prepare_scan = prepare.prepare_scan

    def count(job, **how):
        counts.append(len((tmp_path / "store/records.jsonl").read_text().splitlines()))
        return prepare_scan(job, **how)

    monkeypatch.setattr(prepare, "prepare_scan", count)
    run(cohort, tmp_path / "store")
    assert counts == [0, 1, 2, 3]


def test_the_store_does_not_depend_on_the_time(cohort, tmp_path, monkeypatch):
    run(cohort, tmp_path / "one")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run(cohort, tmp_path / "two")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


@pytest.mark.parametrize("labels", [{0: "background"}, {1: ""}, {1: "a", 2: "a"}, {1: 1}, {True: "a"}])
def test_invalid_labels_are_refused(cohort, tmp_path, labels):
    with pytest.raises(ValueError, match="labels: "):
        run(cohort, tmp_path / "store", labels=labels)
    assert not (tmp_path / "store").exists()


def test_law_an_ignored_value_that_is_no_list_is_refused_by_its_key():
    with pytest.raises(ValueError, match=r"^ignored=1: give a list of label values, like ignored=\[4\]"):
        CohortSettings(ignored=1)


def test_a_region_of_something_else_than_labels_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"^regions: whole joins \[\[1\]\]; give values that labels names"):
        CohortSettings({1: "a"}, regions={"whole": [[1]]})


def test_warnings_of_a_scan_are_reported_with_it(cohort, tmp_path):
    report = run(cohort, tmp_path / "store", settings=PrepareSettings(crop=6))
    assert set(report.warnings) == {"s0", "s1", "s2", "s3"}
    assert "of the foreground" in report.warnings["s0"][0] and "labelled voxels" in report.warnings["s0"][1]


@needs_scans
def test_a_real_label_goes_through_the_store_and_back_into_its_own_file(tmp_path):
    records = folder.records(SHARED / "oasis15", images={"t1": "*_SS.nii.gz"}, label="*_tissues.nii.gz")[:1]
    labels = {1: "csf", 2: "gm", 3: "wm"}
    report = prepare_cohort(records, tmp_path / "store", CohortSettings(labels=labels), progress=False)
    assert report.prepared == ["1000"] and not report.warnings
    store = Store(tmp_path / "store")
    values = np.array([0, *store.label_values], np.uint8)
    native = to_native(values[store.label("1000")], store.record("1000")["chain"])[0]
    source = read_image(records[0]["images"]["t1"])
    write_label(tmp_path / "back.nii.gz", native, source)
    truth, back = read_label(records[0]["label"]), read_label(tmp_path / "back.nii.gz")
    check_same_geometry(back, truth, "back")
    np.testing.assert_array_equal(back.data, truth.data)
    assert store.record("1000")["label_voxels"] == {
        name: int((truth.data == value).sum()) for value, name in labels.items()
    }


@needs_scans
def test_a_real_head_with_thick_slices_is_resampled_and_comes_back():
    head = read_image(SHARED / "raw_heads/openms12_T1W.nii.gz")
    case = prepare_case({"t1": head}, None, {}, PrepareSettings(spacing=2.0))
    np.testing.assert_allclose(np.linalg.norm(np.array(case.chain["stored_affine"])[:3, :3], axis=0), 2, atol=1e-3)
    back = to_native(case.image, case.chain)[0]
    assert back.shape == head.data.shape
    assert np.corrcoef(back.ravel(), head.data.ravel())[0, 1] > 0.95
