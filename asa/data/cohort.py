"""Records of a cohort: what a reader returns, checks, and splits that keep a subject in one part."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

from asa.data.files import read_json, write_json

PARTS = ("train", "validation", "test")


class Record(TypedDict):
    """One scan of one subject.

    `id` is unique in the cohort and names the files of the store; `subject` groups scans (sessions, runs) of
    one person; `images` maps channel names to paths.
    """

    id: str
    subject: str
    site: NotRequired[str]
    images: dict[str, str]
    label: NotRequired[str]


AnyRecord = TypeVar("AnyRecord", bound=Mapping[str, Any])


def check_records(records: Sequence[Record], *, source: str = "") -> None:
    """Refuse a cohort that cannot be prepared as one.

    Args:
        records: the cohort.
        source: what was looked for and where, for the message about an empty cohort.

    Raises:
        ValueError: empty, an id twice or unfit for a file name, or records with different channels.
    """
    if not records:
        raise ValueError(f"no scans found{': ' + source if source else ''}; check the folder and the patterns")
    for name, count in Counter(record["id"] for record in records).items():
        if count > 1:
            raise ValueError(f"{name}: {count} scans have this id; make the wildcards or the table tell them apart")
        if not name or name.startswith(".") or any(sign in name for sign in '/\\\0\n:*?"<>|'):
            raise ValueError(f"{name!r}: not usable as an id, because it names files; use letters, digits, - and _")
    channels = list(records[0]["images"])
    for record in records:
        if not record["images"] or list(record["images"]) != channels:
            raise ValueError(
                f"{record['id']}: has the channels {list(record['images'])}, but {records[0]['id']} has "
                f"{channels}; every scan needs the same ones in the same order"
            )


def split_subjects(
    records: Iterable[Mapping[str, Any]], *, validation: int | float = 0, test: int | float = 0, seed: int = 0
) -> dict[str, list[str]]:
    """Split subjects, not scans, into train, validation and test.

    The order comes from a hash of (seed, subject): a subject that joins the cohort later does not shuffle the
    others, and the first n of the train list are nested subsets for experiments with few labels.

    Args:
        records: records of a cohort or of a store.
        validation, test: an int counts subjects, a float in [0, 1) is a fraction (at least one subject if
            above 0).
        seed: another seed, another split.

    Returns:
        Lists of subjects under "train", "validation" and "test".

    Raises:
        ValueError: a part is negative, a fraction of 1 or more, or nothing is left to train on.
    """
    subjects = {str(record["subject"]) for record in records}
    order = sorted(subjects, key=lambda subject: (hashlib.sha256(f"{seed}/{subject}".encode()).digest(), subject))
    n_validation = _count(validation, len(order), "validation")
    n_test = _count(test, len(order), "test")
    if n_validation + n_test >= len(order):
        raise ValueError(
            f"split: {len(order)} subjects cannot give {n_validation} for validation and {n_test} for test "
            "and leave one for training; ask for fewer"
        )
    return {
        "train": order[n_test + n_validation :],
        "validation": order[n_test : n_test + n_validation],
        "test": order[:n_test],
    }


def _count(size: int | float, total: int, part: str) -> int:
    if isinstance(size, int) and size >= 0:
        return size
    if not 0 <= size < 1:
        raise ValueError(f"split: {part}={size} must be a count of subjects (an int) or a fraction from 0 to below 1")
    return max(1, round(size * total)) if size > 0 else 0


def write_split(path: str | Path, split: Mapping[str, Sequence[str]]) -> None:
    """Write a split as JSON, beside the run that used it.

    Raises:
        ValueError: a subject is in two parts, or a part has another name than train, validation, test.
    """
    write_json(path, _checked_split(split, Path(path)))


def read_split(path: str | Path) -> dict[str, list[str]]:
    """Read a split of subjects.

    Returns:
        Lists of subjects under "train", "validation" and "test"; a part that the file leaves out is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, not a split, or a subject in two parts.
    """
    return _checked_split(read_json(path), Path(path))


def _checked_split(split: Any, path: Path) -> dict[str, list[str]]:
    if not isinstance(split, Mapping) or not all(isinstance(part, (list, tuple)) for part in split.values()):
        raise ValueError(f"{path}: a split is JSON with lists of subjects under train, validation and test")
    unknown = [name for name in split if name not in PARTS]
    if unknown:
        raise ValueError(f"{path}: unknown part {unknown[0]!r}; a split has train, validation and test")
    home: dict[str, str] = {}
    for name in PARTS:
        for subject in split.get(name, ()):
            if subject in home:
                where = f"in {home[subject]} and in {name}" if home[subject] != name else f"twice in {name}"
                raise ValueError(f"{path}: subject {subject} is {where}; leave it in one place")
            home[subject] = name
    return {name: [str(subject) for subject in split.get(name, ())] for name in PARTS}


def select(records: Iterable[AnyRecord], subjects: Iterable[str]) -> list[AnyRecord]:
    """Records of the given subjects, in the order of the subjects.

    Args:
        records: records of a cohort or of a store.
        subjects: as in one part of a split.

    Raises:
        ValueError: a subject has no record.
    """
    scans: dict[str, list[AnyRecord]] = {}
    for record in records:
        scans.setdefault(str(record["subject"]), []).append(record)
    subjects = list(subjects)
    missing = [subject for subject in subjects if subject not in scans]
    if missing:
        raise ValueError(
            f"split: {len(missing)} of its subjects are not in the cohort ({', '.join(map(str, missing[:3]))}"
            f"{', ...' if len(missing) > 3 else ''}); prepare them or correct the split"
        )
    return [record for subject in subjects for record in scans[subject]]
