"""Records of a cohort: what a reader returns, and how it is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict


class Record(TypedDict):
    """One scan of one subject.

    `id` is unique in the cohort and names the files of the store; `subject` groups scans (sessions, runs) of
    one person; `images` maps channel names to paths, None where this scan lacks the channel; `label` of a
    labelled cohort is where the label map has to be, even if it is not there.
    """

    id: str
    subject: str
    site: NotRequired[str]
    images: dict[str, str | None]
    label: NotRequired[str]


def check_records(records: Sequence[Record], *, source: str = "") -> None:
    """Refuse a cohort that cannot be prepared as one.

    Args:
        records: the cohort.
        source: what was looked for and where, for the message about an empty cohort.

    Raises:
        ValueError: empty, an id twice or unfit for a file name, a scan without any image, or records with
            different channels.
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
        if not any(record["images"].values()):
            looked = f" (looked for {source})" if source else ""
            raise ValueError(f"{record['id']}: no image of {', '.join(channels)}{looked}; add it, or take the scan out")


def existing_folder(root: str | Path, holds: str) -> Path:
    """The folder that a reader starts from.

    Args:
        root: as the user gave it.
        holds: what is expected in it, for the message.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds {holds}")
    return root


def first_file(*paths: Path) -> str | None:
    """The first of some paths where a file is, absolute; None if there is none."""
    return next((str(path.absolute()) for path in paths if path.is_file()), None)
