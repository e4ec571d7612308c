"""Leakage check: were held-out subjects part of the data that a network was pretrained on?

A checkpoint carries digests of its training scans and subjects, without any name. A scan is identified by the digests
of its voxels in the store (see `asa.data.io.nifti.identity_of`): it is found under another id and in another store,
but not after resampling. A subject is identified by a digest of its name. That keeps names out of shared weights, but
names can be guessed and confirmed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TrainingDigests = dict[str, list[str]]
KEYS = ("scans", "subjects")


@dataclass(frozen=True)
class LeakedSubject:
    """A held-out subject of the part `part` that the network was trained on, found by its "scan" or its "name"."""

    part: str
    subject: str
    match: str


def training_digests(
    records: Iterable[Mapping[str, Any]], previous: Mapping[str, Sequence[str]] | None = None
) -> TrainingDigests:
    """Digests of the training data, for a checkpoint.

    Args:
        records: entries of a store.
        previous: the digests of the checkpoint that training started from; None: from scratch.

    Returns:
        "scans": digests of the voxels, one per channel of a scan; "subjects": digests of the subjects' names; sorted.
    """
    scans, subjects = (set(previous[key]) if previous else set() for key in KEYS)
    for record in records:
        scans.update(record["identity"].values())
        subjects.add(_name_digest(record["subject"]))
    return {"scans": sorted(scans), "subjects": sorted(subjects)}


def stored_digests(data: Mapping[str, Any]) -> TrainingDigests | None:
    """The digests in the data description of a checkpoint; None where an older checkpoint has none."""
    return {key: data[key] for key in KEYS} if all(key in data for key in KEYS) else None


def find_leaks(
    records: Iterable[Mapping[str, Any]], split: Mapping[str, Sequence[str]], digests: Mapping[str, Sequence[str]]
) -> list[LeakedSubject]:
    """Subjects of the validation and test parts of a split that a network was trained on, in its order.

    All scans of a subject are checked, used or not. A subject that matches by name only may be another person.
    """
    scans, names = (set(digests[key]) for key in KEYS)
    by_scan = {str(record["subject"]) for record in records if not scans.isdisjoint(record["identity"].values())}
    leaks = []
    for part in ("validation", "test"):
        for subject in split[part]:
            if subject in by_scan:
                leaks.append(LeakedSubject(part, subject, "scan"))
            elif _name_digest(subject) in names:
                leaks.append(LeakedSubject(part, subject, "name"))
    return leaks


def _name_digest(subject: object) -> str:
    return hashlib.sha256(str(subject).encode()).hexdigest()[:16]
