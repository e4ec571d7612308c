"""A store's scans as a raw dataset of nnU-Net, version 2.

https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.datasets.nnunet import BACKGROUND, DESCRIPTION, IGNORE
from asa.data.io.files import check_out, gzipped, sha256_of, write_json, write_whole
from asa.data.io.nifti import read_image, read_label, write_label
from asa.data.store import Store
from asa.ops.nested import painting_order

ENDING = ".nii.gz"


def export_nnunet(store: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the source files of a store's scans, so that nnU-Net trains on the same cases.

    Images are copied to the byte (nnU-Net has a preprocessing of its own), labelled scans into imagesTr, the others
    into imagesTs. Label values are renumbered 1, 2, ... in their order, as nnU-Net requires, and an ignored value
    becomes the highest. Regions are written in place of the labels if they hold all of these, and nnU-Net can paint
    them, one value on top of another. A folder that is not called DatasetNNN_NAME is warned about; returned is the
    content of its dataset.json.

    A FileNotFoundError for a source file that is gone; a ValueError for one that has changed or is not NIfTI, for no
    labelled scan, several ignored values, a scan without a channel, a label called background or ignore, and for a
    folder that holds something else, or cases that the store has not.
    """
    data, out = Store(store), Path(out)
    check_out(out, DESCRIPTION, "a dataset of nnU-Net")
    labelled = [record for record in data.records if "label" in record["sources"]]
    if not labelled:
        raise ValueError(f"{store}: has no labelled scan, and nnU-Net needs some")
    if reserved := {BACKGROUND, IGNORE} & {*data.labels.values(), *data.regions}:
        raise ValueError(
            f"{store}: a label is called {min(reserved)}, which means something else in nnU-Net: rename it"
        )
    if len(data.ignored) > 1:
        raise ValueError(f"{store}: ignores the values {data.ignored}, and nnU-Net can ignore one")
    values = {value: number for number, value in enumerate((*data.label_values, *data.ignored), start=1)}
    for record in data.records:
        _check_sources(record, data.channels)
    _check_cases(data, out)
    if not re.fullmatch(r"Dataset\d{3}_.+", name := out.absolute().name):
        told = f"nnU-Net takes only folders called DatasetNNN_NAME, like Dataset001_{name}: rename it"
        warnings.warn(f"{out}: {told}", stacklevel=2)
    for record in data.records:
        _write_case(record["sources"], _files(record, data.channels), values, out)
    about = {
        "channel_names": {str(number): name for number, name in enumerate(data.channels)},
        **_declaration(data, values),
        "numTraining": len(labelled),
        "file_ending": ENDING,
    }
    write_json(out / DESCRIPTION, about)
    return about


def _check_sources(record: Mapping[str, Any], channels: Sequence[str]) -> None:
    """Check that all source files of a scan are there and as they were prepared, before anything is written."""
    for name in channels:
        if name not in record["sources"]:
            raise ValueError(f"{record['id']}: has no {name}, and nnU-Net needs every channel of every case")
    for name, source in record["sources"].items():
        path = Path(source["path"])
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; put it back, or prepare the store again")
        if name != "label" and not path.name.endswith((".nii.gz", ".nii")):
            raise ValueError(f"{path}: is not NIfTI: convert it, or give NIfTI files to asa-prepare")
        if sha256_of(path) != source["sha256"]:
            raise ValueError(f"{path}: has changed since it was prepared: run asa-prepare again")


def _check_cases(data: Store, out: Path) -> None:
    """Raise a ValueError if the folder holds files of an earlier export that this one would not replace."""
    expected = {file for record in data.records for file in _files(record, data.channels).values()}
    for path in sorted(out.glob(f"*/*{ENDING}")):
        if path.relative_to(out).as_posix() not in expected:
            raise ValueError(f"{path}: no case of {data.path} has this file: remove it, or choose another out=")


def _files(record: Mapping[str, Any], channels: Sequence[str]) -> dict[str, str]:
    """The file of each channel, and of the label map if there is one, in the dataset."""
    id, part = record["id"], "Tr" if "label" in record["sources"] else "Ts"
    files = {name: f"images{part}/{id}_{number:04d}{ENDING}" for number, name in enumerate(channels)}
    return files | ({"label": f"labelsTr/{id}{ENDING}"} if part == "Tr" else {})


def _write_case(sources: Mapping[str, Any], files: Mapping[str, str], values: Mapping[int, int], out: Path) -> None:
    paths = {name: Path(sources[name]["path"]) for name in files}
    for name, file in files.items():
        if name == "label":
            image, label = read_image(next(iter(paths.values()))), read_label(paths[name])
            numbers = np.zeros(label.data.shape, np.uint8)
            for value, number in values.items():
                numbers[label.data == value] = number
            write_label(out / file, numbers, image)
        else:
            payload = paths[name].read_bytes()
            write_whole(out / file, payload if paths[name].suffix == ".gz" else gzipped(payload))


def _declaration(data: Store, values: Mapping[int, int]) -> dict[str, Any]:
    """labels and, for regions, regions_class_order."""
    regions = {name: sorted(values[value] for value in joined) for name, joined in data.regions.items()}
    whole = {value for joined in regions.values() for value in joined} == {values[value] for value in data.labels}
    try:
        order = painting_order(regions) if whole else []
    except ValueError:  # they cannot be painted
        order = []
    names = list(regions)
    joined: dict[str, int | list[int]] = {names[index]: regions[names[index]] for index, _ in order}
    joined = joined or {data.labels[value]: values[value] for value in data.labels}
    ignored = {IGNORE: values[data.ignored[0]]} if data.ignored else {}
    labels = {"labels": {BACKGROUND: 0, **joined, **ignored}}
    return {**labels, "regions_class_order": [value for _, value in order]} if order else labels
