"""nnU-Net's raw datasets, version 2: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, imagesTs and dataset.json.

https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

from pathlib import Path
from typing import Any, NamedTuple

from asa.data.datasets.record import Record, check_channel, existing_folder, find_file, make_record, named_records
from asa.data.io.files import VOLUME_ENDINGS, read_json

DESCRIPTION = "dataset.json"
PARTS = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", None)}
BACKGROUND, IGNORE = "background", "ignore"


class LabelScheme(NamedTuple):
    """The label metadata of a dataset.json."""

    labels: dict[int, str]  # value -> name, without the background
    ignored: list[int]  # values whose voxels are excluded
    regions: dict[str, list[int]]  # name -> values that it joins; empty for a dataset of plain labels


def records(root: str | Path, *, part: str = "train", subject: str | None = None) -> list[Record]:
    """Records of a dataset's training cases with their labels, or of its test cases; the id is the case.

    Channels are as dataset.json names them, None where a case has no file.

    Args:
        root: folder DatasetNNN_NAME with dataset.json.
        part: "train" (imagesTr and labelsTr, or the files that dataset.json lists) or "test" (imagesTs, unlabelled).
        subject: regular expression searched in the case, whose group 1 is the subject; None: see `subject_of`.

    Raises:
        FileNotFoundError, ValueError: no dataset.json, an invalid one, or another file format.
    """
    if part not in PARTS:
        raise ValueError(f"data.part={part!r}: choose train or test")
    root = existing_folder(root, f"{DESCRIPTION}, imagesTr and labelsTr").absolute()
    about = _description(root)
    channels, ending = _channels(root, about), str(about["file_ending"])
    images, labels = PARTS[part]
    if part == "train" and "dataset" in about:
        found, source = _listed(root, about["dataset"], channels), f"the cases that {root / DESCRIPTION} lists"
    else:
        found = []
        files = [path.name for path in (root / images).glob(f"*_????{ending}") if not path.name.startswith(".")]
        for case in sorted({name.removesuffix(ending)[:-5] for name in files}):
            stem = root / images / case
            paths = {name: find_file(f"{stem}_{number:04d}", (ending,)) for number, name in channels.items()}
            found.append(make_record(case, case, paths, label=root / labels / f"{case}{ending}" if labels else None))
        source = f"CASE_0000{ending} in {root / images}"
    return named_records(found, subject, source=source)


def label_scheme(root: str | Path, **_: Any) -> LabelScheme:
    """The labels, ignored values and regions that a dataset.json declares.

    The labels of a dataset of regions have no names of their own: a value that is a region by itself has that region's
    name, another value v is called label_v. Raises as `records`.
    """
    root = existing_folder(root, DESCRIPTION)
    declared = _description(root)["labels"]
    joined = {name: _values(root, name, values) for name, values in declared.items() if name != BACKGROUND}
    ignored = joined.pop(IGNORE, [])
    single = {values[0]: name for name, values in joined.items() if len(values) == 1}
    used = sorted({value for values in joined.values() for value in values})
    labels = {value: single.get(value, f"label_{value}") for value in used}
    has_regions = any(len(values) > 1 for values in joined.values())
    return LabelScheme(labels, ignored, joined if has_regions else {})


def _description(root: Path) -> dict[str, Any]:
    """The content of dataset.json, with the keys that nnU-Net requires."""
    path = root / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; data.root= is the folder DatasetNNN_NAME of nnU-Net")
    about = read_json(path)
    if not isinstance(about, dict) or not isinstance(about.get("labels"), dict):
        raise ValueError(f"{path}: has no labels, like {{background: 0, csf: 1}}: is it of nnU-Net's version 2?")
    for key in ("channel_names", "file_ending"):
        if key not in about:
            raise ValueError(f"{path}: has no {key}: it is not of nnU-Net's version 2")
    if about["file_ending"] not in VOLUME_ENDINGS:
        raise ValueError(
            f"{path}: file_ending is {about['file_ending']!r}; asa reads {', '.join(VOLUME_ENDINGS)}: convert"
        )
    if about["labels"].get(BACKGROUND) != 0:
        raise ValueError(f"{path}: {BACKGROUND} has to be declared as 0")
    return about


def _channels(root: Path, about: dict[str, Any]) -> dict[int, str]:
    """Channel number -> name."""
    names = about["channel_names"]
    if not isinstance(names, dict) or not all(number.isdecimal() and len(number) < 5 for number in names) or not names:
        raise ValueError(f"{root / DESCRIPTION}: channel_names has to be like {{0: T1, 1: FLAIR}}")
    channels = {int(number): name for number, name in names.items()}
    if len(channels) < len(names):
        raise ValueError(f"{root / DESCRIPTION}: channel_names has a number twice, like 1 and 01; remove one")
    try:
        for name in channels.values():
            check_channel(name)
    except ValueError as error:
        raise ValueError(f"{root / DESCRIPTION}: {error}") from None
    if len(set(channels.values())) < len(channels):
        raise ValueError(f"{root / DESCRIPTION}: two channels have one name; rename one")
    return dict(sorted(channels.items()))


def _listed(root: Path, cases: Any, channels: dict[int, str]) -> list[Record]:
    """Records of the cases whose files dataset.json lists, relative to its folder."""
    found: list[Record] = []
    try:
        listed = {
            case: ([root / image for image in files["images"]], root / files["label"]) for case, files in cases.items()
        }
    except (TypeError, KeyError, AttributeError):
        example = "{CASE: {images: [PATH], label: PATH}}"
        raise ValueError(f"{root / DESCRIPTION}: dataset has to be like {example}") from None
    for case, (paths, label) in listed.items():
        present = zip(channels.values(), [find_file(path, ("",)) for path in paths], strict=False)
        record = make_record(case, case, dict.fromkeys(channels.values()) | dict(present), label=label)
        if len(paths) != len(channels):
            record["problem"] = f"{case}: {DESCRIPTION} lists {len(paths)} images for {len(channels)} channels"
        found.append(record)
    return found


def _values(root: Path, name: str, values: Any) -> list[int]:
    listed = values if isinstance(values, list) else [values]
    if not listed or not all(type(value) is int and value > 0 for value in listed):
        raise ValueError(f"{root / DESCRIPTION}: the label {name} is {values!r}; give values above 0")
    return sorted(set(listed))
