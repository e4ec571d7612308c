"""Any folder of images: a glob for each channel, or a CSV or JSON table."""

import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asa.data.datasets.record import (
    SUBJECT,
    Record,
    existing_folder,
    is_label_map,
    make_record,
    sorted_records,
    subject_of,
)
from asa.data.io.files import matching_files, read_json
from asa.data.io.tables import check_capitals, read_rows

IMAGES = "'data.images={t1: *_T1.nii.gz}'"  # an example for messages
COLUMNS = ("id", "subject", "site", "label")  # of a table; all other columns are channels


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
        table: CSV or JSON list with the columns id, subject (optional), site (optional), label (optional) and one per
            channel; paths are relative to the table.

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
    name_subjects(found, subject)
    return sorted_records(found, source=source)


def name_subjects(found: Iterable[Record], subject: str | None) -> None:
    """Set the subject of each record to `subject_of` its id, or its `problem`; None keeps one that is not the id."""
    for record in (one for one in found if subject is not None or one["subject"] == one["id"]):
        try:
            record["subject"] = subject_of(record["id"], subject)
        except ValueError as error:
            record["problem"] = str(error)


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
    """What `SUBJECT` finds in the folders of a scan, in its id, or in its path up to the last wildcard; else the id.

    So that sub-*/ses-*/T1.nii.gz finds sub-01. Folders above the first wildcard are not part of it.
    """
    wildcards = list(_WILDCARD.finditer(glob))
    path = _fill(glob[glob.rfind("/", 0, wildcards[0].start()) + 1 : wildcards[-1].end()], texts)
    id = join_texts(texts)
    found = (SUBJECT.match(text.replace("/", "_")) for text in (path.rpartition("/")[0], id, path))
    return next((match[0] for match in found if match), id)


def _check_match(
    root: Path, name: str, globs: Mapping[str, str], matches: Mapping[str, Mapping[tuple[str, ...], Path]]
) -> None:
    """Check that the glob of this name can match the same scans as the first one."""
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
    lone = sorted(files.keys() - first_files.keys())
    if lone and name != "label":
        raise ValueError(
            f"{join_texts(lone[0])}: no {first} for this and {len(lone) - 1} other scans with {name} by "
            f"{first_glob!r} below {root}; add the files, put a channel that no scan lacks first, or give a table"
        )
    if lone:
        warnings.warn(
            f"{root}: {len(lone)} of {len(files)} label maps by {glob!r} belong to no scan, like {join_texts(lone[0])}",
            stacklevel=2,
        )


_WILDCARD = re.compile(r"\*\*/|\*|\?|\[[^\]]+\]")


def has_wildcard(glob: str) -> bool:
    """Whether a text is a glob rather than a path."""
    return _WILDCARD.search(glob) is not None


def join_texts(texts: tuple[str, ...]) -> str:
    """The id of a scan from its wildcard texts."""
    return "_".join(dict.fromkeys(text for text in texts if text)).replace("/", "_")


def find_files(root: Path, glob: str) -> dict[tuple[str, ...], Path]:
    """Wildcard texts -> absolute path of all files that a glob matches, except names that start with a dot.

    Raises:
        ValueError: the glob has no wildcard.
    """
    if not has_wildcard(glob):
        raise ValueError(f"{root}: glob {glob!r} has no wildcard; put a * where the names of the scans differ")
    known = {"**/": r"((?:[^/]+/)*)", "*": r"([^/]*)", "?": r"([^/])"}
    groups = [known.get(text, f"({text.replace('[!', '[^', 1)})") for text in _WILDCARD.findall(glob)]
    literals = map(re.escape, _WILDCARD.split(glob))
    pattern = re.compile("".join(itertools.chain(*zip(literals, [*groups, ""], strict=True))))
    files: dict[tuple[str, ...], Path] = {}
    for path in matching_files(root, glob):
        relative = path.relative_to(root).as_posix()
        match = pattern.fullmatch(relative)
        if match is not None and not any(part.startswith(".") for part in relative.split("/")):
            files[tuple(text.strip("/") for text in match.groups())] = path.absolute()
    return files


def files_by_id(pattern: str | Path) -> dict[str, Path]:
    """Id -> file of a path whose wildcards stand for the id, like scans/*_T1.nii.gz.

    Raises:
        FileNotFoundError, ValueError: see `records`.
    """
    parts = Path(pattern).parts
    first = next((k for k, part in enumerate(parts) if has_wildcard(part)), len(parts) - 1)
    found = records(Path(*parts[:first]), images={"image": "/".join(parts[first:])})
    return {one["id"]: Path(str(one["images"]["image"])) for one in found}


def matching_globs(first: Sequence[str], second: Sequence[str]) -> tuple[str, str, int] | None:
    """A glob for each of two lists of file names, whose * stand for the same texts in as many names as possible.

    The * stands for whole words, between _, - and dots; the longest of several that match as many.

    Returns:
        Both globs and the number of texts that they share; None where that is less than half of the shorter list.
    """
    best: tuple[tuple[int, int], tuple[str, str, int]] | None = None
    sides = [_spans(names) for names in (first, second)]
    for (glob, texts), (other, other_texts) in itertools.product(*(side.items() for side in sides)):
        shared = len(texts & other_texts)
        rank = (shared, -len(glob) - len(other))
        if 2 * shared >= min(len(first), len(second)) and (best is None or rank > best[0]):
            best = rank, (glob, other, shared)
    return best[1] if best else None


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
    unknown = [column for column in columns.values() if column not in names]
    if rows and (unknown or not columns):
        raise ValueError(
            f"{path}: no column {unknown[0] if unknown else 't1'!r} with data.images (columns are {', '.join(names)}); "
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
