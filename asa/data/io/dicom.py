"""DICOM series converted to NIfTI by dcm2niix (Li et al., Journal of Neuroscience Methods 2016)."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from asa.data.io.files import write_whole
from asa.data.io.nifti import read_image
from asa.errors import require

# What dcm2niix writes beside a volume: resampled without the gantry's tilt, and resampled to even slices.
CORRECTED, EVEN = re.compile(r"_Tilt(_\d+)?$"), re.compile(r"_Eq(_\d+)?$")

FOUND, USED = r"Found (\d+) DICOM", r"Convert (\d+) DICOM"  # numbers of files in what dcm2niix prints


@dataclass
class DicomReport:
    """Names of the volumes written, and series that are none, or a number of files, with the reason."""

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
        command = [program, "-b", "n", "-z", "y", "-d", "9", "-f", "%i_%s", "-o", space, str(source.absolute())]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        found = {path.name.removesuffix(".nii.gz"): path for path in sorted(Path(space).glob("*.nii.gz"))}
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
        report.failures[f"{files - used} of {files} DICOM files"] = (
            "in none of the volumes: damaged, or not of an image"
        )
    return report
