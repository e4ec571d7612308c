"""Any folder of images: a glob for each channel, or a CSV or JSON table; and which reader a folder is for."""

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asa.data.datasets import nnunet
from asa.data.datasets.record import SUBJECT, Record, existing_folder, is_label_map, make_record, named_records
from asa.data.io.files import VOLUME_ENDINGS, matching_files, read_json
from asa.data.io.tables import check_capitals, read_rows

IMAGES = "'data.images={t1: *_T1.nii.gz}'"  # an example for messages
COLUMNS = ("id", "subject", "site", "label")  # of a table; all other columns are channels
BY_HAND = "prepare it by asa-prepare, which reads more layouts, and give asa run the store in place of the folder"
_WILDCARD = re.compile(r"\*\*/|\*|\?|\[[^\]]+\]")


def records(
    root: str | Path | None,
    *,
    images: Mapping[str, str] | None = None,
    label: str | None = None,
    subject: str | None = None,
    table: str | Path | None = None,
) -> list[Record]:
    """Records from globs, or from a table.

    With globs, the id is the text matched by the wildcards of the first channel, joined by "_" (repeated texts once);
    files of the other globs belong to the id with the same wildcard texts. A channel without a file, or with an empty
    cell, is None. A label map that a glob does not find has the expected path; an empty cell makes a scan unlabelled.
    Of a channel's files those that the narrower glob of the label maps matches, too, are left out.

    Args:
        root: folder that the globs and a relative `table` start from; with a table it may be None.
        images: channel name -> glob, like `{"t1": "*_T1.nii.gz"}`; with `table`, channel name -> column.
        label: glob of the label maps; None for an unlabelled cohort.
        subject: regular expression searched in the id, whose group 1 is the subject; None: see `subject_of`.
        table: CSV or JSON list with the column id, subject, site and label if known, and one per channel; paths are
            relative to the table.

    Raises:
        ValueError: neither a root nor a table, a scan without the first channel, a glob that matches no scan, different
            numbers of wildcards, or an invalid table.
    """
    if table is not None:
        if label is not None:
            raise ValueError(f"{table}: a table names its labels in its own column; leave out data.label={label!r}")
        path = Path(root or "", table)
        found, source = _from_table(path, images), f"rows of {path}"
    else:
        if root is None:
            raise ValueError("data.root has to be given, or a table: add data.root=FOLDER")
        root = existing_folder(root, "the images")
        if not images:
            raise ValueError(f"{root}: give the names of the images, like {IMAGES}, or data.table=FILE")
        if not isinstance(images, Mapping):
            raise ValueError(f"data.images={images}: give the file pattern of each channel by its name, like {IMAGES}")
        found, source = _from_globs(root, images, label), f"{next(iter(images.values()))!r} below {root}"
    return named_records(found, subject, source=source)


def _from_globs(root: Path, images: Mapping[str, str], label: str | None) -> list[Record]:
    if label is not None and "label" in images:
        raise ValueError(f"{root}: a channel cannot be called 'label'; rename it in data.images")
    globs = dict(images) | ({"label": label} if label is not None else {})
    first = next(iter(globs))
    matches = {name: find_files(root, glob) for name, glob in globs.items()}
    maps = set(matches["label"].values()) if label is not None else set()
    for name in images:
        if maps < set(matches[name].values()):  # as *.nii.gz takes in NAME_seg.nii.gz
            matches[name] = {texts: path for texts, path in matches[name].items() if path not in maps}
    for name in globs:
        _check_match(root, name, globs, matches)
    found: list[Record] = []
    for texts in matches[first]:
        name = join_texts(texts)
        paths = {channel: matches[channel].get(texts) for channel in images}
        truth = None if label is None else matches["label"].get(texts) or root / _fill(label, texts)
        found.append(make_record(name, _subject(globs[first], texts), paths, label=truth))
    return found


def _subject(glob: str, texts: tuple[str, ...]) -> str:
    """What `SUBJECT` finds in the folders of a scan from the first wildcard on, its id or its path; else the id.

    So sub-*/ses-*/T1.nii.gz finds sub-01.
    """
    wildcards = list(_WILDCARD.finditer(glob))
    path = _fill(glob[glob.rfind("/", 0, wildcards[0].start()) + 1 : wildcards[-1].end()], texts)
    id = join_texts(texts)
    found = (SUBJECT.match(text.replace("/", "_")) for text in (path.rpartition("/")[0], id, path))
    return next((match[0] for match in found if match), id)


def _check_match(
    root: Path, name: str, globs: Mapping[str, str], matches: Mapping[str, Mapping[tuple[str, ...], Path]]
) -> None:
    first = next(iter(globs))
    glob, files, first_glob, first_files = globs[name], matches[name], globs[first], matches[first]
    if len(_WILDCARD.findall(glob)) != len(_WILDCARD.findall(first_glob)):
        raise ValueError(f"{name}: glob {glob!r} needs as many wildcards as {first_glob!r}, matching the same text")
    if first_files and not files.keys() & first_files.keys():
        hint = "correct it, or give data.label=null for an unlabelled cohort" if name == "label" else "correct it"
        raise ValueError(f"{name}: glob {glob!r} matches none of the scans of {first_glob!r} below {root}; {hint}")
    maps = [] if name == "label" else [path.name for path in files.values() if is_label_map(path.name)]
    if 0 < len(maps) < len(files):
        warnings.warn(
            f"{root}: {len(maps)} of {len(files)} files by {glob!r} are label maps by their names, like {min(maps)}, "
            "and are read as scans: give a narrower pattern",
            stacklevel=2,
        )
    if not (lone := sorted(files.keys() - first_files.keys())):
        return
    id = join_texts(lone[0])
    if name != "label":
        raise ValueError(
            f"{id}: no {first} for this and {len(lone) - 1} other scans with {name} by {first_glob!r} below {root}; "
            "add the files, put a channel that no scan lacks first, or give a table"
        )
    told = f"{len(lone)} of {len(files)} label maps by {glob!r} belong to no scan, like {id}"
    warnings.warn(f"{root}: {told}", stacklevel=2)


def has_wildcard(glob: str) -> bool:
    """Whether a text is a glob rather than a path."""
    return _WILDCARD.search(glob) is not None


def join_texts(texts: tuple[str, ...]) -> str:
    """The id of a scan from its wildcard texts."""
    return "_".join(dict.fromkeys(text for text in texts if text)).replace("/", "_")


def find_files(root: Path, glob: str) -> dict[tuple[str, ...], Path]:
    """Wildcard texts -> absolute path of all files, but hidden ones, that a glob, which needs a wildcard, matches."""
    if not has_wildcard(glob):
        raise ValueError(f"{root}: glob {glob!r} has no wildcard; put a * where the names of the scans differ")
    known = {"**/": r"((?:[^/]+/)*)", "*": r"([^/]*)", "?": r"([^/])"}
    groups = [known.get(text, f"({text.replace('[!', '[^', 1)})") for text in _WILDCARD.findall(glob)]
    literals = map(re.escape, _WILDCARD.split(glob))
    pattern = re.compile("".join(itertools.chain(*zip(literals, [*groups, ""], strict=True))))
    files: dict[tuple[str, ...], Path] = {}
    for path in matching_files(root, glob):
        relative = path.relative_to(root)
        match = pattern.fullmatch(relative.as_posix())
        if match is not None and not any(part.startswith(".") for part in relative.parts):
            files[tuple(text.strip("/") for text in match.groups())] = path.absolute()
    return files


def files_by_id(pattern: str | Path) -> dict[str, Path]:
    """Id -> file of a path whose wildcards stand for the id, like scans/*_T1.nii.gz; errors as of `records`."""
    parts = Path(pattern).parts
    first = next((k for k, part in enumerate(parts) if has_wildcard(part)), len(parts) - 1)
    found = records(Path(*parts[:first]), images={"image": "/".join(parts[first:])})
    return {one["id"]: Path(str(one["images"]["image"])) for one in found}


def matching_globs(first: Sequence[str], second: Sequence[str]) -> tuple[str, str, int] | None:
    """A glob for each of two lists of file names, whose * stand for the same texts, and the number of these.

    The * stands for whole words, between _, - and dots: of all globs those that share most texts, then the longest.
    None where they share less than half of the shorter list.
    """
    sides = [_spans(names).items() for names in (first, second)]
    pairs = [(glob, other, len(texts & theirs)) for (glob, texts), (other, theirs) in itertools.product(*sides)]
    best = max(pairs, key=lambda pair: (pair[2], -len(pair[0]) - len(pair[1])))
    return best if 2 * best[2] >= min(len(first), len(second)) else None


def _spans(names: Sequence[str]) -> dict[str, set[str]]:
    """Glob -> texts of its *, for each run of whole words of the first of some file names."""
    name, dot, ending = min(names).partition(".")
    words = re.split(r"([_-])", name)
    found: dict[str, set[str]] = {}
    for start, stop in itertools.combinations(range(0, len(words) + 2, 2), 2):
        before, after = "".join(words[:start]), "".join(words[stop - 1 :]) + dot + ending
        fitting = [one for one in names if one.startswith(before) and one.endswith(after)]
        texts = {one[len(before) : len(one) - len(after)] for one in fitting if len(one) > len(before) + len(after)}
        found[f"{before}*{after}"] = texts
    return found


def _fill(glob: str, texts: tuple[str, ...]) -> str:
    """A glob with its wildcards replaced by their texts."""
    pairs = zip(_WILDCARD.findall(glob), texts, strict=True)
    filled = iter([f"{text}/" if text and wildcard == "**/" else text for wildcard, text in pairs])
    return _WILDCARD.sub(lambda _: next(filled), glob)


def _from_table(path: Path, images: Mapping[str, str] | None) -> list[Record]:
    rows = _rows(path)
    names = list(dict.fromkeys(name for row in rows for name in row))  # JSON rows may omit empty columns
    columns = images or {name: name for name in names if name not in COLUMNS}
    check_capitals(path, names, (*COLUMNS, *columns.values()))
    unknown = [column for column in columns.values() if column not in names] or ([] if columns else ["t1"])
    if rows and unknown:
        raise ValueError(
            f"{path}: no column {unknown[0]!r} with data.images (columns are {', '.join(names)}); "
            "add it, or name the columns in data.images"
        )
    found: list[Record] = []
    for number, row in enumerate(rows, start=1):
        if not row.get("id"):
            raise ValueError(f"{path}: row {number} has no id; every row needs one")
        subject, site = row.get("subject") or row["id"], row.get("site", "")
        paths = {name: path.parent / cell if (cell := row.get(column)) else None for name, column in columns.items()}
        truth = path.parent / row["label"] if row.get("label") else None
        found.append(make_record(row["id"], subject, paths, site=site, label=truth))
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; give a CSV or JSON file")
    if path.suffix == ".json":
        content: Any = read_json(path)
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ValueError(f"{path}: a JSON table is a list of objects, one per scan")
        return [{str(key): "" if value is None else str(value) for key, value in row.items()} for row in content]
    rows = [{key: value for key, value in row.items() if key} for row in read_rows(path)]
    check_capitals(path, rows[0] if rows else (), ("id",))
    if rows and "id" not in rows[0]:
        raise ValueError(f"{path}: no column 'id' (columns are {', '.join(rows[0])}); add it, separated by commas")
    return rows


def recognise(folder: Path, *, labelled: bool) -> dict[str, Any]:
    """The settings `data` and `data.*` with which asa-prepare reads a folder.

    Args:
        folder: a raw dataset of nnU-Net, FreeSurfer's subjects, a BIDS dataset, or a folder of NIfTI files, in which
            NAME_T1.nii.gz has the label map NAME_seg.nii.gz.
        labelled: whether label maps are wanted.

    Raises:
        FileNotFoundError, ValueError: no such folder, none of these, or no label maps; the message says what to do.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: {'is a file; give the folder' if folder.exists() else 'no such folder'}")
    reader, settings = "folder", dict[str, Any]()
    if (folder / nnunet.DESCRIPTION).exists() and (folder / "imagesTr").is_dir():
        reader = "nnunet"
    elif any(folder.glob("*/mri/T1.mgz")):
        reader, settings = "freesurfer", {} if labelled else {"data.label": None}
    elif any(folder.glob("sub-*/**/anat/sub-*_T1w.nii*")):
        reader, settings = "bids", _bids_labels(folder) if labelled else {}
    else:
        settings = _plain(folder, labelled)
    return {"data": reader, "data.root": str(folder), **settings}


def _bids_labels(folder: Path) -> dict[str, Any]:
    """Where a BIDS dataset keeps label maps: beside the scans, or in one of its derivatives."""
    places = [place for place in (folder, *folder.glob("derivatives/*")) if any(place.glob("sub-*/**/*_dseg.nii*"))]
    if len(places) != 1:
        found = " and ".join(map(str, places)) or "nowhere"
        raise ValueError(f"{folder}: label maps (*_dseg.nii.gz) are found {found}: {BY_HAND}")
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
        raise ValueError(f"{folder}: {found}; {expected} a scan were expected: {BY_HAND}")
    return {"data.images": {"t1": f"*{images.pop()}"}} | ({"data.label": f"*{labels.pop()}"} if labelled else {})


def _ending(name: str) -> str:
    """What the names of all scans' files of one kind end in: `_T1.nii.gz`; `.nii.gz` where a number is before it."""
    stem, dot, suffix = name.partition(".")
    word = stem.rpartition("_")[2]
    return f"{dot}{suffix}" if word == stem or word.isdigit() else f"_{word}{dot}{suffix}"
