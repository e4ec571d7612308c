"""OpenMind: images of 800 datasets of OpenNeuro in one table, with masks of what was defaced (arXiv:2412.17041).

    openneuro_metadata.csv               a row for each image: image_path, modality, anon_mask_path, age, sex, ...
    OpenMind/ds000001/sub-01/anat/...    the files; the paths in the table are relative to OpenMind

The columns are those that nnssl, the software of the dataset's authors, reads; in the masks 1 is what a defacing
removed (nnssl takes zeros where an image has none). No file of the dataset itself was read.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from asa.data.datasets.fomo import channel_of
from asa.data.datasets.record import Record, existing_folder, make_record, sorted_records
from asa.data.io.tables import read_rows

TABLE, FILES = "openneuro_metadata.csv", "OpenMind"
COLUMNS = ("image_path", "modality", "anon_mask_path")
DERIVED = "__Data"  # ending of the folder that holds the maps of a diffusion image, called FA.nii.gz and the like


def records(root: str | Path, *, modalities: Sequence[str] = ("T1w",), masks: bool = True) -> list[Record]:
    """Records of the images of some modalities, each of them a scan with one channel.

    The id is that of the dataset and the file's own, like ds000001_sub-01_ses-1_T1w, the subject ds000001_sub-01 and
    the site the dataset. Images of the table that are not here are left out; a warning counts them.

    Args:
        root: folder that holds openneuro_metadata.csv and OpenMind.
        modalities: as in the table, like T1w, T2w or FLAIR. The channel is t1, t2, flair, ..., or `mri` where there
            are several.
        masks: use the masks of what was defaced as label maps, whose value 1 is to be `ignored`.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: the table has other columns or a path without dataset and subject.
    """
    root = existing_folder(root, f"{TABLE} and {FILES}").absolute()
    channel, rows = channel_of(modalities, "data.modalities"), read_rows(root / TABLE)
    if rows and (unknown := [column for column in COLUMNS if column not in rows[0]]):
        raise ValueError(f"{root / TABLE}: has no column {unknown[0]}: is it the table of OpenMind?")
    found: list[Record] = []
    chosen = [row for row in rows if row["modality"] in modalities]
    for row in chosen:
        path = Path(row["image_path"])
        if not (root / FILES / path).is_file():
            continue
        if len(path.parts) < 3:
            raise ValueError(f"{root / TABLE}: image_path is {path}, and not DATASET/SUBJECT/.../FILE: correct the row")
        (dataset, subject), above, name = path.parts[:2], path.parent.name, path.name.partition(".")[0]
        id = f"{dataset}_{above.removesuffix(DERIVED)}_{name}" if above.endswith(DERIVED) else f"{dataset}_{name}"
        label = root / FILES / row["anon_mask_path"] if masks and row["anon_mask_path"] else None
        images = {channel: root / FILES / path}
        found.append(make_record(id, f"{dataset}_{subject}", images, site=dataset, label=label))
    if found and (absent := len(chosen) - len(found)):
        warnings.warn(f"{root}: {absent} of {len(chosen)} images of the table are not here", stacklevel=2)
    known = sorted({row["modality"] for row in rows})
    if found and (lacking := sorted(set(modalities) - set(known))):
        warnings.warn(f"{root}: has nothing of {', '.join(lacking)}, but {', '.join(known)}", stacklevel=2)
    source = f"images of {'|'.join(modalities)} in {root / TABLE}, which has {', '.join(known)}, below {root / FILES}"
    return sorted_records(found, source=source)
