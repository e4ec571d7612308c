"""IBSR_18 v2: 18 skull-stripped T1 scans with CSF, GM and WM labels (https://www.nitrc.org/projects/ibsr)."""

from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, first_file, sorted_records

LABELS = {1: "csf", 2: "gm", 3: "wm"}
LABEL_FILES = {"fill": "segTRI_fill_ana", "plain": "segTRI_ana"}
ENDINGS = (".nii.gz", ".nii", ".img.gz", ".img")  # NIfTI first: Analyze stores no orientation


def records(root: str | Path, *, label: str | None = "fill") -> list[Record]:
    """Records of `IBSR_NN/IBSR_NN_ana_strip` with their tissue labels, as NIfTI or Analyze.

    Args:
        root: folder that contains the folders IBSR_NN, or its parent.
        label: "fill" (`segTRI_fill_ana`, sulcal CSF filled in), "plain" (`segTRI_ana`), or None for no labels.

    Returns:
        Records sorted by id, channel t1; label values 1 CSF, 2 GM, 3 WM.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing found, or a folder without its image.
    """
    root = existing_folder(root, "IBSR_01, IBSR_02, ...")
    if label is not None and label not in LABEL_FILES:
        raise ValueError(f"data.label={label!r}: choose fill, plain, or null for no labels")
    result: list[Record] = []
    for folder in (*root.glob("IBSR_[0-9]*/"), *root.glob("*/IBSR_[0-9]*/")):
        record: Record = {"id": folder.name, "subject": folder.name, "images": {"t1": _file(folder, "ana_strip")}}
        if label is not None:
            expected = folder.absolute() / f"{folder.name}_{LABEL_FILES[label]}.nii.gz"
            record["label"] = _file(folder, LABEL_FILES[label]) or str(expected)
        result.append(record)
    return sorted_records(result, source=f"IBSR_NN/IBSR_NN_ana_strip.nii.gz or .img below {root}")


def _file(folder: Path, what: str) -> str | None:
    return first_file(*(folder / f"{folder.name}_{what}{ending}" for ending in ENDINGS))
