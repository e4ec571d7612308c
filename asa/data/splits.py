"""Splits of a cohort into train, validation and test by subject, and leakage: held-out subjects in a pretraining.

All scans of a subject are in one part. A checkpoint carries digests of its training scans and subjects, without any
name. A scan is identified by the digests of its voxels in the store (see `asa.data.io.nifti.identity_of`): it is found
under another id and in another store, but not after resampling. A subject is identified by a digest of its name. That
keeps names out of shared weights, but names can be guessed and confirmed.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from asa.data.io.files import check_digest, read_json, write_json
from asa.data.store import Records
from asa.errors import listed

PARTS = ("train", "validation", "test")
DIGESTED = ("scans", "subjects")

AnyRecord = TypeVar("AnyRecord", bound=Mapping[str, Any])
TrainingDigests = dict[str, list[str]]


def make_split(
    records: Sequence[Mapping[str, Any]],
    *,
    validation: int | float = 0,
    test: int | float = 0,
    ratio: Sequence[float] | None = None,
    folds: int | None = None,
    fold: int | None = None,
    site: str | None = None,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Split subjects, not scans, in one of four ways: by size, by ratio, into folds, or by site.

    Subjects are ordered by a hash of (seed, subject). So the split does not depend on the order of the records, a
    subject that is added later does not change the order of the others, and the first n training subjects are nested
    subsets for experiments with few labels.

    Args:
        validation, test: an int is a number of subjects, a float in [0, 1) a fraction of them (at least one subject if
            above 0). `ratio` replaces both; `folds` and `site` replace `test`, and a fraction for validation is then
            one of the subjects that are not tested.
        ratio: weights of train, validation and test, like (7, 1, 2), rounded by largest remainders.
        folds, fold: number of folds, and which of them (from 0) to test on. Folds are disjoint, cover the cohort, and
            differ in size by at most one subject.
        site: test on the subjects of this site.

    Returns:
        Lists of subjects under "train", "validation" and "test".

    Raises:
        ValueError: options that contradict each other, or that are impossible with this cohort.
    """
    chosen = [name for name, value in (("ratio", ratio), ("folds", folds), ("site", site)) if value is not None]
    if len(chosen) > 1:
        raise ValueError(f"split: {' and '.join(chosen)} contradict each other; give one of them")
    if (folds is None) != (fold is None):
        raise ValueError(f"split: folds={folds} and fold={fold} go together: give both, as folds=5 fold=0, or neither")
    order = _order(subjects_of(records), seed)
    if ratio is not None:
        _, validation, test = _sizes(ratio, len(order))
        return _parts(order, validation, order[:test])
    if folds is not None and fold is not None:
        return _parts(order, validation, _fold(order, folds, fold))
    if site is not None:
        return _parts(order, validation, _from_site(records, order, str(site)))
    count = _count(validation, len(order), "validation")  # a fraction of all subjects
    return _parts(order, count, order[: _count(test, len(order), "test")])


def make_joint_split(groups: Iterable[Sequence[Mapping[str, Any]]], **options: Any) -> dict[str, list[str]]:
    """One split of cohorts, each divided by `make_split`; a subject is in the last of its parts, in their order."""
    part_of: dict[str, str] = {}
    for records in groups:
        for name, subjects in make_split(records, **options).items():
            part_of |= {one: max(name, part_of.get(one, name), key=PARTS.index) for one in subjects}
    order = _order(part_of, options.get("seed", 0))
    return {name: [subject for subject in order if part_of[subject] == name] for name in PARTS}


def subjects_of(records: Iterable[Mapping[str, Any]]) -> Sequence[str]:
    """The subject of each record; those of a store are known without reading its entries."""
    return records.subjects if isinstance(records, Records) else [str(record["subject"]) for record in records]


def _order(subjects: Iterable[str], seed: int) -> list[str]:
    return sorted(set(subjects), key=lambda subject: (hashlib.sha256(f"{seed}/{subject}".encode()).digest(), subject))


def _parts(order: Sequence[str], validation: int | float, tested: Iterable[str]) -> dict[str, list[str]]:
    """Test on the given subjects, validate on the first of the others, train on the rest."""
    held_out = set(tested)
    rest = [subject for subject in order if subject not in held_out]
    count = _count(validation, len(rest), "validation")
    if count >= len(rest):
        raise ValueError(
            f"split: {len(order)} subjects cannot give {count} for validation and {len(held_out)} for test "
            "and leave one for training; ask for fewer"
        )
    return {"train": rest[count:], "validation": rest[:count], "test": [one for one in order if one in held_out]}


def _count(size: int | float, total: int, part: str) -> int:
    if isinstance(size, int) and size >= 0:
        return size
    if not isinstance(size, float) or not 0 <= size < 1:
        raise ValueError(f"split: {part}={size} must be a count of subjects (an int) or a fraction from 0 to below 1")
    return max(1, round(size * total)) if size > 0 else 0


def _sizes(ratio: Sequence[float], total: int) -> list[int]:
    """Sizes in proportion to the weights, rounded by largest remainders."""
    weights = list(ratio) if isinstance(ratio, Sequence) and not isinstance(ratio, str) else []
    numbers = [weight for weight in weights if isinstance(weight, (int, float)) and math.isfinite(weight)]
    if len(weights) != 3 or len(numbers) != 3 or min(numbers) < 0 or numbers[0] == 0:
        raise ValueError(f"split: ratio={ratio} must be three weights, train above 0, like [7, 1, 2]")
    exact = [total * weight / sum(weights) for weight in weights]
    sizes = [math.floor(size) for size in exact]
    remainders = sorted(range(3), key=lambda part: sizes[part] - exact[part])  # stable: the earlier part wins ties
    for part in remainders[: total - sum(sizes)]:
        sizes[part] += 1
    for name, weight, size in zip(PARTS, weights, sizes, strict=True):
        if weight > 0 and size == 0:
            raise ValueError(f"split: ratio={ratio} leaves {name} without any of {total} subjects; give sizes instead")
    return sizes


def _fold(order: Sequence[str], folds: int, fold: int) -> Sequence[str]:
    if not isinstance(folds, int) or not 2 <= folds <= len(order):
        raise ValueError(f"split: folds={folds} must be from 2 to the number of subjects, {len(order)}")
    if not isinstance(fold, int) or not 0 <= fold < folds:
        raise ValueError(f"split: fold={fold} must be from 0 to {folds - 1}: folds={folds} are counted from 0")
    return order[fold::folds]


def _from_site(records: Iterable[Mapping[str, Any]], order: Sequence[str], site: str) -> list[str]:
    sites: dict[str, str] = {}
    for record in records:
        subject = str(record["subject"])
        if not (own := str(record.get("site") or "")):
            raise ValueError(
                f"split: site={site} needs the site of every scan, and {record['id']} has none; split in another way, "
                "or prepare the cohort with sites (data=wmh, participants.tsv, a table's column site)"
            )
        if sites.setdefault(subject, own) != own:
            raise ValueError(
                f"split: subject {subject} was scanned at {sites[subject]} and at {own}, so neither site can be left "
                "out alone; split in another way, or leave out its scans of one site"
            )
    if site not in sites.values():
        raise ValueError(f"split: no site {site}; the sites are {', '.join(sorted(set(sites.values())))}")
    return [subject for subject in order if sites[subject] == site]


def keep_labelled(split: Mapping[str, Sequence[str]], labelled: int | float) -> dict[str, list[str]]:
    """The split with the first subjects of its training part only; subsets of different sizes are nested.

    `labelled`: an int is a number of subjects, a float in (0, 1] a fraction of the training part (at least one). A
    ValueError for none, or more than there are.
    """
    total = len(split["train"])
    if isinstance(labelled, float) and 0 < labelled <= 1:
        count = max(1, round(labelled * total))
    elif isinstance(labelled, int) and 1 <= labelled <= total:
        count = labelled
    else:
        raise ValueError(
            f"data.labelled={labelled}, but the split has {total} training subjects: give a count from 1 to {total}, "
            "or a fraction above 0 and up to 1.0"
        )
    return {name: list(subjects)[: count if name == "train" else None] for name, subjects in split.items()}


def write_split(path: str | Path, split: Mapping[str, Sequence[str]]) -> None:
    """Write a split as JSON, beside the run that used it; a ValueError as of `read_split`."""
    write_json(path, _checked_split(split, Path(path)))


def read_split(
    path: str | Path, fold: int | None = None, records: Iterable[Mapping[str, Any]] = ()
) -> dict[str, list[str]]:
    """Read a split of subjects, or one of the folds of nnU-Net's splits_final.json, whose "val" is tested here.

    Args:
        path: JSON file; a part that it leaves out is empty.
        fold: number of the fold, from 0, of a file with several.
        records: scans whose ids are the cases of a fold, which has their subjects then.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: changed since a run wrote it, not JSON, not a split, a fold that it does not have, or a subject in
            two parts, as a fold of nnU-Net may have by two of its cases.
    """
    split = read_json(path)
    check_digest(path)
    if isinstance(split, list) and split and isinstance(split[0], Mapping):
        if fold is None or not 0 <= fold < len(split):
            raise ValueError(f"{path}: has {len(split)} folds: give data.split.fold=0 to {len(split) - 1}")
        split = split[fold]
        if not isinstance(split, Mapping) or set(split) != {"train", "val"}:
            raise ValueError(f"{path}: a fold of nnU-Net has lists of cases under train and val")
        cases = _checked_split({"train": split["train"], "test": split["val"]}, Path(path))
        subjects = {str(record["id"]): str(record["subject"]) for record in records}
        split = {name: list(dict.fromkeys(subjects.get(case, case) for case in part)) for name, part in cases.items()}
        if shared := set(split["train"]) & set(split["test"]):
            raise ValueError(
                f"{path}: fold {fold} has cases of subject {min(shared)} in train and in val: prepare the scans with "
                "data.subject='(.*)' (of data=nnunet or folder), which makes each case a subject, or split by subject"
            )
    return _checked_split(split, Path(path))


def _checked_split(split: Any, path: Path) -> dict[str, list[str]]:
    if not isinstance(split, Mapping) or not all(isinstance(part, (list, tuple)) for part in split.values()):
        raise ValueError(f"{path}: a split is JSON with lists of subjects under train, validation and test")
    if unknown := [name for name in split if name not in PARTS]:
        raise ValueError(f"{path}: unknown part {unknown[0]!r}; a split has train, validation and test")
    part_of: dict[str, str] = {}
    for name in PARTS:
        for subject in split.get(name, ()):
            if not isinstance(subject, str | int):
                raise ValueError(f"{path}: {name} lists {subject!r}, which is no name of a subject")
            if (text := str(subject)) in part_of:
                where = f"in {part_of[text]} and in {name}" if part_of[text] != name else f"twice in {name}"
                raise ValueError(f"{path}: subject {text} is {where}; list it once")
            part_of[text] = name
    return {name: [subject for subject in part_of if part_of[subject] == name] for name in PARTS}


def select(records: Sequence[AnyRecord], subjects: Iterable[str]) -> Sequence[AnyRecord]:
    """Records of the given subjects, in their order; those of a store are not read. A ValueError if one has none."""
    scans, subjects = dict[str, list[int]](), list(subjects)
    for k, subject in enumerate(subjects_of(records)):
        scans.setdefault(subject, []).append(k)
    if missing := [str(subject) for subject in subjects if subject not in scans]:
        shown = f"{len(missing)} of its subjects are not in the cohort ({listed(missing, 3)})"
        raise ValueError(f"split: {shown}; prepare them or correct the split")
    chosen = [k for subject in subjects for k in scans[subject]]
    taken: Any = records.take(chosen) if isinstance(records, Records) else [records[k] for k in chosen]
    return taken


@dataclass(frozen=True)
class LeakedSubject:
    """A held-out subject of the part `part` that the network was trained on, found by its "scan" or its "name"."""

    part: str
    subject: str
    match: str


def training_digests(
    records: Iterable[Mapping[str, Any]], previous: Mapping[str, Sequence[str]] | None = None
) -> TrainingDigests:
    """Digests of the training data, for a checkpoint, with those of the checkpoint that training started from.

    Returns:
        "scans": digests of the voxels, one per channel of a scan; "subjects": digests of the subjects' names; sorted.
    """
    scans, subjects = (set(previous[key]) if previous else set() for key in DIGESTED)
    for record in records:
        scans.update(record["identity"].values())
        subjects.add(_name_digest(record["subject"]))
    return {"scans": sorted(scans), "subjects": sorted(subjects)}


def stored_digests(data: Mapping[str, Any]) -> TrainingDigests | None:
    """The digests in the data description of a checkpoint; None where an older checkpoint has none."""
    return {key: data[key] for key in DIGESTED} if all(key in data for key in DIGESTED) else None


def find_leaks(
    records: Iterable[Mapping[str, Any]], split: Mapping[str, Sequence[str]], digests: Mapping[str, Sequence[str]]
) -> list[LeakedSubject]:
    """Subjects of the validation and test parts of a split that a network was trained on, in its order.

    All scans of a subject are checked, used or not. A subject that matches by name only may be another person.
    """
    scans, names = (set(digests[key]) for key in DIGESTED)
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
