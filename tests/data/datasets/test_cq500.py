"""CQ500: a made-up phantom in its layout, DICOM folders and reads, becomes a table of findings and a store."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest

import asa
from asa.data.datasets import cq500
from asa.data.io.dicom import convert_series
from asa.data.io.tables import read_column, read_rows
from asa.data.store import Store
from asa.tasks.pretraining import read_health

CT = "1.2.840.10008.5.1.4.1.1.2"  # class of a CT image
COLUMNS = [
    *("ICH", "IPH", "IVH", "SDH", "EDH", "SAH", "BleedLocation-Left", "BleedLocation-Right", "ChronicBleed"),
    *("Fracture", "CalvarialFracture", "OtherFracture", "MassEffect", "MidlineShift"),
]
HEADER = ["name", "Category", *(f"R{rater}:{column}" for rater in (1, 2, 3) for column in COLUMNS)]


def write_reads(path: Path, *studies: tuple[int, dict[str, str]]) -> Path:
    """reads.csv: of each finding of a study, the votes of the three raters, like "110"."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        for number, votes in studies:
            cells = [votes.get(column, "000")[rater] for rater in range(3) for column in COLUMNS]
            table.writerow([f"CQ500-CT-{number}", "B1", *cells])
    return path


def write_series(root: Path, study: int, name: str, slices: int, thickness: float, seed: int = 0) -> None:
    """A head of skull and brain in HU, slice by slice, in the folders of CQ500."""
    pydicom = pytest.importorskip("pydicom")
    folder = root / f"CQ500CT{study} CQ500CT{study}" / "Unknown Study" / name
    folder.mkdir(parents=True)
    number = len(list(folder.parent.iterdir()))
    z, y, x = np.meshgrid(
        (np.arange(slices) - (slices - 1) / 2) * thickness, *2 * [(np.arange(40) - 19.5) * 5], indexing="ij"
    )
    radius = np.sqrt((x / 75) ** 2 + (y / 90) ** 2 + (z / 75) ** 2)
    noise = np.random.default_rng(seed).normal(0, 4, radius.shape)
    hu = np.select([radius < 0.85, radius < 1], [35 + noise, 900 + noise], -1000).astype(np.int16)
    for k in range(slices):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CT, pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"1.2.{study}.{number}.{k}"
        one = pydicom.Dataset()
        one.file_meta, one.SOPClassUID, one.SOPInstanceUID = meta, CT, meta.MediaStorageSOPInstanceUID
        one.PatientID, one.StudyInstanceUID = f"CQ500-CT-{study}", f"1.2.{study}"
        one.SeriesInstanceUID, one.SeriesNumber, one.SeriesDescription = f"1.2.{study}.{number}", number, name
        one.Modality, one.InstanceNumber, one.SliceThickness = "CT", k + 1, thickness
        one.ImagePositionPatient, one.ImageOrientationPatient = [-97.5, -97.5, float(z[k, 0, 0])], [1, 0, 0, 0, 1, 0]
        one.PixelSpacing, one.Rows, one.Columns, one.SamplesPerPixel = [5, 5], 40, 40, 1
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept, one.PhotometricInterpretation = 1, 0, "MONOCHROME2"
        one.PixelData = hu[k].tobytes()
        one.save_as(folder / f"CT{k:06d}.dcm", enforce_file_format=True)


def listed(root: Path, *series: tuple[int, str, int, float]) -> Path:
    """series.csv as asa-dicom writes it, of (study, name, slices, mm)."""
    root.mkdir()
    with (root / "series.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "subject", "file", "description", "slices", "slice_mm", "series_uid", "source"])
        for k, (study, name, slices, mm) in enumerate(series):
            source = f"/data/qct01/CQ500CT{study} CQ500CT{study}/Unknown Study/{name}"
            table.writerow([f"s{k}", "x", f"s{k}.nii.gz", "", slices, mm, f"1.2.{k}", source])
    return root


def test_the_thinnest_whole_series_without_contrast_is_taken(tmp_path: Path) -> None:
    root = listed(
        tmp_path / "out",
        *((7, "CT PRE CONTRAST 5MM STD", 30, 5.0), (7, "CT PRE CONTRAST THIN", 240, 0.625), (7, "CT Bone", 300, 0.5)),
        *((7, "CT POST CONTRAST THIN", 300, 0.5), (7, "CT 4cc sec 150cc D3D on", 300, 0.5), (7, "CT C THIN", 300, 0.5)),
        *((7, "CT Thin Plain", 100, 0.5), (7, "CT 0.625 MM HI RES", 300, 0.5)),
        *((12, "CT Plain", 32, 5.0), (12, "CT Plain-2", 34, 5.0)),
        (301, "CT CONTRAST", 300, 0.5),
    )
    with pytest.warns(UserWarning, match="left out are series") as caught:
        found = cq500.records(root)
    assert found == [
        {"id": f"CQ500-CT-{study}", "subject": f"CQ500-CT-{study}", "images": {"ct": str(root / file)}}
        for study, file in ((12, "s9.nii.gz"), (7, "s1.nii.gz"))
    ]
    said = str(caught[0].message)
    for part in (
        "2 with thicker slices, or fewer, like CQ500CT7 CQ500CT7/CT PRE CONTRAST 5MM STD",
        "2 for bone, like CQ500CT7 CQ500CT7/CT Bone",
        "4 with contrast, like CQ500CT7 CQ500CT7/CT POST CONTRAST THIN",
        "1 of less than 100 mm, like CQ500CT7 CQ500CT7/CT Thin Plain",
        "1 studies without any other, like CQ500-CT-301",
    ):
        assert part in said
    assert not (root / "findings.csv").exists()


def test_a_finding_is_what_two_of_three_raters_see_and_healthy_is_without_any(tmp_path: Path) -> None:
    root = listed(tmp_path / "out", *((k, "CT Plain", 32, 5.0) for k in range(5)))
    votes = [
        (0, {}),
        (1, {"ICH": "110", "SDH": "110", "BleedLocation-Left": "111"}),
        (2, {"ICH": "100", "Fracture": "010"}),  # each seen by one
        (3, {"MidlineShift": "011"}),
        (4, {"BleedLocation-Right": "111"}),  # a place, and no finding
        (9, {"EDH": "111"}),
    ]
    reads = write_reads(tmp_path / "reads.csv", *votes)
    with pytest.warns(UserWarning, match=r"1 studies are not in .*series.csv, like CQ500-CT-9"):
        found = cq500.records(root, reads=reads, finding="MidlineShift")
    table = root / "findings.csv"
    names = [record["id"] for record in found]
    assert [read_column(table, "health", found)[name] for name in names] == ["1", "0", "1", "0", "1"]
    assert [read_column(table, "class", found)[name] for name in names] == 3 * ["none"] + ["MidlineShift", "none"]
    assert [read_column(table, "SDH", found)[name] for name in names] == ["0", "1", "0", "0", "0"]
    with pytest.raises(ValueError, match=r"data.finding=shift: choose one of ICH, IPH"):
        cq500.records(root, finding="shift")
    reads.write_text(reads.read_text().replace("B1,0", "B1,?", 1))
    with pytest.raises(ValueError, match=r"reads.csv: CQ500-CT-0: R1:ICH is '\?', and has to be 0 or 1"):
        cq500.records(root, reads=reads)
    reads.write_text("name,R1:ICH\nCQ500-CT-0,1\n")
    with pytest.raises(ValueError, match=r"has no column R1:IPH: is it the reads.csv of CQ500"):
        cq500.records(root, reads=reads)
    with pytest.raises(FileNotFoundError, match=r"series.csv: no such table: make it with asa-dicom input=CQ500"):
        cq500.records(tmp_path)
    (root / "series.csv").write_text("id,source\nx,y\n")
    with pytest.raises(ValueError, match="has no column slice_mm: run asa-dicom again"):
        cq500.records(root)


def test_folders_in_the_layout_of_cq500_become_a_store_with_a_table(tmp_path: Path) -> None:
    pytest.importorskip("dcm2niix")
    folder = tmp_path / "CQ500" / "qct01"
    write_series(folder, 0, "CT PRE CONTRAST 5MM", 28, 5.0)
    for name, mm in (("CT PRE CONTRAST 5MM", 5.0), ("CT POST CONTRAST", 2.0), ("CT Thin Plain", 4.0)):
        write_series(folder, 3, name, int(140 / mm), mm, seed=3)
    reads = write_reads(tmp_path / "reads.csv", (0, {}), (3, {"ICH": "111"}))
    report = convert_series(tmp_path / "CQ500", tmp_path / "nifti")
    assert len(report.written) == 4 and not report.failures
    rows = read_rows(tmp_path / "nifti" / "series.csv")
    assert [(row["slices"], row["slice_mm"]) for row in rows] == [("28", "5"), ("28", "5"), ("70", "2"), ("35", "4")]
    root, store = str(tmp_path / "nifti"), tmp_path / "store"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        given = {"data.root": root, "data.reads": str(reads), "prepare.spacing": 5}
        asa.prepare(store, data="cq500", **given)
    found = Store(store)
    assert found.channels == ["ct"] and list(found.records.ids) == ["CQ500-CT-0", "CQ500-CT-3"]
    assert Path(found.record("CQ500-CT-3")["sources"]["ct"]["path"]).name == "CQ500-CT-3_3.nii.gz"
    middle = np.array(found.image("CQ500-CT-0"), dtype=np.float32)[0]
    centre = middle[tuple(slice(n // 2 - 2, n // 2 + 2) for n in middle.shape)]
    assert centre.mean() == pytest.approx(35 / 80, abs=0.02) and middle.max() == 1
    health = read_health(f"{root}/findings.csv", found.records)
    assert [own["health"] for own in health.values()] == [1.0, 0.0]
