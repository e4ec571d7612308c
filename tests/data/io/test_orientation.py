"""Files that store no orientation become NIfTI with the stated orientation."""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from asa.cli import orient as command
from asa.cli import set_orientation
from asa.data.io.nifti import axis_codes, read_image, read_label, spacing_of, to_ras
from asa.data.io.orientation import orient_files

# A head whose voxels differ in all directions: the value says where it lies, right, front and top.
RIGHT, FRONT, TOP = np.meshgrid(*(np.arange(n, dtype=np.int16) for n in (4, 5, 6)), indexing="ij")
HEAD = (100 * RIGHT + 10 * FRONT + TOP).astype(np.int16)


def as_stored(axes: str) -> np.ndarray:
    """The head as an array whose axes point to where the letters say."""
    order = ["RL", "AP", "SI"]
    places = [next(k for k, pair in enumerate(order) if letter in pair) for letter in axes]
    array = HEAD.transpose(places)
    return np.flip(array, [k for k, letter in enumerate(axes) if letter in "LPI"])


def nameless(path: Path, array: np.ndarray, zooms: tuple[float, ...] = (1.0, 1.25, 1.5)) -> Path:
    """A NIfTI file with both codes 0, or an Analyze pair."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.AnalyzeImage(array, None) if path.suffix in (".img", ".hdr") else nib.Nifti1Image(array, None)
    image.header.set_zooms((*zooms, *(1,) * (array.ndim - 3)))
    nib.save(image, path)
    return path


@pytest.mark.parametrize("axes", ["RAS", "LAS", "ASL", "PIR", "SLP", "asl"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img"])
def test_with_the_stated_orientation_every_voxel_has_its_position(tmp_path: Path, axes: str, name: str) -> None:
    source = nameless(tmp_path / "in" / name, as_stored(axes.upper()))
    assert orient_files(source, tmp_path / "out", axes) == (["a"], [], {})
    written = read_label(tmp_path / "out" / "a.nii.gz")
    assert axis_codes(written.affine) == axes.upper()
    np.testing.assert_array_equal(to_ras(written.data, written.affine)[0], HEAD)
    np.testing.assert_allclose(spacing_of(written.affine), (1, 1.25, 1.5))
    middle = written.affine @ [*((np.array(written.data.shape) - 1) / 2), 1]
    np.testing.assert_allclose(middle[:3], 0, atol=1e-5)


def test_big_endian_and_scaled_values_are_kept(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(HEAD[..., None].astype(">i2"), None), tmp_path / "raw.img")
    scaled = nib.Nifti1Image(HEAD, None)
    scaled.header.set_slope_inter(0.5, -3)
    payload = bytearray(scaled.to_bytes())
    payload[112:120] = np.array([0.5, -3], dtype="<f4").tobytes()
    (tmp_path / "scaled.nii").write_bytes(payload)
    nib.save(nib.Nifti1Image(HEAD.astype(np.int64), None, dtype=np.int64), tmp_path / "long.nii")
    for name, values in (("raw.hdr", HEAD), ("scaled.nii", 0.5 * HEAD - 3), ("long.nii", HEAD)):
        orient_files(tmp_path / name, tmp_path / "out", "LAS")
        np.testing.assert_allclose(read_image(tmp_path / "out" / f"{name[:-4]}.nii.gz").data, values)


def test_a_folder_keeps_its_layout_and_files_with_an_orientation_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    nameless(folder / "one" / "t1.img", HEAD)
    nameless(folder / "two" / "t1.nii.gz", HEAD)
    nib.save(nib.Nifti1Image(HEAD, np.eye(4)), folder / "known.nii")
    (folder / "broken.nii").write_text("no image")
    arguments = ["asa-orient", f"input={folder}", f"out={tmp_path / 'out'}", "axes=LAS"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main() == 1
    output = "".join(capsys.readouterr())
    assert (
        "broken: failed: " in output
        and "not written, as an orientation is stored: 1 file" in output
        and "like known" in output
    )
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.nii.gz"))
    assert found == ["one/t1.nii.gz", "two/t1.nii.gz"]
    (folder / "broken.nii").unlink()
    assert command.main() == 0
    assert "wrote 2 files" in capsys.readouterr().out


def test_links_to_content_that_git_annex_has_elsewhere_are_counted_in_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.nii.gz", "b.hdr", "b.img", "c.nii"):
        (tmp_path / "in" / name).symlink_to(".git/annex/objects/ab/MD5E-s1--x/MD5E-s1--x")
    for source, reason in (("in", "3 files failed"), ("in/a.nii.gz", "datalad get")):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            set_orientation({"input": tmp_path / source, "out": tmp_path / "out", "axes": "LAS"})
    (line,) = capsys.readouterr().out.splitlines()
    assert "a: failed: " in line and line.endswith("in its dataset (3 files like this one)")


def test_a_file_of_the_same_name_is_not_replaced(tmp_path: Path) -> None:
    source = nameless(tmp_path / "a.nii.gz", HEAD)
    target = tmp_path / "out" / "a.nii.gz"
    for _ in range(2):  # the same command again
        assert orient_files(source, tmp_path / "out", "LAS") == (["a"], [], {})
    for other in (target.read_bytes(), b"of somebody else"):
        target.write_bytes(other)
        written, _, failures = orient_files(source, tmp_path / "out", "PSR")
        assert not written and f"{target}: exists" in failures["a"] and target.read_bytes() == other
    kept = source.read_bytes()
    assert "exists" in orient_files(source, tmp_path, "LAS")[2]["a"] and source.read_bytes() == kept


def test_invalid_input_is_refused_with_a_remedy(tmp_path: Path) -> None:
    source = nameless(tmp_path / "in" / "a.nii", HEAD)
    for axes in ("LA", "LAX", "LRS", "LASS", ""):
        with pytest.raises(ValueError, match="three letters"):
            orient_files(source, tmp_path / "out", axes)
    with pytest.raises(ValueError, match="lies in"):
        orient_files(tmp_path / "in", tmp_path / "in" / "out", "LAS")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        orient_files(tmp_path / "empty", tmp_path / "out", "LAS")
    nameless(tmp_path / "in" / "a.img", HEAD)
    with pytest.raises(ValueError, match=r"would both become a\.nii\.gz"):
        orient_files(tmp_path / "in", tmp_path / "out", "LAS")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        orient_files(tmp_path / "nowhere", tmp_path / "out", "LAS")
