"""IBSR_18 v2: 18 skull-stripped T1 scans with CSF, GM and WM labels (https://www.nitrc.org/projects/ibsr)."""

from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, find_file, label_file, make_record, sorted_records
from asa.data.io.files import matching_files

LABEL_FILES = {"fill": "segTRI_fill_ana", "plain": "segTRI_ana"}
ENDINGS = (".nii.gz", ".nii", ".img.gz", ".img")  # NIfTI first: Analyze stores no orientation


def records(root: str | Path, *, label: str | None = "fill") -> list[Record]:
    """Records of `IBSR_NN/IBSR_NN_ana_strip`, as t1, with labels 1 CSF, 2 GM and 3 WM; NIfTI or Analyze.

    Args:
        root: folder that contains the folders IBSR_NN, or its parent.
        label: "fill" (`segTRI_fill_ana`, sulcal CSF filled in), "plain" (`segTRI_ana`), or None for no labels.
    """
    root = existing_folder(root, "IBSR_01, IBSR_02, ...")
    if label is not None and label not in LABEL_FILES:
        raise ValueError(f"data.label={label!r}: choose fill, plain, or null for no labels")
    result: list[Record] = []
    for folder in matching_files(root, "IBSR_[0-9]*", "*/IBSR_[0-9]*", folders=True):
        stem = folder / folder.name
        images = {"t1": find_file(f"{stem}_ana_strip", ENDINGS)}
        truth = None if label is None else label_file(f"{stem}_{LABEL_FILES[label]}", ENDINGS)
        result.append(make_record(folder.name, folder.name, images, label=truth))
    return sorted_records(result, source=f"IBSR_NN/IBSR_NN_ana_strip.nii.gz or .img below {root}")
