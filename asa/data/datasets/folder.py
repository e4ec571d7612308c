"""Any folder of images: a glob for each channel, or a CSV or JSON table."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asa.data.cohort import Record, check_records
from asa.data.files import read_json

COLUMNS = ("id", "subject", "site", "label")  # of a table; every other column is a channel


def records(
    root: str | Path,
    *,
    images: Mapping[str, str] | None = None,
    label: str | None = None,
    subject: str | None = None,
    table: str | Path | None = None,
) -> list[Record]:
    """Records from globs, or from a table.

    With globs, the id is the text that the wildcards of the first channel's glob match, joined by "_" (a text
    that repeats counts once); the other globs are matched to it by the same wildcard text.

    Args:
        root: folder that the globs start from; not used with an absolute `table`.
        images: channel name to glob, like `{"t1": "*_T1.nii.gz"}`; with `table`, channel name to column.
        label: glob of the label maps; None for an unlabelled cohort.
        subject: regular expression searched in the id, whose group 1 is the subject; None: each id is one
            subject.
        table: CSV or JSON list with the columns id, subject (optional), site (optional), label (optional) and
            one for each channel; paths are relative to the table.

    Returns:
        Records sorted by id.

    Raises:
        FileNotFoundError: the root or the table is missing.
        ValueError: nothing found, an image or label missing, wildcards that do not correspond, or a bad
            table.
    """
    if table is not None:
        if label is not None:
            raise ValueError(f"{table}: a table names its labels in its own column; leave out label={label!r}")
        path = Path(root, table)
        found, source = _from_table(path, images), f"rows of {path}"
    else:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the images")
        if not images:
            raise ValueError(
                f"{root}: say what the images are called, like images={{t1: '*_T1.nii.gz'}}, or give table="
            )
        found, source = _from_globs(root, images, label), f"{next(iter(images.values()))!r} below {root}"
    if subject is not None:
        for record in found:
            match = re.search(subject, record["id"])
            if match is None or not match.groups() or not match.group(1):
                raise ValueError(
                    f"{record['id']}: subject={subject!r} finds no group 1 in this id; correct the expression"
                )
            record["subject"] = match.group(1)
    found.sort(key=lambda record: record["id"])
    check_records(found, source=source)
    return found


def _from_globs(root: Path, images: Mapping[str, str], label: str | None) -> list[Record]:
    globs = dict(images) | ({"label": label} if label is not None else {})
    if label is not None and "label" in images:
        raise ValueError(f"{root}: a channel cannot be called 'label'; rename it in images")
    first = next(iter(globs))
    matches = {name: _matches(root, glob) for name, glob in globs.items()}
    for name, glob in globs.items():
        if len(_wildcards(glob)) != len(_wildcards(globs[first])):
            raise ValueError(
                f"{name}: glob {glob!r} needs as many wildcards as {globs[first]!r}, matching the same text"
            )
        missing = sorted(set(matches[first]) - set(matches[name]))
        if missing:
            hint = "give label=null to go unlabelled, or " if name == "label" else ""
            raise ValueError(
                f"{_id(missing[0])}: no {name} for this and {len(missing) - 1} other scans by {glob!r} "
                f"below {root}; add the files, {hint}list the complete scans in a table"
            )
    found: list[Record] = []
    for texts, path in matches[first].items():
        name = _id(texts)
        record: Record = {
            "id": name,
            "subject": name,
            "images": {key: str(matches[key][texts]) for key in images},
        }
        if label is not None:
            record["label"] = str(matches["label"][texts])
        assert record["images"][first] == str(path)
        found.append(record)
    return found


def _id(texts: tuple[str, ...]) -> str:
    return "_".join(dict.fromkeys(texts)).replace("/", "_")


_WILDCARD = re.compile(r"\*\*/|\*|\?|\[[^\]]+\]")


def _wildcards(glob: str) -> list[str]:
    return _WILDCARD.findall(glob)


def _matches(root: Path, glob: str) -> dict[tuple[str, ...], Path]:
    """Wildcard texts -> file, for all files that a glob finds; names that start with a dot are left out."""
    if not _wildcards(glob):
        raise ValueError(f"{root}: glob {glob!r} has no wildcard to tell scans apart; put a * where the names differ")
    expression, position = "", 0
    for wildcard in _WILDCARD.finditer(glob):
        expression += re.escape(glob[position : wildcard.start()])
        text = wildcard.group()
        bracket = text.replace("[!", "[^", 1) if text.startswith("[") else None
        expression += {"**/": r"((?:[^/]+/)*)", "*": r"([^/]*)", "?": r"([^/])"}.get(text, f"({bracket})")
        position = wildcard.end()
    pattern = re.compile(expression + re.escape(glob[position:]))
    files: dict[tuple[str, ...], Path] = {}
    for path in sorted(root.glob(glob)):
        relative = path.relative_to(root).as_posix()
        match = pattern.fullmatch(relative)
        if match is None or any(part.startswith(".") for part in relative.split("/")):
            continue
        files[tuple(text.strip("/") for text in match.groups())] = path.absolute()
    return files


def _from_table(path: Path, images: Mapping[str, str] | None) -> list[Record]:
    rows = _rows(path)
    found: list[Record] = []
    for number, row in enumerate(rows, start=1):
        if not row.get("id"):
            raise ValueError(f"{path}: row {number} has no id; every row needs one")
        columns = images or {name: name for name in row if name not in COLUMNS}
        empty = [column for column in columns.values() if not row.get(column)]
        if empty or not columns:
            raise ValueError(
                f"{path}: row {row['id']} has no path in column {empty[0] if empty else 't1'!r}; fill it in"
            )
        record: Record = {
            "id": row["id"],
            "subject": row.get("subject") or row["id"],
            "images": {channel: str((path.parent / row[column]).absolute()) for channel, column in columns.items()},
        }
        if row.get("site"):
            record["site"] = row["site"]
        if row.get("label"):
            record["label"] = str((path.parent / row["label"]).absolute())
        found.append(record)
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; give a CSV or JSON file")
    if path.suffix == ".json":
        content: Any = read_json(path)
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ValueError(f"{path}: a table in JSON is a list of objects, one for each scan")
        return [{str(key): "" if value is None else str(value) for key, value in row.items()} for row in content]
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark first
        rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in csv.DictReader(file)]
    if rows and "id" not in rows[0]:
        raise ValueError(f"{path}: no column 'id' (columns are {', '.join(rows[0])}); add it, separated by commas")
    return rows
