"""DICOM series converted to NIfTI by dcm2niix (Li et al., Journal of Neuroscience Methods 2016), one at a time.

dcm2niix places the slices of a volume evenly. Whether they lie there is checked against the headers of the series.
"""

import filecmp
import hashlib
import itertools
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import NOT_HERE, check_present, matching_files, write_whole
from asa.data.io.nifti import GEOMETRY_TOLERANCE, Volume, read_image, spacing_of
from asa.data.io.tables import check_own, csv_text, read_rows
from asa.errors import require

TABLE = "series.csv"
COLUMNS = (
    *("id", "subject", "file", "date", "series", "description", "slices", "slice_mm"),
    *("study_uid", "series_uid", "source"),
)
# What dcm2niix writes beside a volume: resampled without the gantry's tilt, and resampled to even slices.
CORRECTED, EVEN = re.compile(r"_Tilt(_\d+)?$"), re.compile(r"_Eq(_\d+)?$")
NAME = "volume"  # of what dcm2niix writes; endings like _e2, of the second echo, follow
USED = re.compile(r"^Convert (\d+) DICOM", re.MULTILINE)  # number of files in what dcm2niix prints
DIRECTORY = "1.2.840.10008.1.3.10"  # class of a DICOMDIR
KEY = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "StudyDate")  # anonymised visits may share the first
TAGS = [
    *(*KEY, "SOPInstanceUID", "SeriesNumber", "SeriesDescription"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]

_Rows = dict[str, dict[str, str]]  # of the table, by id


@dataclass
class DicomReport:
    """Names of the volumes written, and series or files that are in none, with the reason."""

    written: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class _Series:
    """Files of one series, the header of the first, and the slices of all."""

    key: tuple[str, ...]  # values of `KEY`
    header: Any
    files: list[Path] = field(default_factory=list)
    slices: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # of `_slices`


def convert_series(source: Path, out: Path) -> DicomReport:
    """Convert every series in a folder, searched with its subfolders, to `OUT/PATIENT_DATE_SERIES.nii.gz`.

    Intensities are those of the modality, HU for CT. A tilted gantry is corrected. `OUT/series.csv` says what each
    volume was made from, and keeps columns that a user adds; `data.table` reads it. A name that belongs to another
    series is not used again: eight digits that identify the series are added. A series that was converted before is
    written again. Copies of a file count once.

    Raises:
        FileNotFoundError: no such folder.
        ImportError: dcm2niix or pydicom is not installed.
        ValueError: no DICOM series, an `out` inside the folder, or one with another `series.csv`.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give one with DICOM files")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out={out} lies in {source}, whose files are read: choose a folder outside it")
    program = require("dcm2niix", "dicom", "DICOM series").bin
    report = DicomReport()
    found, lost = _sorted_by_series(source)
    if not found:
        for path in lost:
            check_present(path, "")
        raise ValueError(f"{source}: no DICOM series found here")
    table = out / TABLE
    check_own(table, "asa-dicom", {"id", "file", "series_uid"})
    before = read_rows(table) if table.exists() else []
    rows = {row["id"]: row for row in before}
    if len(rows) < len(before):
        raise ValueError(f"{table}: an id is in two rows: remove one")
    for _, series in sorted(found.items()):
        with _converted(program, series.files) as (volumes, said):
            if sum(map(int, USED.findall(said))) < len(series.files):  # a volume may have fewer slices than its series
                alone = [path for path in series.files if not _converts_alone(program, path)]
                lost += alone if volumes and alone else series.files
            _keep(series, volumes, said, out, rows, report)
    here = "damaged, no image, or of a series with such a file"
    report.failures |= {str(path): f"in no volume: {here if path.exists() else NOT_HERE}" for path in lost}
    return report


@contextmanager
def _converted(program: str, files: list[Path]) -> Iterator[tuple[dict[str, Path], str]]:
    """The volumes of one series, without uncorrected and resampled copies, by dcm2niix's ending, and what it prints."""
    with tempfile.TemporaryDirectory(prefix="asa-") as name:
        folder = Path(name) / "series"
        folder.mkdir()
        for number, path in enumerate(files):
            (folder / f"{number:06d}").symlink_to(path.absolute())
        # -l n: unsigned values as signed ones where they fit, because only of those a tilt is corrected.
        command = [program, "-b", "n", "-l", "n", "-z", "y", "-f", NAME, "-o", name, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        made = Path(name).glob(f"{NAME}*.nii.gz")
        found = {path.name.removesuffix(".nii.gz").removeprefix(NAME): path for path in made}
        corrected = {CORRECTED.sub("", ending) for ending in found if CORRECTED.search(ending)}
        kept = {ending: path for ending, path in sorted(found.items()) if ending not in corrected}
        volumes = {CORRECTED.sub("", ending): path for ending, path in kept.items() if not EVEN.search(ending)}
        yield volumes, f"{run.stdout}\n{run.stderr}"


def _converts_alone(program: str, path: Path) -> bool:
    with _converted(program, [path]) as (volumes, _):
        return bool(volumes)


def _keep(series: _Series, volumes: dict[str, Path], said: str, out: Path, rows: _Rows, report: DicomReport) -> None:
    """Write the volumes of a series that are sound, after their rows of the table."""
    base = _title(series, volumes, out, rows, {*report.written, *report.failures})
    told = [line.removeprefix("Warning: ") for line in said.splitlines() if line.startswith("Warning: ")]
    about, (uid, study, patient, date) = series.header, series.key
    sound: dict[str, Path] = {}
    for ending, path in volumes.items():
        title = f"{base}{ending}"
        try:
            volume = read_image(path)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                check_slices(volume, series.slices)
        except ValueError as error:
            report.failures[title] = str(error).removeprefix(f"{path}: ")
            continue
        sound[title] = path
        if found := [*(str(one.message) for one in caught), *(f"dcm2niix says: {line}" for line in told)]:
            report.warnings[title] = found
        rows[title] = rows.get(title, {}) | {
            "id": title,
            "subject": _clean(patient),
            "file": f"{title}.nii.gz",
            "date": date,
            "series": str(about.get("SeriesNumber") or ""),
            "description": " ".join(str(about.get("SeriesDescription") or "").split()),
            "slices": str(volume.data.shape[2]),
            "slice_mm": f"{spacing_of(volume.affine)[2]:.4g}",  # from one to the next
            "study_uid": study,
            "series_uid": uid,
            "source": str(series.files[0].parent.absolute()),
        }
    if sound:
        columns = list(dict.fromkeys(itertools.chain(COLUMNS, *rows.values())))  # with the user's own
        table = ([row.get(column, "") for column in columns] for _, row in sorted(rows.items()))
        write_whole(out / TABLE, csv_text(columns, table).encode(errors="replace"))
    for title, path in sound.items():
        write_whole(out / f"{title}.nii.gz", path.read_bytes())
        report.written.append(title)


def _title(series: _Series, endings: Iterable[str], out: Path, rows: _Rows, taken: set[str]) -> str:
    """The name of a series' volumes, PATIENT_DATE_SERIES, made unique where another series has it, or it is taken."""
    uid, study, patient, date = series.key
    parts = [_clean(part) for part in (patient, date, series.header.get("SeriesNumber"))]
    title = "_".join([parts[0] or "unknown", *(part for part in parts[1:] if part)])
    for name in [f"{title}{ending}" for ending in endings]:
        row = rows.get(name, {})
        own = (row.get("series_uid"), row.get("study_uid") or study) == (uid, study)
        if name in taken or (not own and (row or (out / f"{name}.nii.gz").exists())):
            return f"{title}_{hashlib.sha256(repr(series.key).encode()).hexdigest()[:8]}"
    return title


def _clean(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", str(value or ""))[:64].strip("_.")


def _sorted_by_series(source: Path) -> tuple[dict[tuple[str, ...], _Series], list[Path]]:
    """Series by their `KEY`, each file once, and the DICOM files that name no series."""
    pydicom = require("pydicom", "dicom", "DICOM series")
    found: dict[tuple[str, ...], _Series] = {}
    firsts: dict[tuple[str, ...], Path] = {}  # of the files of one UID, which copies share
    damaged: list[Path] = []
    for path in matching_files(source, "**/*"):
        marked = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydicom, about values that are not read here
            try:
                with path.open("rb") as file:
                    marked = file.read(132)[128:] == b"DICM"
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS, force=True)
                if str(getattr(header.file_meta, "MediaStorageSOPClassUID", "")) == DIRECTORY:
                    continue
                key, slices = tuple(str(header.get(name) or "") for name in KEY), _slices(header)
            except Exception:  # of many types, for a file of any content
                key, slices = ("",), []
        if key[0]:
            first = firsts.setdefault((*key, str(header.get("SOPInstanceUID"))), path)
            if first != path and filecmp.cmp(first, path, shallow=False):
                continue
            series = found.setdefault(key, _Series(key, header))
            series.files.append(path)
            series.slices += slices
        elif marked or not path.exists():  # a link of git-annex
            damaged.append(path)
    return found, damaged


def _slices(header: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Normal and position of each slice of a file, which has one, or several in a multi-frame image."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    frames = header.get("PerFrameFunctionalGroupsSequence") or [header]
    found = []
    for frame in frames:
        orientation = (frame.get("PlaneOrientationSequence") or shared.get("PlaneOrientationSequence") or [header])[0]
        position = (frame.get("PlanePositionSequence") or [frame])[0]
        axes, corner = orientation.get("ImageOrientationPatient"), position.get("ImagePositionPatient")
        if axes and corner:
            row, column, place = (np.array(part, dtype=np.float64) for part in (axes[:3], axes[3:6], corner))
            lps = np.array([-1, -1, 1])  # DICOM's axes to RAS+
            found.append((np.cross(row, column) * lps, place * lps))
    return found


def check_slices(volume: Volume, slices: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Check that every slice of a volume lies where the header of a slice says, with a warning if no header does.

    In their plane the slices may be displaced evenly, as by a tilted gantry, which dcm2niix corrects. `slices` has
    normal and position of the slices of its series, (3,) in RAS+ mm each; of other directions, too.

    Raises:
        ValueError: a slice is more than 0.1 mm from all of them, or 0.2 mm from a line through the first and the last.
    """
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    for axis in (2, 1, 0):  # dcm2niix stacks slices along the third
        normal = np.cross(directions[:, axis - 2], directions[:, axis - 1])
        normal /= np.linalg.norm(normal)
        places = [position for direction, position in slices if abs(direction @ normal) > 0.9999]
        heights = np.reshape(places, (-1, 3)) @ normal
        stated = np.unique(heights)
        if len(stated) > 1:
            break
    else:
        warnings.warn("its headers do not say where each slice lies, so the spacing is not checked", stacklevel=2)
        return
    planes = volume.affine[:3, 3] @ normal + np.arange(volume.data.shape[axis]) * (volume.affine[:3, axis] @ normal)
    apart = np.abs(planes[:, None] - stated).min(axis=1).max()
    if not apart <= GEOMETRY_TOLERANCE:
        steps = np.diff(stated)
        raise ValueError(
            f"its slices are not evenly spaced ({np.median(steps):.2f} mm, and one gap of {steps.max():.2f} mm), so "
            f"that some would be {apart:.1f} mm from their place: one may be missing; complete the series"
        )
    flat = np.round(places - np.outer(heights, normal), 2)  # where each slice lies in its plane
    corners = [np.unique(flat[np.abs(heights - plane) <= GEOMETRY_TOLERANCE], axis=0) for plane in planes]
    ends = itertools.product(corners[0], corners[-1])
    lines = (zip(corners, np.linspace(first, last, len(planes)), strict=True) for first, last in ends)
    aside = min(max(np.linalg.norm(here - point, axis=1).min() for here, point in line) for line in lines)
    if aside > 2 * GEOMETRY_TOLERANCE:  # of the slice, and of the line's ends
        raise ValueError(
            f"some of its slices are {aside:.1f} mm aside, in their plane, from a line through the first and the last: "
            "convert the parts of the series that lie in line, each from a folder of its own"
        )
