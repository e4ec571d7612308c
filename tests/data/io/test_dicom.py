"""DICOM series become volumes with the voxels, the values and the positions of their slices."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest

from asa.cli import dicom as command
from asa.data.io.dicom import convert_series
from asa.data.io.files import check_id
from asa.data.io.nifti import read_image
from asa.data.preprocessing.pipeline import prepare_case
from asa.data.preprocessing.settings import PrepareSettings

pytest.importorskip("dcm2niix")

# A real head CT that pydicom reduced to 16 x 16 pixels and four of its slices: one at the
# base of the skull, and three neighbours 20 cm above.
HEAD = Path(pydicom.data.__file__).parent / "test_files" / "dicomdirtests" / "77654033" / "CT2"
NEIGHBOURS = ("17136", "17166", "17196")


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "dicom" / "scan 1"
    folder.mkdir(parents=True)
    for name in NEIGHBOURS:
        shutil.copy(HEAD / name, folder)
    return tmp_path / "dicom"


def test_a_real_head_ct_keeps_every_value_in_hu_at_its_place(series: Path, tmp_path: Path) -> None:
    report = convert_series(series, tmp_path / "out")
    assert (report.written, report.failures) == (["77654033_2"], {})
    found = read_image(tmp_path / "out" / "77654033_2.nii.gz")
    assert found.data.shape == (16, 16, 3)
    for name in NEIGHBOURS:
        slice_ = pydicom.dcmread(HEAD / name)
        row_step, column_step = (float(step) for step in slice_.PixelSpacing)
        values = slice_.pixel_array * float(slice_.RescaleSlope) + float(slice_.RescaleIntercept)
        for row, column in ((0, 0), (5, 11), (15, 3)):
            x, y, z = np.add(slice_.ImagePositionPatient, [column * column_step, row * row_step, 0])  # LPS
            index = np.linalg.inv(found.affine) @ [-x, -y, z, 1]
            np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
            assert found.data[tuple(np.rint(index[:3]).astype(int))] == values[row, column]


def test_a_real_head_ct_is_prepared_with_a_window(series: Path, tmp_path: Path) -> None:
    convert_series(series, tmp_path / "out")
    scan = read_image(tmp_path / "out" / "77654033_2.nii.gz")
    case = prepare_case({"ct": scan}, None, {}, PrepareSettings(window=[0, 2000], crop="none"))
    expected = np.clip(scan.data[::-1] / 2000, 0, 1).transpose(2, 1, 0)  # the file's first axis points left
    np.testing.assert_allclose(case.image[0], expected, atol=1e-6)
    assert len(np.unique(case.image)) > 100


def test_a_series_with_a_missing_slice_is_refused_and_the_others_are_converted(series: Path, tmp_path: Path) -> None:
    shutil.copytree(HEAD, series / "gap")
    for path in (series / "gap").iterdir():  # another patient
        changed = pydicom.dcmread(path)
        changed.PatientID, changed.SeriesInstanceUID = "other", changed.SeriesInstanceUID + ".1"
        changed.save_as(path)
    report = convert_series(series, tmp_path / "out")
    assert report.written == ["77654033_2"] and list(report.failures) == ["other_2"]
    assert "not evenly spaced" in report.failures["other_2"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["77654033_2.nii.gz"]


@pytest.mark.parametrize("damage", ["header", "pixels"])
def test_damaged_files_are_counted_and_the_others_are_converted(series: Path, tmp_path: Path, damage: str) -> None:
    for path in shutil.copytree(series / "scan 1", series / "other").iterdir():
        changed = pydicom.dcmread(path)
        changed.PatientID, changed.SeriesInstanceUID = "other", changed.SeriesInstanceUID + ".1"
        changed.save_as(path)
    cut = series / "other" / NEIGHBOURS[0]
    cut.write_bytes(cut.read_bytes()[: 600 if damage == "header" else -300])
    report = convert_series(series, tmp_path / "out")
    # Without its header the slice is not known to belong to the series; without pixels the whole series is left out.
    written, left_out = (["77654033_2", "other_2"], 1) if damage == "header" else (["77654033_2"], 3)
    assert report.written == written
    assert report.failures == {f"{left_out} of 6 DICOM files": "in none of the volumes: damaged, or not of an image"}


@pytest.mark.parametrize("patient", ["../../x", "/tmp/x", ".hidden", "a\nb", "é", "%i%s", "-x", "=cmd", "*", "x" * 64])
def test_a_patients_id_of_any_text_names_a_file_in_the_folder(tmp_path: Path, patient: str, monkeypatch) -> None:
    (tmp_path / "-in").mkdir()
    for name in NEIGHBOURS:
        changed = pydicom.dcmread(HEAD / name)
        changed.SpecificCharacterSet = "ISO_IR 100"  # Latin-1
        changed.PatientID = patient
        changed.save_as(tmp_path / "-in" / name)
    monkeypatch.chdir(tmp_path)
    report = convert_series(Path("-in"), Path("out"))  # a folder, not an option of dcm2niix
    (title,) = report.written
    check_id(title)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{title}.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-in", "out"] and not report.failures


def test_the_command_says_what_it_wrote_and_what_is_missing(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["asa-dicom", *arguments])
        return command.main(), *capsys.readouterr()

    code, said, _ = run(f"input={series}", f"out={tmp_path / 'out'}")
    assert code == 0 and "wrote 1 volumes" in said
    (tmp_path / "empty").mkdir()
    for source, out, reason in (
        ("nowhere", "out", "no such folder"),
        ("empty", "out", "finds no DICOM series"),
        ("dicom", "dicom/out", "choose a folder outside"),
    ):
        code, _, error = run(f"input={tmp_path / source}", f"out={tmp_path / out}")
        assert code == 1 and reason in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    code, _, error = run(f"input={series}", f"out={tmp_path / 'out'}")
    assert code == 1 and "asa-mri[dicom]" in error
