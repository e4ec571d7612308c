"""Records of a cohort, as readers return them, and their checks."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from asa.data.io.files import VOLUME_ENDINGS, check_id, is_utf8

NIFTI = (".nii.gz", ".nii")
# The beginning of an id: names as in BIDS, of OASIS-1 to 4, of ADNI, and of the time points of BraTS since 2023.
SUBJECT = re.compile(
    r"(.*?_)??(sub(-[^_]+|_\d+)|OAS[12]_\d{4}|OAS[34]\d{4}|\d{3}_S_\d{4,5}|BraTS-[A-Za-z]+-\d+(?=-\d{3}(_|$)))(?=[_-]|$)"
)
# The last word of a label map's name, like dseg, synthseg, segTRI_fill_ana or wmparc; or aseg and aparc anywhere in it.
LABEL_NAME = re.compile(
    r"(?:^|[_.+-])(?:\w*seg|seg(?:tri)?(?:_fill)?_ana|segtri|segmentations?|\w*parc|parcellations?|label_?maps?|labels?"
    r"|masks?|manual|truth|structures|regions|atlas|tissues|lesions?|ribbon)$|(?:^|[_.+-])(?:aseg|aparc)(?:[_.+-]|$)",
    re.IGNORECASE,
)


class Record(TypedDict):
    """One scan of one subject."""

    id: str  # unique in the cohort; the name of the files in the store
    subject: str  # groups the scans (sessions, runs) of one person
    site: NotRequired[str]  # where the scan was acquired
    images: dict[str, str | None]  # channel name -> path, None where this scan lacks the channel
    label: NotRequired[str]  # path of the label map in a labelled cohort, even if the file does not exist
    problem: NotRequired[str]  # why this scan cannot be used, while the others can


def make_record(
    id: str, subject: str, images: Mapping[str, Path | None], *, site: str = "", label: Path | None = None
) -> Record:
    """A record with absolute paths; without a site, or a label map, it has no such key."""
    paths = {channel: str(path.absolute()) if path else None for channel, path in images.items()}
    record: Record = {"id": id, "subject": subject, "images": paths}
    if site:
        record["site"] = site
    if label is not None:
        record["label"] = str(label.absolute())
    return record


def subject_of(id: str, pattern: str | None = None) -> str:
    """The subject of a scan: group 1 of a regular expression searched in its id.

    Without one it is what an id like sub-XX_ses-YY, NAME_sub-XX_ses-YY or NAME_sub_1_ses_2 begins with, or one as of
    OASIS, ADNI or BraTS, like OAS1_0001_MR1, OAS30001_MR_d0129, 002_S_0295_M06, BraTS-GLI-00005-100; else the id.

    Raises:
        ValueError: no regular expression, or it finds no group 1.
    """
    if pattern is None:
        return found[0] if (found := SUBJECT.match(id)) else id
    try:
        match = re.search(pattern, id)
    except (re.error, TypeError) as error:
        raise ValueError(f"subject={pattern!r}: not a regular expression ({error}); correct it") from None
    if match is None or not match.groups() or not match.group(1):
        raise ValueError(f"{id}: subject={pattern!r} finds no group 1 in this id; correct the expression")
    return str(match.group(1))


def named_records(found: Sequence[Record], subject: str | None, *, source: str) -> list[Record]:
    """`sorted_records` whose subjects are `subject_of` their ids; with None those stay that are not the id."""
    for record in (one for one in found if subject is not None or one["subject"] == one["id"]):
        try:
            record["subject"] = subject_of(record["id"], subject)
        except ValueError as error:
            record["problem"] = str(error)
    return sorted_records(found, source=source)


def in_dataset(records: Iterable[Record], name: str) -> list[Record]:
    """Records whose ids and subjects begin with the name of their dataset, the site of those that have none."""
    named: list[Record] = []
    for record in records:
        id = record["id"]
        named.append({"site": name, **record, "id": f"{name}_{id}", "subject": f"{name}_{record['subject']}"})
        if "problem" in record:
            named[-1]["problem"] = record["problem"].removeprefix(f"{id}: ")
    return named


def sorted_records(records: Iterable[Record], *, source: str) -> list[Record]:
    """Records sorted by id, after `check_records`; what is wrong with single scans becomes their `problem`.

    A ValueError also where every scan has a problem, of which the first is raised.
    """
    named: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: bool(_wrong_id(record))):  # none takes the id of a good one
        problem, id = record.get("problem") or _problem(record, source), record["id"]
        if id in named:
            problem = f"{id}: several scans have this id; change the wildcards or the table"
        if _wrong_id(record):
            id = re.sub(r"[^A-Za-z0-9-]+", "_", id)[:100].strip("_") or "unnamed"
            while id in named:
                id += "_"
        named[id] = {**record, "id": id, "problem": problem} if problem else record
    result = sorted(named.values(), key=lambda record: record["id"])
    check_records([record for record in result if "problem" not in record] or result, source=source)
    if result and all("problem" in record for record in result):
        raise ValueError(result[0]["problem"])
    return result


def _wrong_id(record: Record) -> str:
    try:
        check_id(record["id"])
    except ValueError as error:
        return str(error)
    return ""


def _problem(record: Record, source: str) -> str:
    """Why a scan cannot be used, whatever the others are; "" if it can."""
    if wrong := _wrong_id(record):
        return wrong
    for path in (*record["images"].values(), record.get("label")):
        if path and not is_utf8(path):
            return f"{record['id']}: the file name {path!a} is not in UTF-8, as names in tables are: rename it"
    if record["images"] and not any(record["images"].values()):
        searched = f" (searched for {source})" if source else ""
        return f"{record['id']}: no image of {', '.join(record['images'])}{searched}; add it or remove the scan"
    return ""


def check_records(records: Sequence[Record], *, source: str = "") -> None:
    """Check that records form a cohort; `source`, the files that were searched for, is part of the messages.

    Records with a `problem` need an id and the channels only.

    Raises:
        ValueError: no records, an unusable id, two that are one file on some systems, a scan without any image, or
            records with different channels.
    """
    if not records:
        raise ValueError(f"no scans found{': ' + source if source else ''}; check the folder and the patterns")
    for name, count in Counter(record["id"] for record in records).items():
        check_id(name)
        if count > 1:
            raise ValueError(f"{name}: {count} scans have this id; change the wildcards or the table")
    check_distinct(record["id"] for record in records)
    channels = list(records[0]["images"])
    for name in channels:
        check_channel(name)
    for record in records:
        if not (own := list(record["images"])) or own != channels:
            raise ValueError(
                f"{record['id']}: has the channels {own}, but {records[0]['id']} has {channels}; every scan needs the "
                "same ones in the same order"
            )
        if "problem" not in record and (problem := _problem(record, source)):
            raise ValueError(problem)


def check_distinct(ids: Iterable[str]) -> None:
    """Raise a ValueError for ids that differ in case or in the form of accents alone: one file on some systems."""
    known: dict[str, str] = {}
    for id in ids:
        first = known.setdefault(unicodedata.normalize("NFC", unicodedata.normalize("NFC", id).casefold()), id)
        if first != id:
            raise ValueError(
                f"{first} and {id} ({first!a}, {id!a}) differ in case or in the form of accents alone, and are one "
                "file on some systems: rename one"
            )


def check_channel(name: object) -> None:
    """Raise a ValueError for a name of a channel that cannot stand in names of files, in tables and on pages."""
    if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not name:
        raise ValueError(
            f"the channel {name!r} has line breaks or control characters, outer blanks or nothing: rename it"
        )
    if "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"the channel {name!r} begins with a dot or has a slash, and names files: rename it")


def is_label_map(name: str) -> bool:
    """Whether a file is a label map by its name."""
    ending = next((end for end in VOLUME_ENDINGS if name.endswith(end)), "")
    return LABEL_NAME.search(name.removesuffix(ending)) is not None


def existing_folder(root: str | Path, holds: str) -> Path:
    """The root folder of a reader; a FileNotFoundError says what it `holds` if there is no such folder."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds {holds}")
    return root


def find_file(stem: str | Path, endings: Sequence[str] = NIFTI) -> Path | None:
    """The first file that is called `stem` and one of the endings, also a link without content as of git-annex."""
    paths = (Path(f"{stem}{ending}") for ending in endings)
    return next((path for path in paths if path.is_file() or path.is_symlink()), None)


def label_file(stem: str | Path, endings: Sequence[str] = NIFTI) -> Path:
    """The label map that `find_file` finds, or the path that it would have."""
    return find_file(stem, endings) or Path(f"{stem}{endings[0]}")
