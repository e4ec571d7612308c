"""The FOMO-MRI collection: many datasets of mixed sequences below one folder (arXiv:2506.14432).

    FOMO60K, 50K, 45K   DATASET/sub_1/ses_1/t1.nii.gz, further scans of the sequence t1_2.nii.gz, ...
    FOMO300K, 260K      DATASET/sub-1/ses-1/anat/sub-1_ses-1[_run-2]_T1w.nii.gz
    mapping.tsv         of the first layout: dataset, participant_id, session_id and filename of every image

The first layout is as users of FOMO60K describe it, the second as the collection's own preprocessing writes it
(`rename_files_with_mapping` in its repository). No file of the collection itself was read.
"""

import re
import warnings
from collections.abc import Sequence, Set
from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, make_record, sorted_records
from asa.data.io.files import matching_files
from asa.data.io.tables import read_rows

MIXED = "mri"  # the channel of several sequences
MAPPING = "mapping.tsv"
LAYOUTS = {"sub_*/ses_*/*.nii.gz": 1, "sub-*/ses-*/*/*.nii.gz": 2}  # ends of paths, and their parts below the session
_ENTITIES = re.compile(r"^(?:[a-z]+-[^_]*_)+")


def records(
    root: str | Path, *, sequences: Sequence[str] = ("t1",), datasets: Sequence[str] | None = None
) -> list[Record]:
    """Records of the images of some sequences, each of them a scan with one channel.

    The id is DATASET_sub_1_ses_1_t1 or DATASET_sub-1_ses-1_T1w, the subject DATASET_sub_1 and the site DATASET: equal
    numbers of two datasets are two people. Warnings count the images of mapping.tsv that are not here, images outside
    the two layouts, and subjects without the sequences.

    Args:
        root: folder that holds the datasets.
        sequences: as the files are called, like t1, t2, flair, t1c or dwi; t1 is T1w, too. The channel has the name of
            the sequence, or is `mri` where there are several.
        datasets: names of the datasets to read; None: all.

    Raises:
        ValueError: no sequence is given, or datasets that are no list.
    """
    root = existing_folder(root, "PT001_NAME, PT002_NAME, ...").absolute()
    channel = channel_of(sequences, "data.sequences")
    if isinstance(datasets, str):
        raise ValueError(f"data.datasets={datasets}: give a list, like [{datasets}]")
    found, strange, wanted = [], [], set(map(_sequence, sequences))
    subjects, kinds, there = set[str](), set[str](), set[str]()  # subjects, sequences and datasets of all images
    for path in matching_files(root, "**/*.nii*"):
        relative, stem = path.relative_to(root), path.name.removesuffix(".nii.gz")
        folders = next((below for end, below in LAYOUTS.items() if relative.match(end)), None)
        if path.name.startswith("."):
            continue
        if folders is None:
            if datasets is None or "_".join(relative.parts).startswith(tuple(f"{name}_" for name in datasets)):
                strange.append(relative)
            continue
        *above, subject, session = relative.parts[:-folders]
        dataset = "_".join(above) or root.name
        if datasets is not None and dataset not in datasets:
            continue
        subjects.add(f"{dataset}_{subject}")
        there.add(dataset)
        kinds.add(kind := _sequence(stem))
        if kind in wanted:
            name = stem if _ENTITIES.match(stem) else f"{subject}_{session}_{stem}"
            found.append(make_record(f"{dataset}_{name}", f"{dataset}_{subject}", {channel: path}, site=dataset))
    _warn_of_absent(root, wanted, datasets)
    if found and (lacking := sorted({*(datasets or ()), *wanted} - there - kinds)):
        warnings.warn(f"{root}: has nothing of {', '.join(lacking)}: check the names", stacklevel=2)
    if strange:
        told = f"{len(strange)} images are left out, being no .nii.gz in DATASET/sub_N/ses_N, like {strange[0]}"
        warnings.warn(f"{root}: {told}", stacklevel=2)
    if found and (without := sorted(subjects - {record["subject"] for record in found})):
        told = f"{len(without)} of {len(subjects)} subjects have no {'|'.join(sequences)}, like {without[0]}"
        warnings.warn(f"{root}: {told}", stacklevel=2)
    rest = f"; there are images of {', '.join(sorted(kinds - wanted))}" if kinds - wanted else ""
    return sorted_records(found, source=f"DATASET/sub_N/ses_N/{'|'.join(sequences)}.nii.gz below {root}{rest}")


def channel_of(sequences: Sequence[str], key: str) -> str:
    """The channel of images of some sequences or BIDS suffixes; a ValueError where `key`, the setting, is no list."""
    if isinstance(sequences, str) or not sequences:
        raise ValueError(f"{key}={sequences}: give a list of one or more, like [{sequences or 't1'}]")
    return MIXED if len(sequences) > 1 else _sequence(sequences[0])


def _sequence(stem: str) -> str:
    """The sequence in a file name without its ending: `t1` of t1_2, of sub-1_ses-1_run-2_T1w, and of T1w."""
    return re.sub(r"_\d+$", "", _ENTITIES.sub("", stem)).lower().removesuffix("w")


def _warn_of_absent(root: Path, wanted: Set[str], datasets: Sequence[str] | None) -> None:
    """Warn of the images that mapping.tsv lists and that were not downloaded."""
    path = root / MAPPING
    rows = read_rows(path) if path.is_file() else []
    columns = ("dataset", "participant_id", "session_id", "filename")
    if not rows or not set(columns) <= rows[0].keys():
        return
    chosen = [row for row in rows if _sequence(row["filename"].removesuffix(".nii.gz")) in wanted]
    files = [[row[key] for key in columns] for row in chosen if datasets is None or row["dataset"] in datasets]
    if absent := [file for file in files if not root.joinpath(*file).is_file()]:
        told = f"{len(absent)} of its {len(files)} images are not here, like {Path(*absent[0])}"
        warnings.warn(f"{path}: {told}", stacklevel=3)
