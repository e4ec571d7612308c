"""Images are read whole and checked, and go back to the file's own space to the bit."""

import dataclasses
import itertools
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from asa.data.io.files import read_json, sha256_of
from asa.data.io.nifti import (
    axis_codes,
    check_same_geometry,
    from_ras,
    read_image,
    read_label,
    spacing_of,
    to_ras,
    write_image,
    write_label,
)
from asa.data.io.tables import read_rows

SHARED = Path(__file__).parents[4] / "shared/data"
needs_scans = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real scans are not here: no {SHARED}")

SIDES = ("LR", "PA", "IS")
ORIENTATIONS = ["".join(turned) for code in itertools.product(*SIDES) for turned in itertools.permutations(code)]
OBLIQUE = np.array([[-0.9, 0.1, 0.2, 40], [0.05, -1.1, 0.3, 60], [0.1, 0.25, 2.9, -30], [0, 0, 0, 1]])


def affine_towards(code: str) -> np.ndarray:
    """Affine of 1 mm voxels whose array axes point to the three letters."""
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for column, letter in enumerate(code):
        row = next(row for row, side in enumerate(SIDES) if letter in side)
        affine[row, column] = 1 if letter in "RAS" else -1
    return affine


def save(path: Path, data: np.ndarray, affine: Any = OBLIQUE) -> Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, (7, 8, 6)).astype(np.float32)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "a.img.gz"])
def test_files_of_nibabel_are_read(tmp_path, noise, name):
    kind = nib.Nifti1Pair if ".img" in name else nib.Nifti1Image
    nib.save(kind(noise, OBLIQUE), tmp_path / name)
    read = read_image(tmp_path / name)
    assert read.data.dtype == np.float32
    np.testing.assert_array_equal(read.data, noise)
    np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-5)


def test_nifti2_is_read(tmp_path, noise):
    nib.save(nib.Nifti2Image(noise, OBLIQUE), tmp_path / "a.nii")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").data, noise)


@pytest.mark.parametrize("ending", [".mgz", ".mgh"])
def test_freesurfers_files_are_read_and_written_on_their_grid(tmp_path, noise, ending):
    affine = OBLIQUE.copy()
    affine[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] @ np.diag([1.0, 2, 3])
    nib.save(nib.MGHImage(noise, affine), tmp_path / f"a{ending}")
    read = read_image(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(read.data, noise)
    np.testing.assert_allclose(read.affine, affine, atol=1e-4)
    values = np.arange(noise.size).reshape(noise.shape) % 2036
    for name in (f"label{ending}", "label.nii.gz"):
        write_label(tmp_path / name, values, read)
        again = read_label(tmp_path / name)
        np.testing.assert_array_equal(again.data, values)
        np.testing.assert_allclose(again.affine, affine, atol=1e-4)
    write_image(tmp_path / f"image{ending}", noise, affine)
    for name in ("label", "image"):  # gzip's first bytes
        assert ((tmp_path / f"{name}{ending}").read_bytes()[:2] == b"\x1f\x8b") == (ending == ".mgz")
    whole = (tmp_path / f"a{ending}").read_bytes()
    (tmp_path / f"cut{ending}").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=rf"cut{ending}: .*truncated"):
        read_image(tmp_path / f"cut{ending}")
    lost = nib.MGHImage(noise, affine)
    lost.header["goodRASFlag"] = 0
    (tmp_path / "lost.mgh").write_bytes(lost.to_bytes())
    with pytest.raises(ValueError, match=r"lost\.mgh: no orientation; find out"):
        read_image(tmp_path / "lost.mgh")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_files_of_itk_are_read_as_their_nifti(tmp_path, noise, ending):
    sitk = pytest.importorskip("SimpleITK")
    affine = OBLIQUE.copy()
    affine[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] @ np.diag([1.0, 2, 3])
    nib.save(nib.Nifti1Image(noise.astype(np.int16), affine), tmp_path / "a.nii")
    image = sitk.ReadImage(str(tmp_path / "a.nii"))
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.Cast(image, sitk.sitkInt64), str(path), True)  # the type of NumPy's label maps
    assert np.array_equal(read_label(path).data, noise.astype(np.int16))
    sitk.WriteImage(image, str(path), True)
    read = read_image(path)
    np.testing.assert_array_equal(read.data, noise.astype(np.int16))
    np.testing.assert_allclose(read.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(read_label(path).data, noise.astype(np.int16))
    write_label(tmp_path / "l.nii.gz", read.data.astype(int), read)
    np.testing.assert_allclose(read_label(tmp_path / "l.nii.gz").affine, affine, atol=1e-4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])
    with pytest.raises(ValueError, match=rf"a{ending}: not a {ending} image, or damaged"):
        read_image(path)
    unstated = whole.replace(b"space: left-posterior-superior", b"space dimension: 3")
    path.write_bytes(unstated.replace(b"TransformM", b"M"))
    with pytest.raises(ValueError, match=rf"a{ending}: no orientation; find out"):
        read_image(path)
    header = whole.split(b"\n\n")[0].replace(b"ElementDataFile = LOCAL", b"ElementDataFile = other.raw")
    path.write_bytes(header + b"\ndata file: other.raw\n\n" if ending == ".nrrd" else header)
    with pytest.raises(ValueError, match="its voxels lie in another file"):
        read_image(path)


def test_a_nrrd_in_ras_is_turned(tmp_path):
    pytest.importorskip("SimpleITK")
    head = "NRRD0004\ntype: uint8\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 3 4\nencoding: raw\n"
    head += "space directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (5,6,7)\nkinds: domain domain domain\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + bytes(range(24)))
    read = read_image(tmp_path / "a.nrrd")
    np.testing.assert_allclose(read.affine, [[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_array_equal(read.data, np.arange(24).reshape(4, 3, 2).T)


def test_an_image_is_written_with_both_forms_of_its_affine_in_mm(tmp_path):
    affine = np.array([[0, 0.8, 0, 5], [-1, 0, 0, 6], [0, 0, 1.5, 7], [0, 0, 0, 1]], float)
    write_image(tmp_path / "a.nii", np.array([[[0.4, 0.6, -1.7]]]), affine, dtype=np.int16)
    image = nib.load(tmp_path / "a.nii")
    for written, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        np.testing.assert_allclose(written, affine, atol=1e-6)
        assert code == 1
    assert image.header.get_xyzt_units()[0] == "mm" and image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(image.get_fdata(), [[[0, 1, -2]]])


def test_a_qform_turned_against_the_sform_is_told_with_angle_and_shift(tmp_path, noise):
    angle = np.radians(12)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = nib.Nifti1Image(noise, np.eye(4))
    image.set_sform(np.eye(4), code=1)
    image.set_qform(turned, code=1)
    nib.save(image, tmp_path / "a.nii")
    apart = np.linalg.norm((turned - np.eye(4)) @ [6, 7, 0, 1])  # of the corner that is farthest from the axis
    with pytest.warns(UserWarning, match=rf"differ by 12\.0 degrees and up to {apart:.1f} mm"):
        read_image(tmp_path / "a.nii")
    image.set_qform(np.eye(4), code=1)
    nib.save(image, tmp_path / "a.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "a.nii")


def test_a_sheared_sform_that_itk_refuses_is_told(tmp_path, noise):
    sitk = pytest.importorskip("SimpleITK")
    for shear, refused in ((1e-2, True), (5e-4, True), (1e-4, False)):
        affine = np.eye(4)
        affine[0, 1] = shear
        image = nib.Nifti1Image(noise, affine)
        image.set_sform(affine, code=1)
        image.set_qform(None, code=0)
        nib.save(image, tmp_path / "a.nii")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_image(tmp_path / "a.nii")
        assert ["not at right angles" in str(one.message) for one in caught] == [True] * refused
        with pytest.raises(RuntimeError) if refused else nullcontext():
            sitk.ReadImage(str(tmp_path / "a.nii"))


def test_a_sheared_file_of_freesurfers_is_told(tmp_path, noise):
    for shear, told in ((1e-2, True), (0.0, False)):
        affine = np.eye(4)
        affine[0, 1] = shear
        nib.save(nib.MGHImage(noise.astype(np.float32), affine), tmp_path / "a.mgz")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_image(tmp_path / "a.mgz")
        assert ["not at right angles" in str(one.message) for one in caught] == [True] * told


@pytest.mark.parametrize(
    ("values", "rounded"), [((0.9845, 2.0156), True), ((4.99975, 3), True), ((0.5, 2), False), ((0.97, 2), False)]
)
def test_labels_next_to_whole_numbers_are_rounded_and_others_refused(tmp_path, values, rounded):
    data = np.zeros((4, 5, 6), np.float32)
    data[1, 1, 1], data[2, 2, 2] = values
    path = save(tmp_path / "a.nii", data)
    if rounded:
        with pytest.warns(UserWarning, match="from whole numbers, and are rounded"):
            found = read_label(path).data
        np.testing.assert_array_equal(found, np.rint(data))
    else:
        with pytest.raises(ValueError, match="are not whole numbers"):
            read_label(path)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("a.nii.gz", "a.nii"), ("a.nii", "a.nii.gz"), ("a.mgz", "a.mgh"), ("a.mgh", "a.mgz"), ("a.img.gz", "a.img")],
)
def test_a_file_whose_name_is_wrong_about_gzip_is_read_and_its_name_told(tmp_path, noise, wrong, right):
    kind = nib.MGHImage if ".mg" in right else nib.Nifti1Pair if ".img" in right else nib.Nifti1Image
    nib.save(kind(noise, np.eye(4)), tmp_path / right)
    (tmp_path / right).rename(tmp_path / wrong)
    with pytest.warns(UserWarning, match=rf"{wrong}: is .*compressed by gzip, though .* rename it to {right}$"):
        np.testing.assert_array_equal(read_image(tmp_path / wrong).data, noise)


def test_a_link_or_pointer_of_git_annex_says_how_to_get_the_content(tmp_path):
    (tmp_path / "a.nii.gz").symlink_to("../.git/annex/objects/Xk/0j/MD5E-s12--ab.nii.gz/MD5E-s12--ab.nii.gz")
    (tmp_path / "b.nii.gz").write_text("/annex/objects/MD5E-s12--ab.nii.gz\n")
    for name in ("a.nii.gz", "b.nii.gz"):
        for read in (read_image, sha256_of, read_json, read_rows):
            with pytest.raises(FileNotFoundError, match=rf"{name}: its content is not here.*datalad get"):
                read(tmp_path / name)


def test_the_header_scales_intensities(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), OBLIQUE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    with (tmp_path / "a.nii").open("r+b") as file:  # nibabel writes the voxels for its own slope
        file.seek(112)
        file.write(np.array([0.5, -3], dtype="<f4").tobytes())
    raw = np.asanyarray(nib.load(tmp_path / "a.nii").dataobj.get_unscaled())
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").data, raw * 0.5 - 3)


def test_a_trailing_axis_of_one_is_dropped(tmp_path, noise):
    assert read_image(save(tmp_path / "a.nii.gz", noise[..., None])).data.shape == noise.shape


def test_analyze_is_read_with_a_warning_about_its_orientation(tmp_path, noise):
    nib.save(nib.AnalyzeImage(noise, np.diag([-2.0, 2, 2, 1])), tmp_path / "a.img")
    for name in ("a.img", "a.hdr"):
        with pytest.warns(UserWarning, match=r"a\.(img|hdr): Analyze stores no orientation; assumed to be LAS"):
            read = read_image(tmp_path / name)
        np.testing.assert_array_equal(read.data, noise)
        np.testing.assert_allclose(spacing_of(read.affine), 2)


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_a_truncated_file_is_refused(tmp_path, noise, cut):
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, noise)
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(ValueError, match=rf"{name}: .*truncated"):
            read_image(path)


def test_any_flipped_byte_of_a_gzip_is_detected(tmp_path, noise):
    path = save(tmp_path / "a.nii.gz", noise)
    whole = path.read_bytes()
    for place in range(40, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.nii\.gz: damaged or truncated gzip"):
            read_image(path)


def test_an_invalid_image_is_refused_by_name(tmp_path, noise):
    broken = noise.copy()
    broken[0, 0, :2] = np.nan, np.inf
    headless = nib.Nifti1Image(noise, None)
    colours = nib.Nifti1Image(np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]), OBLIQUE)
    nib.save(headless, tmp_path / "headless.nii")
    nib.save(colours, tmp_path / "colours.nii")
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "text.nii").write_text("no image " * 100)
    (tmp_path / "short.nii").write_text("no image")
    (tmp_path / "plain.nii.gz").write_text("not packed")
    (tmp_path / "photo.png").write_text("no image")
    save(tmp_path / "nan.nii", broken)
    save(tmp_path / "series.nii", np.stack([noise, noise], axis=-1))
    save(tmp_path / "slice.nii", noise[..., :1])
    nib.save(nib.Nifti1Pair(noise, OBLIQUE), tmp_path / "alone.img")
    (tmp_path / "alone.hdr").unlink()
    reasons = {
        "headless.nii": "no orientation",
        "colours.nii": "not numbers",
        "empty.nii.gz": "the file is empty",
        "text.nii": "not a NIfTI or Analyze image",
        "short.nii": "not a NIfTI or Analyze image",
        "plain.nii.gz": "not a NIfTI or Analyze image",
        "photo.png": "not an image that asa reads",
        "nan.nii": "2 voxels are NaN or infinite",
        "series.nii": "not 3-D",
        "slice.nii": "single slice",
        "alone.img": "the other file of the pair, alone.hdr, is missing",
        "missing.nii.gz": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_singular_affine_is_refused(tmp_path, noise):
    image = nib.Nifti1Image(noise, OBLIQUE)
    flat = OBLIQUE.copy()
    flat[:, 1] = flat[:, 0]
    image.header.set_sform(flat, code=1)
    image.header.set_qform(np.eye(4), code=0)
    image.header["vox_offset"] = 352
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + b"\0" * 4 + noise.tobytes("F"))
    with pytest.raises(ValueError, match="affine is singular"):
        read_image(tmp_path / "a.nii")


# ---------------------------------------------------------------------------------------------- labels


def test_whole_numbers_stored_as_floats_are_labels(tmp_path):
    values = np.array([0, 1, 2, 300], dtype=np.float32)[np.arange(60).reshape(3, 4, 5) % 4]
    read = read_label(save(tmp_path / "a.nii.gz", values))
    assert read.data.dtype == np.int16
    np.testing.assert_array_equal(read.data, values)


def test_labels_between_whole_numbers_are_refused(tmp_path):
    values = np.zeros((3, 4, 5), np.float32)
    values[1, 1, 1] = 1.5
    with pytest.raises(ValueError, match=r"1 label values are not whole numbers \(one is 1.5\)"):
        read_label(save(tmp_path / "a.nii.gz", values))


@pytest.mark.parametrize("name", ["label.nii", "label.nii.gz"])
def test_a_written_label_keeps_the_space_of_its_image(tmp_path, noise, name):
    image = nib.Nifti1Image(noise, None)
    image.set_sform(OBLIQUE, code=4)
    image.set_qform(np.diag([2.0, 2, 2, 1]), code=1)  # not the same: both have to survive
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(2.0, 5.0)
    image.header["cal_max"] = 900  # a display window, in which label maps would be black
    nib.save(image, tmp_path / "image.nii.gz")
    label = (noise > 100).astype(np.int64) * 3
    write_label(tmp_path / name, label, read_image(tmp_path / "image.nii.gz"))
    before, after = nib.load(tmp_path / "image.nii.gz"), nib.load(tmp_path / name)
    for form in ("get_sform", "get_qform"):
        for one, other in zip(getattr(before, form)(coded=True), getattr(after, form)(coded=True), strict=True):
            np.testing.assert_array_equal(one, other)
    assert after.header.get_xyzt_units() == ("mm", "sec")
    assert after.get_data_dtype() == np.uint8 and after.header["cal_max"] == 0
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), label)
    np.testing.assert_array_equal(read_label(tmp_path / name).data, label)


@pytest.mark.parametrize(("value", "dtype"), [(255, np.uint8), (256, np.int16), (-1, np.int16), (40000, np.int32)])
def test_a_label_has_the_smallest_type_that_holds_it(tmp_path, noise, value, dtype):
    like = read_image(save(tmp_path / "image.nii", noise))
    write_label(tmp_path / "label.nii.gz", np.full(noise.shape, value), like)
    assert nib.load(tmp_path / "label.nii.gz").get_data_dtype() == dtype


def test_a_label_is_written_on_the_grid_of_an_analyze_pair_or_a_4d_file_with_one_volume(tmp_path, noise):
    nib.save(nib.AnalyzeImage(noise, np.diag([-2.0, 2, 2, 1])), tmp_path / "a.img")
    nib.save(nib.Nifti1Pair(noise, OBLIQUE), tmp_path / "b.img")
    save(tmp_path / "c.nii", noise[..., None])
    for name in ("a.img", "b.img", "c.nii"):
        with pytest.warns(UserWarning, match="no orientation") if name == "a.img" else nullcontext():
            like = read_image(tmp_path / name)
        write_label(tmp_path / "label.nii.gz", noise > 100, like)
        written = read_label(tmp_path / "label.nii.gz")
        check_same_geometry(written, like, name)
        np.testing.assert_array_equal(written.data, noise > 100)


def test_labels_that_do_not_fit_their_image_are_refused(tmp_path, noise):
    like = read_image(save(tmp_path / "image.nii", noise))
    for wrong, reason in ((noise, "must be integers"), (np.zeros((2, 2, 2), int), "does not fit")):
        with pytest.raises(ValueError, match=reason):
            write_label(tmp_path / "label.nii.gz", wrong, like)
    with pytest.raises(ValueError, match="ending"):
        write_label(tmp_path / "label.png", noise > 0, like)
    assert [path.name for path in tmp_path.iterdir()] == ["image.nii"]


def test_writing_twice_gives_the_same_bytes(tmp_path, noise, monkeypatch):
    for name, now in (("a.nii.gz", 1.0), ("b.nii.gz", 2e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write_image(tmp_path / name, noise, OBLIQUE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    read = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read.data, noise)
    np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-5)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, noise, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_image(path, noise, OBLIQUE)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_image(path, noise + 1, OBLIQUE)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_integers_that_do_not_fit_are_refused(tmp_path, noise):
    with pytest.raises(ValueError, match="do not fit uint8"):
        write_image(tmp_path / "a.nii", noise * 10, OBLIQUE, dtype=np.uint8)


# ---------------------------------------------------------------------------------------------- geometry


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_orientation_turns_to_ras_and_back_exactly(code, noise):
    affine = affine_towards(code)
    assert axis_codes(affine) == code
    turned, turned_affine, orientation = to_ras(noise, affine)
    assert axis_codes(turned_affine) == "RAS"
    index = np.array([2, 3, 1])
    place = (affine @ [*index, 1])[:3]  # the same point of the head under both affines
    there = np.rint(np.linalg.solve(turned_affine, [*place, 1])[:3]).astype(int)
    assert turned[tuple(there)] == noise[tuple(index)]
    np.testing.assert_array_equal(from_ras(turned, orientation), noise)


def test_an_oblique_scan_turns_to_the_nearest_axes(noise):
    turned, affine, orientation = to_ras(noise, OBLIQUE)
    assert axis_codes(OBLIQUE) == "LPS" and axis_codes(affine) == "RAS"
    np.testing.assert_array_equal(turned, noise[::-1, ::-1])
    np.testing.assert_array_equal(from_ras(turned, orientation), noise)


def test_geometry_may_differ_by_a_tenth_of_a_millimetre(tmp_path, noise):
    one = read_image(save(tmp_path / "a.nii", noise))
    for shift, fits in ((0.05, True), (0.2, False)):
        moved = OBLIQUE.copy()
        moved[0, 3] += shift
        other = read_image(save(tmp_path / "b.nii", noise, moved))
        if fits:
            check_same_geometry(one, other, "t1 and label of x")
        else:
            with pytest.raises(ValueError, match=r"t1 and label of x: .*0\.20 mm apart"):
                check_same_geometry(one, other, "t1 and label of x")
    smaller = read_image(save(tmp_path / "c.nii", noise[:-1]))
    with pytest.raises(ValueError, match="shapes"):
        check_same_geometry(one, smaller, "t1 and label of x")
    mirrored = dataclasses.replace(one, data=one.data[::-1], affine=one.affine @ np.diag([-1.0, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"the axes of one point to \w{3} and of the other to \w{3}: reorient one"):
        check_same_geometry(one, mirrored, "t1 and label of x")


def test_a_rotated_grid_is_detected_at_its_corners(tmp_path, noise):
    one = read_image(save(tmp_path / "a.nii", noise, np.eye(4)))
    angle = 0.1  # the first voxel stays, the far corners move
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    with pytest.raises(ValueError, match="mm apart"):
        check_same_geometry(one, read_image(save(tmp_path / "b.nii", noise, turned)), "x")


@needs_scans
def test_real_scans_are_read_and_a_label_fits_its_image():
    image = read_image(SHARED / "oasis15/1000_SS.nii.gz")
    label = read_label(SHARED / "oasis15/1000_tissues.nii.gz")
    check_same_geometry(image, label, "1000")
    assert axis_codes(image.affine) == "LAS" and set(np.unique(label.data)) == {0, 1, 2, 3}
    head = read_image(SHARED / "raw_heads/openms01_T1W.nii.gz")
    turned, affine, orientation = to_ras(head.data, head.affine)
    assert axis_codes(affine) == "RAS"
    np.testing.assert_array_equal(from_ras(turned, orientation), head.data)
    np.testing.assert_allclose(spacing_of(affine), (0.71875, 0.71875, 3), atol=1e-3)


def test_voxels_that_begin_as_a_gzip_does_are_voxels(tmp_path):
    values = np.full((4, 4, 4), 0x8B1F, np.uint16)
    nib.save(nib.Nifti1Pair(values, OBLIQUE), tmp_path / "a.img")
    np.testing.assert_array_equal(read_image(tmp_path / "a.hdr").data, values)
