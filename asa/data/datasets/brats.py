"""BraTS: T1, T1 with gadolinium, T2, FLAIR and tumour labels, with the names of 2021 or those since 2023.

The years differ in file names and label values: enhancing tumour was 4 and is 3. The other challenges of 2023 (MEN,
MET, PED, SSA) have the layout of GLI. A later release with another label value needs its own row in these tables.
"""

import re
import warnings
from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, find_file, label_file, make_record, sorted_records
from asa.data.io.files import matching_files

LABELS = {2021: {1: "necrosis", 2: "oedema", 4: "enhancing"}, 2023: {1: "necrosis", 2: "oedema", 3: "enhancing"}}
# Endings of the channels, in stored order, and of the label map.
CHANNELS = {
    2021: {"t1": "_t1", "t1ce": "_t1ce", "t2": "_t2", "flair": "_flair"},
    2023: {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f"},
}
LABEL_FILES = {2021: "_seg", 2023: "-seg"}
# Group 1 is the subject; since 2023 the last number is the time point.
_NAMES = {2021: re.compile(r"(BraTS2021_\d+)"), 2023: re.compile(r"(BraTS-[A-Za-z0-9]+-\d+)-\d+")}


def records(root: str | Path, *, year: int = 2021, label: bool = True) -> list[Record]:
    """Records of the folders NAME with `NAME_t1.nii.gz`, ... (2021) or `NAME-t1n.nii.gz`, ... (since 2023).

    The channels are t1, t1ce, t2, flair. Since 2023 time points are scans of one subject.

    Args:
        root: folder that contains the folders of the scans, or its parent.
        year: 2021, or 2023 for the names and label values since then. Checked against the names of the folders.
        label: False for scans without label maps.

    Raises:
        ValueError: names of another year than `year` or of both.
    """
    root = existing_folder(root, "BraTS2021_00000, ... or BraTS-GLI-00000-000, ...")
    if year not in _NAMES:
        raise ValueError(f"data.year={year}: choose 2021, or 2023 for the names since then")
    (other,) = _NAMES.keys() - {year}
    result: list[Record] = []
    strange: list[str] = []
    for folder in matching_files(root, "BraTS*", "*/BraTS*", folders=True):
        name, stem = folder.name, folder / folder.name
        if _NAMES[other].fullmatch(name):
            raise ValueError(
                f"{folder}: has a name of {other}, whose label values differ from those of {year}; use "
                f"data={'brats23' if other == 2023 else 'brats'}, and keep the years in separate folders"
            )
        if not (match := _NAMES[year].fullmatch(name)):
            strange.append(name)
            continue
        images = {channel: find_file(f"{stem}{ending}") for channel, ending in CHANNELS[year].items()}
        truth = label_file(f"{stem}{LABEL_FILES[year]}") if label else None
        result.append(make_record(name, match.group(1), images, label=truth))
    if strange and result:
        told = f"{len(strange)} folders with other names are left out, like {min(strange)}"
        warnings.warn(f"{root}: {told}", stacklevel=2)
    example = "BraTS2021_00000" if year == 2021 else "BraTS-GLI-00000-000"
    return sorted_records(result, source=f"{example}/{example}{CHANNELS[year]['t1']}.nii.gz, ... below {root}")
