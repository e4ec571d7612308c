"""Which reader a folder of scans is for: settings of asa-prepare from what lies in it."""

from collections import Counter
from pathlib import Path
from typing import Any

from asa.data.datasets import nnunet
from asa.data.datasets.record import is_label_map
from asa.data.io.nifti import VOLUME_ENDINGS


def recognise(folder: Path, *, labelled: bool) -> dict[str, Any]:
    """The settings `data` and `data.*` with which asa-prepare reads a folder.

    Args:
        folder: a raw dataset of nnU-Net, FreeSurfer's subjects, a BIDS dataset, or a folder of NIfTI files, in which
            NAME_T1.nii.gz has the label map NAME_seg.nii.gz.
        labelled: whether label maps are wanted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: none of these, or no label maps; the message says how to write the settings.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: is a file; give the folder" if folder.exists() else f"{folder}: no such folder"
        )
    root = str(folder)
    if (folder / nnunet.DESCRIPTION).exists() and (folder / "imagesTr").is_dir():
        return {"data": "nnunet", "data.root": root}
    if any(folder.glob("*/mri/T1.mgz")):
        return {"data": "freesurfer", "data.root": root} | ({} if labelled else {"data.label": None})
    if any(folder.glob("sub-*/**/anat/sub-*_T1w.nii*")):
        return {"data": "bids", "data.root": root} | (_bids_labels(folder) if labelled else {})
    return {"data": "folder", "data.root": root} | _plain(folder, labelled)


def _bids_labels(folder: Path) -> dict[str, Any]:
    """Where a BIDS dataset keeps label maps: beside the scans, or in one of its derivatives."""
    places = [place for place in (folder, *folder.glob("derivatives/*")) if any(place.glob("sub-*/**/*_dseg.nii*"))]
    if len(places) != 1:
        found = " and ".join(map(str, places)) or "nowhere"
        raise ValueError(f"{folder}: label maps (*_dseg.nii.gz) are found {found}: {_BY_HAND}")
    return {"data.label": "dseg"} | ({} if places[0] == folder else {"data.label_root": str(places[0])})


def _plain(folder: Path, labelled: bool) -> dict[str, Any]:
    """Globs of the images and label maps of a folder of files, by what their names end in."""
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(VOLUME_ENDINGS))
    endings = Counter(map(_ending, names))
    labels, images = ({_ending(name) for name in names if is_label_map(name) == kind} for kind in (True, False))
    # *.nii.gz takes in *_seg.nii.gz, which only the pattern of the label maps leaves out.
    mixed = images & labels if labelled else {end for end in labels if end.endswith(tuple(images))}
    if len(images) != 1 or mixed or (labelled and len(labels) != 1):
        below = sum(path.name.endswith(VOLUME_ENDINGS) for path in folder.rglob("*")) - len(names)
        others = f", and {below} in its subfolders" if below else ""
        found = (", ".join(f"{count} *{end}" for end, count in endings.items()) or "no NIfTI files") + others
        expected = "one image and one label map" if labelled else "one image"
        raise ValueError(f"{folder}: {found}; {expected} a scan were expected: {_BY_HAND}")
    return {"data.images": {"t1": f"*{images.pop()}"}} | ({"data.label": f"*{labels.pop()}"} if labelled else {})


def _ending(name: str) -> str:
    """What the names of all scans' files of one kind end in: `_T1.nii.gz`; `.nii.gz` where a number is before it."""
    stem, dot, suffix = name.partition(".")
    word = stem.rpartition("_")[2]
    return f"{dot}{suffix}" if word == stem or word.isdigit() else f"_{word}{dot}{suffix}"


_BY_HAND = "prepare it by asa-prepare, which reads more layouts, and give asa run the store in place of the folder"
