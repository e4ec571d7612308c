"""Which scans and subjects a network was trained on, carried in its checkpoint without a name, and found again.

A scan is known by the digests of its voxels in the manifest (see `asa.data.io.nifti.identity_of`): it is found under
another id and in another store, but not once it was resampled. A subject is known by a digest of its name, which keeps
names out of shared weights but does not withstand guessing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Trained = dict[str, list[str]]
KEYS = ("scans", "subjects")


@dataclass(frozen=True)
class Seen:
    """A held-out subject that the network was trained on: in the part `part`, found by its "scan" or its "name"."""

    part: str
    subject: str
    match: str


def trained_on(records: Iterable[Mapping[str, Any]], before: Mapping[str, Sequence[str]] | None = None) -> Trained:
    """What a checkpoint says of the scans that it was trained on.

    Args:
        records: entries of a store's manifest.
        before: the same of the checkpoint that training started from; None: from scratch.

    Returns:
        "scans": digests of the scans' voxels, a channel each; "subjects": digests of the subjects' names. Both sorted.
    """
    known = {key: set(before[key]) if before else set() for key in KEYS}
    for record in records:
        known["scans"].update(record["identity"].values())
        known["subjects"].add(_name(record["subject"]))
    return {key: sorted(known[key]) for key in KEYS}


def known_trained(data: Mapping[str, Any]) -> Trained | None:
    """The same out of a checkpoint's description of its data; None where an older one does not say it."""
    return {key: data[key] for key in KEYS} if all(key in data for key in KEYS) else None


def seen_subjects(
    records: Iterable[Mapping[str, Any]], split: Mapping[str, Sequence[str]], trained: Mapping[str, Sequence[str]]
) -> list[Seen]:
    """Subjects of the validation and test parts that a network was trained on.

    Args:
        records: entries of a store's manifest; every scan of a subject is looked at, whichever is used.
        split: subjects under "train", "validation" and "test".
        trained: of `trained_on`.

    Returns:
        In the order of the split. A subject whose name alone is known may be another person.
    """
    scans, names = (set(trained[key]) for key in KEYS)
    by_scan = {str(record["subject"]) for record in records if not scans.isdisjoint(record["identity"].values())}
    seen = []
    for part in ("validation", "test"):
        for subject in split[part]:
            if subject in by_scan:
                seen.append(Seen(part, subject, "scan"))
            elif _name(subject) in names:
                seen.append(Seen(part, subject, "name"))
    return seen


def _name(subject: object) -> str:
    return hashlib.sha256(str(subject).encode()).hexdigest()[:16]
