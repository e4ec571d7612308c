"""DICOM series converted to NIfTI by dcm2niix (Li et al., Journal of Neuroscience Methods 2016)."""

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asa.data.io.files import write_whole
from asa.data.io.nifti import read_image
from asa.errors import require

# What dcm2niix writes beside a volume: resampled without the gantry's tilt, and resampled to even slices.
CORRECTED, EVEN = re.compile(r"_Tilt(_\d+)?$"), re.compile(r"_Eq(_\d+)?$")

FOUND, USED = r"Found (\d+) DICOM", r"Convert (\d+) DICOM"  # numbers of files in what dcm2niix prints


@dataclass
class DicomReport:
    """Names of the volumes written, and series or files that are in none, with the reason."""

    written: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def convert_series(source: Path, out: Path) -> DicomReport:
    """Convert every series in a folder, searched with its subfolders, to `OUT/PATIENT_SERIES.nii.gz`.

    Intensities are those of the modality, HU for CT. A tilted gantry is corrected. Files in `out` are overwritten.

    Args:
        source: folder of DICOM files of any names.
        out: a folder outside `source`.

    Raises:
        FileNotFoundError: no such folder.
        ImportError: dcm2niix is not installed.
        ValueError: no DICOM series, or an `out` inside the folder.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give one with DICOM files")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out={out} lies in {source}, whose files are read: choose a folder outside it")
    program = require("dcm2niix", "dicom", "DICOM series").bin
    report = DicomReport()
    with tempfile.TemporaryDirectory(prefix="asa-") as space:
        run, found = _converted(program, source, space, "-z", "y", "-d", "9")
        if not found:
            said = " ".join((run.stderr or run.stdout).split())[-200:]
            raise ValueError(f"{source}: dcm2niix finds no DICOM series here ({said})")
        corrected, uneven = ({mark.sub("", name) for name in found if mark.search(name)} for mark in (CORRECTED, EVEN))
        for name, path in found.items():
            if EVEN.search(name) or name in corrected:
                continue
            title = re.sub(r"[^A-Za-z0-9_.-]+", "_", CORRECTED.sub("", name))
            try:
                if name in uneven:
                    raise ValueError("its slices are not evenly spaced: one may be missing; complete the series")
                if min(read_image(path).data.shape) < 2:
                    raise ValueError("a single slice, not a volume")
            except ValueError as error:
                report.failures[title] = str(error).removeprefix(f"{path}: ")
            else:
                write_whole(out / f"{title}.nii.gz", path.read_bytes())
                report.written.append(title)
    files, used = (sum(map(int, re.findall(count, run.stdout))) for count in (FOUND, USED))
    if files > used:  # dcm2niix leaves them out, and a volume may have fewer slices than its series
        for path in _left_out(program, source, found):
            report.failures[str(path)] = "in no volume: damaged, no image, or of a series with such a file"
    return report


def _converted(program: str, source: Path, space: str, *options: str) -> tuple[Any, dict[str, Path]]:
    """The run of dcm2niix on a folder or a file, and the volumes that it wrote, by PATIENT_SERIES."""
    command = [program, "-b", "n", *options, "-f", "%i_%s", "-o", space, str(source.absolute())]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return run, {path.name.partition(".nii")[0]: path for path in sorted(Path(space).glob("*.nii*"))}


def _left_out(program: str, source: Path, found: Collection[str]) -> Iterator[Path]:
    """The DICOM files whose volume was not found: each is read alone."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        if is_dicom:
            with tempfile.TemporaryDirectory(prefix="asa-") as space:
                if not _converted(program, path, space, "-z", "n", "-s", "y")[1].keys() & found:
                    yield path
