"""DICOM series become volumes with the voxels, the values and the positions of their slices."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest

from asa.cli import dicom as command
from asa.data.datasets import folder
from asa.data.io.dicom import check_slices, convert_series
from asa.data.io.files import check_id
from asa.data.io.nifti import read_image
from asa.data.io.tables import read_rows
from asa.data.preprocessing.pipeline import prepare_case
from asa.data.preprocessing.settings import PrepareSettings

pytest.importorskip("dcm2niix")

MR = "1.2.840.10008.5.1.4.1.1.4"  # class of an MR image

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
    assert (report.written, report.failures) == (["77654033_19950903_2"], {})
    found = read_image(tmp_path / "out" / "77654033_19950903_2.nii.gz")
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


def test_the_table_has_what_the_headers_say_of_a_series(series: Path, tmp_path: Path) -> None:
    for path in (series / "scan 1").iterdir():
        changed = pydicom.dcmread(path)
        changed.SeriesDescription = " head   without contrast"
        changed.save_as(path)
    convert_series(series, tmp_path / "out")
    (row,) = read_rows(tmp_path / "out" / "series.csv")
    uid = pydicom.dcmread(HEAD / NEIGHBOURS[0]).SeriesInstanceUID
    assert (row["subject"], row["date"], row["series"], row["series_uid"]) == ("77654033", "19950903", "2", uid)
    assert row["description"] == "head without contrast" and row["file"] == "77654033_19950903_2.nii.gz"


def test_a_real_head_ct_is_prepared_with_a_window(series: Path, tmp_path: Path) -> None:
    convert_series(series, tmp_path / "out")
    scan = read_image(tmp_path / "out" / "77654033_19950903_2.nii.gz")
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
    assert report.written == ["77654033_19950903_2"] and list(report.failures) == ["other_19950903_2"]
    assert "not evenly spaced" in report.failures["other_19950903_2"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["77654033_19950903_2.nii.gz", "series.csv"]


def write_slices(
    folder: Path, positions: list[float], *, aside: list[float] | None = None, bits: int = 16, **values: object
) -> None:
    """Slices of 8 x 8 pixels at these heights, shifted in their plane, in mm, with values of the header by keyword."""
    folder.mkdir(parents=True)
    for number, (height, shift) in enumerate(zip(positions, aside or [0] * len(positions), strict=True)):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MR, pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"{values.get('SeriesInstanceUID', '1.2.3')}.{number}"
        one = pydicom.Dataset()
        one.file_meta = meta
        one.SOPClassUID, one.SOPInstanceUID = MR, meta.MediaStorageSOPInstanceUID
        one.PatientID, one.SeriesInstanceUID, one.StudyInstanceUID, one.SeriesNumber = "p", "1.2.3", "1.2", 3
        one.Modality, one.InstanceNumber, one.SliceThickness = "MR", number + 1, 3
        one.ImagePositionPatient, one.ImageOrientationPatient = [0, shift, height], [1, 0, 0, 0, 1, 0]
        one.PixelSpacing, one.Rows, one.Columns, one.SamplesPerPixel = [1, 1], 8, 8, 1
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, bits, bits - 1, 0
        one.PhotometricInterpretation = "MONOCHROME2"
        one.PixelData = (np.arange(64, dtype="<u2") + 100 * number).tobytes()
        for keyword, value in values.items():
            setattr(one, keyword, value)
        one.save_as(folder / f"{number:03d}", enforce_file_format=True)


@pytest.mark.parametrize("bits", [12, 16])  # with 16 dcm2niix writes no second volume of even slices
def test_a_gap_is_found_from_the_slices_own_positions(tmp_path: Path, bits: int) -> None:
    heights = [3.0 * k for k in range(12)]
    write_slices(tmp_path / "in" / "whole", heights, bits=bits, SeriesNumber=1, SeriesInstanceUID="1.2.1")
    write_slices(tmp_path / "in" / "gap", heights[:4] + heights[6:], bits=bits, SeriesInstanceUID="1.2.2")
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert report.written == ["p_1"] and list(report.failures) == ["p_3"]
    assert "not evenly spaced (3.00 mm, and one gap of 9.00 mm)" in report.failures["p_3"]
    assert not (tmp_path / "out" / "p_3.nii.gz").exists()


@pytest.mark.parametrize("aside", [[0, 0, 0, 10, 10, 10], [0, 0, 10, 0, 0, 0]])
def test_slices_displaced_in_their_plane_are_refused(tmp_path: Path, aside: list[float]) -> None:
    write_slices(tmp_path / "in" / "a", [3.0 * k for k in range(6)], aside=aside)
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert not report.written and "aside, in their plane" in report.failures["p_3"]
    assert not (tmp_path / "out" / "p_3.nii.gz").exists()


def test_the_tilt_of_a_gantry_is_no_displacement_and_is_corrected_in_unsigned_values_too(tmp_path: Path) -> None:
    write_slices(tmp_path / "in", [0, 3, 6, 9], aside=[0, 1, 2, 3], Modality="CT", GantryDetectorTilt=18.4)
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert report.written == ["p_3"] and not report.failures
    assert read_image(tmp_path / "out" / "p_3.nii.gz").data.shape == (8, 11, 4)  # 3 mm higher than the slices


def test_of_two_stacks_in_a_series_each_is_compared_with_its_own_slices(tmp_path: Path) -> None:
    write_slices(tmp_path / "in", [0, 3, 6])
    convert_series(tmp_path / "in", tmp_path / "out")
    volume = read_image(tmp_path / "out" / "p_3.nii.gz")
    up = np.array([0.0, 0, 1])
    straight, tilted, displaced = (
        [(up, np.array([x, 0, 3 * number])) for number, x in enumerate(stack)]
        for stack in ((0, 0, 0), (50, 51, 52), (0, 4, 0))
    )
    check_slices(volume, straight + tilted)
    check_slices(volume, displaced + tilted)
    with pytest.raises(ValueError, match=r"4\.0 mm aside"):
        check_slices(volume, displaced)


def test_a_series_whose_headers_have_no_orientation_is_converted_unchecked(tmp_path: Path) -> None:
    write_slices(tmp_path / "in", [0, 3, 6], ImageOrientationPatient=None)
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert report.written == ["p_3"] and not report.failures
    assert any("do not say where each slice lies" in text for text in report.warnings["p_3"])


def test_what_the_converter_warns_of_is_reported_and_headers_without_positions_too(tmp_path: Path) -> None:
    write_slices(tmp_path / "in", [0, 3, 6])
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert any(text.startswith("dcm2niix says: ") for text in report.warnings["p_3"])
    volume = read_image(tmp_path / "out" / "p_3.nii.gz")
    with pytest.warns(UserWarning, match="the spacing is not checked"):
        check_slices(volume, [])
    up = np.array([0.0, 0, 1])
    check_slices(volume, [(up, up * height) for height in (0, 3, 6)])
    with pytest.raises(ValueError, match="not evenly spaced"):
        check_slices(volume, [(up, up * height) for height in (0, 3, 9)])


def test_no_series_takes_the_name_or_the_file_of_another(tmp_path: Path) -> None:
    def convert(visit: str, *, uids: list[str], out: str = "out", date: str = "") -> list[str]:
        for uid in uids:
            write_slices(tmp_path / visit / uid, [0, 3, 6], SeriesInstanceUID=uid, StudyDate=date)
        return convert_series(tmp_path / visit, tmp_path / out).written

    first, second = convert("a", uids=["1.2.1", "1.2.2"])  # anonymised patients with one id
    assert first == "p_3" and second.startswith("p_3_") and len(second) == len("p_3_12345678")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.nii.gz")}
    (third,) = convert("b", uids=["1.2.9"])  # a later call
    assert third not in (first, second)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == kept
    assert convert_series(tmp_path / "a", tmp_path / "out").written == [first, second]  # again, under the same names
    assert convert("c", uids=["1.2.4"], date="20200102") == ["p_20200102_3"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "p_3.nii.gz").write_bytes(b"of somebody else")
    assert convert("d", uids=["1.2.5"], out="plain")[0].startswith("p_3_")
    assert (tmp_path / "plain" / "p_3.nii.gz").read_bytes() == b"of somebody else"
    found = folder.records(None, table=tmp_path / "out" / "series.csv", images={"t1": "file"})
    assert {record["id"] for record in found} == {first, second, third, "p_20200102_3"}
    assert {record["subject"] for record in found} == {"p"}
    assert all(Path(str(record["images"]["t1"])).is_file() for record in found)


def test_law_every_series_that_fails_is_named_by_itself(tmp_path: Path) -> None:
    for uid, heights in (("1.2.1", [0, 3, 9]), ("1.2.2", [0, 3, 9]), ("1.2.3", [0, 3, 6])):
        write_slices(tmp_path / "in" / uid, heights, SeriesInstanceUID=uid)
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert len(report.failures) == 2 and len(report.written) == 1
    assert not report.failures.keys() & set(report.written)


def test_visits_that_share_the_uid_of_a_series_are_volumes_of_their_own(tmp_path: Path) -> None:
    visits = {"a": ("1.2", "20200101"), "b": ("1.2", "20210101"), "c": ("1.3", "20200101"), "d": ("", "20200101")}
    for number, (visit, (study, date)) in enumerate(visits.items()):
        write_slices(tmp_path / "in" / visit, [0, 3, 6], StudyInstanceUID=study, StudyDate=date, RescaleSlope=1)
        for path in (tmp_path / "in" / visit).iterdir():
            changed = pydicom.dcmread(path)
            changed.RescaleIntercept = 1000 * number
            changed.save_as(path)
    expected = {(study, date): 1000 * number for number, (study, date) in enumerate(visits.values())}
    for _ in range(2):  # again, under the same names
        assert len(convert_series(tmp_path / "in", tmp_path / "out").written) == 4
        rows = read_rows(tmp_path / "out" / "series.csv")
        found = {(row["study_uid"], row["date"]): read_image(tmp_path / "out" / row["file"]).data.min() for row in rows}
        assert found == expected and len(rows) == 4
        assert {row["id"][:10] for row in rows} == {"p_20200101", "p_20210101"}


@pytest.mark.parametrize("copy", [shutil.copytree, lambda source, target: target.symlink_to(source)])
def test_copies_of_files_are_read_once(tmp_path: Path, copy) -> None:
    write_slices(tmp_path / "in" / "a", [0, 3, 6])
    copy(tmp_path / "in" / "a", tmp_path / "in" / "b")
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert report.written == ["p_3"] and not report.failures
    assert read_image(tmp_path / "out" / "p_3.nii.gz").data.shape == (8, 8, 3)


def test_files_of_one_uid_that_differ_are_no_copies(tmp_path: Path) -> None:
    write_slices(tmp_path / "in", [0, 3, 6], SOPInstanceUID="1.2.3.4")  # as some anonymised files
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert report.written == ["p_3"] and not report.failures
    assert read_image(tmp_path / "out" / "p_3.nii.gz").data.shape == (8, 8, 3)


def test_the_table_keeps_the_users_columns_and_another_table_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "out" / "series.csv"
    for uid in ("1.2.1", "1.2.2"):
        write_slices(tmp_path / uid, [0, 3, 6], SeriesInstanceUID=uid, SeriesNumber=uid[-1])
    convert_series(tmp_path / "1.2.1", tmp_path / "out")
    header, row = table.read_text().splitlines()
    table.write_text(f"{header},my_note\n{row},good\n")
    for _ in range(2):
        for uid in ("1.2.1", "1.2.2"):
            convert_series(tmp_path / uid, tmp_path / "out")
    assert [(row["id"], row["my_note"]) for row in read_rows(table)] == [("p_1", "good"), ("p_2", "")]
    for text, reason in (
        ("subject,age\na,3\n", "no table of asa-dicom"),
        ("id,age\na,3\n", "no table of asa-dicom"),
        (f"{header}\n{row}\n{row}\n", "an id is in two rows"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=rf"^{table}: .*{reason}"):
            convert_series(tmp_path / "1.2.1", tmp_path / "out")
        assert table.read_text() == text


def test_series_behind_a_link_are_found_and_a_directory_file_is_none(tmp_path: Path) -> None:
    write_slices(tmp_path / "disk" / "visit", [0, 3, 6])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "notes.txt").write_text("no image")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = "1.2.840.10008.1.3.10", pydicom.uid.ExplicitVRLittleEndian
    pydicom.dataset.FileDataset("DICOMDIR", {}, file_meta=meta, preamble=bytes(128)).save_as(tmp_path / "disk/DICOMDIR")
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert report.written == ["p_3"] and not report.failures


@pytest.mark.parametrize("damage", ["header", "pixels"])
def test_damaged_files_are_named_and_the_others_are_converted(series: Path, tmp_path: Path, damage: str) -> None:
    for path in shutil.copytree(series / "scan 1", series / "other").iterdir():
        changed = pydicom.dcmread(path)
        changed.PatientID, changed.SeriesInstanceUID = "other", changed.SeriesInstanceUID + ".1"
        changed.save_as(path)
    cut = series / "other" / NEIGHBOURS[0]
    cut.write_bytes(cut.read_bytes()[: 600 if damage == "header" else -300])
    report = convert_series(series, tmp_path / "out")
    # Without its header the slice is not known to belong to the series; without pixels the whole series is left out.
    written, left_out = (
        (["77654033_19950903_2", "other_19950903_2"], 1) if damage == "header" else (["77654033_19950903_2"], 3)
    )
    assert report.written == written
    assert list(report.failures) == [str(series / "other" / name) for name in NEIGHBOURS[:left_out]]
    assert set(report.failures.values()) == {"in no volume: damaged, no image, or of a series with such a file"}


def test_slices_that_git_annex_has_elsewhere_are_named_and_never_left_out(series: Path, tmp_path: Path) -> None:
    absent = tmp_path / "in" / "slice.dcm"
    absent.parent.mkdir()
    absent.symlink_to(".git/annex/objects/ab/MD5E-s1--x/MD5E-s1--x")
    with pytest.raises(FileNotFoundError, match="datalad get"):
        convert_series(tmp_path / "in", tmp_path / "out")
    shutil.copytree(series / "scan 1", tmp_path / "in" / "scan 1")
    report = convert_series(tmp_path / "in", tmp_path / "out")
    assert len(report.written) == 1 and "datalad get" in report.failures[str(absent)]


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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{title}.nii.gz", "series.csv"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-in", "out"] and not report.failures


def test_the_command_says_what_it_wrote_and_what_is_missing(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["asa-dicom", *arguments])
        return command.main(), *capsys.readouterr()

    code, said, _ = run(f"input={series}", f"out={tmp_path / 'out'}")
    assert code == 0 and "wrote 1 volume" in said
    damaged = series / "scan 1" / "damaged"
    damaged.write_bytes((HEAD / NEIGHBOURS[0]).read_bytes()[:600])
    code, said, error = run(f"input={series}", f"out={tmp_path / 'out'}")
    assert code == 1 and said.startswith(f"{damaged}: failed: ") and "1 series or files are in no" in error
    damaged.unlink()
    (tmp_path / "empty").mkdir()
    for source, out, reason in (
        ("nowhere", "out", "no such folder"),
        ("empty", "out", "no DICOM series found"),
        ("dicom", "dicom/out", "choose a folder outside"),
    ):
        code, _, error = run(f"input={tmp_path / source}", f"out={tmp_path / out}")
        assert code == 1 and reason in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    code, _, error = run(f"input={series}", f"out={tmp_path / 'out'}")
    assert code == 1 and "asa-mri[dicom]" in error
