"""One record of a cohort: read, prepared and written to the store, or the reason why it failed."""

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.data.datasets.record import Record
from asa.data.io.files import sha256_of
from asa.data.io.nifti import Volume, identity_of, read_image, read_label
from asa.data.preprocessing.pipeline import prepare_case, stored_indices
from asa.data.preprocessing.quality_control import Thumbnail, case_thumbnail, stored_thumbnail
from asa.data.preprocessing.steps import PrepareSettings
from asa.data.store import RECORDS, Entry, entry_line, has_array, parse_entry, write_array
from asa.errors import reason_of


@dataclass(frozen=True)
class CohortSettings:
    """How a cohort is prepared, the same for all of its scans.

    Args:
        labels: label values in the files -> names, without 0; empty for a cohort without labels.
        ignored: label values whose voxels are excluded from losses and scores.
        regions: name -> label values that it joins, for evaluation, in order.
        settings: the preprocessing of each scan.
        missing: "refuse" a scan that lacks a channel, or fill the channel with "zero" and list it in the entry.
        duplicates: of scans with the same voxels, "refuse" all but the first id, or "keep" all.

    Raises:
        ValueError: labels, ignored and regions that contradict each other, or an unknown choice.
    """

    labels: Mapping[int, str] = field(default_factory=dict)
    ignored: Sequence[int] = ()
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    settings: PrepareSettings = field(default_factory=PrepareSettings)
    missing: str = "refuse"
    duplicates: str = "refuse"

    def __post_init__(self) -> None:
        for value, name in self.labels.items():
            if not isinstance(value, int) or value <= 0 or not name or not str(name).isprintable():
                raise ValueError(
                    f"labels: {value!r}: {name!r} should be a whole number above 0 (the background is 0) and a name of "
                    "printable characters"
                )
        if len(self.labels) > 254 or len(set(self.labels.values())) < len(self.labels):
            raise ValueError("labels: at most 254 values, each with a name of its own")
        for value in self.ignored:
            if not isinstance(value, int) or value in self.labels or value == 0:
                raise ValueError(f"ignored: {value!r} should be a label value that labels does not name")
        for name, values in self.regions.items():
            if not str(name).isprintable():
                raise ValueError(f"regions: {name!r} has line breaks or other control characters: rename it")
            undeclared = [value for value in values if value not in self.labels]
            if undeclared or not values:
                raise ValueError(f"regions: {name} joins {undeclared or 'nothing'}; give values that labels names")
        if self.missing not in ("refuse", "zero"):
            raise ValueError(f"missing={self.missing!r}: choose refuse or zero")
        if self.duplicates not in ("refuse", "keep"):
            raise ValueError(f"duplicates={self.duplicates!r}: choose refuse or keep")
        object.__setattr__(self, "labels", {value: self.labels[value] for value in sorted(self.labels)})
        object.__setattr__(self, "ignored", sorted(self.ignored))
        object.__setattr__(self, "regions", {name: list(values) for name, values in self.regions.items()})


@dataclass(frozen=True)
class ScanJob:
    """One record to prepare in a worker process.

    Args:
        record: the scan.
        root: folder of the store; None writes nothing.
        cohort: how to prepare it.
        previous: its line in the store of an earlier run.
        thumbnail: make one.
    """

    record: Record
    root: Path | None
    cohort: CohortSettings
    previous: bytes | None
    thumbnail: bool


@dataclass
class ScanOutcome:
    """The entry of one record in the store, or the reason of its failure.

    Args:
        line: of the entry.
        killed: the worker process was killed, so that nothing is known about the scan.
        unchanged: the store held the scan already.
        seconds: stage -> duration.
    """

    entry: dict[str, Any] | None = None
    line: bytes = b""
    reason: str = ""
    killed: bool = False
    unchanged: bool = False
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    thumbnail: Thumbnail | None = None


def known_entry(record: Record, root: Path, line: bytes) -> Entry | None:
    """The entry of a scan that the store holds and whose files have the path, size and time that they had; else None.

    None, too, where `prepare_scan` has something to say of it. This reads headers of arrays at most.

    Args:
        record: the scan.
        root: folder of the store.
        line: of the scan in the store.
    """
    try:
        entry = parse_entry(root / RECORDS, record["id"], line)
    except ValueError:
        return None
    paths, known = _paths(record), entry["sources"]
    same = paths.keys() == known.keys() and _subject(record).items() <= entry.items()
    unread = same and all(path is not None and _is_known(_facts(path), known[name]) for name, path in paths.items())
    return entry if unread and _has_arrays(entry, root) else None


def prepare_scan(job: ScanJob) -> ScanOutcome:
    """Prepare one record in a worker process; an exception becomes a reason in one line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the bytes do not depend on the number of cores
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            outcome = _prepare(job)
        except Exception as error:  # one scan must not stop the cohort
            outcome = ScanOutcome(reason=reason_of(error))
        finally:
            torch.set_num_threads(threads)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    outcome.warnings = list(dict.fromkeys(messages + outcome.warnings))
    return outcome


def _prepare(job: ScanJob) -> ScanOutcome:
    record, cohort, root = job.record, job.cohort, job.root
    absent = [channel for channel, path in record["images"].items() if path is None]
    if absent and cohort.missing == "refuse":
        raise ValueError(
            f"has no {', '.join(absent)}; add the file, leave the scan out, or set missing=zero to fill in zeros"
        )
    flags = [f"has no {', '.join(absent)}: filled with zeros"] if absent else []
    previous = None
    if root is not None and job.previous is not None:
        previous = parse_entry(root / RECORDS, record["id"], job.previous)
    sources = _sources(record, previous)
    if root is not None and previous is not None and _is_unchanged(previous, sources, root):
        entry = {**previous, **_subject(record), "sources": sources}
        head = _head(record) if job.thumbnail and cohort.settings.strip != "none" else None
        thumbnail = stored_thumbnail(entry, root, cohort.settings, head) if job.thumbnail else None
        return ScanOutcome(entry, entry_line(entry), unchanged=True, warnings=flags, thumbnail=thumbnail)
    started = time.perf_counter()
    images = {channel: None if path is None else read_image(path) for channel, path in record["images"].items()}
    label = read_label(record["label"]) if "label" in record else None
    if label is not None:  # checked here, where the message can name the file
        stored_indices(label.data, cohort.labels, cohort.ignored, record["label"])
    identity = {channel: identity_of(volume) for channel, volume in images.items() if volume is not None}
    seconds = {"read": time.perf_counter() - started}
    case = prepare_case(images, label, cohort.labels, cohort.settings, ignored=cohort.ignored, name=record["id"])
    seconds |= case.seconds
    arrays, counts = {}, {}
    if case.label is not None:
        voxels = np.bincount(case.label.ravel(), minlength=256)[1 : len(cohort.labels) + 1]
        counts = {"label_voxels": {name: int(n) for name, n in zip(cohort.labels.values(), voxels, strict=True)}}
    if root is not None:
        started = time.perf_counter()
        arrays["image"] = write_array(root, record["id"], "image", case.image)
        if case.label is not None:
            arrays["label"] = write_array(root, record["id"], "label", case.label)
        seconds["write"] = time.perf_counter() - started
    entry = {
        **_subject(record),
        "sources": sources,
        "identity": identity,
        **({"missing": absent} if absent else {}),
        "shape": list(case.image.shape),
        "chain": case.chain,
        "quality": case.quality,
        "intensity": {channel: intensity_statistics(part) for channel, part in zip(images, case.image, strict=True)},
        **counts,
        "arrays": arrays,
    }
    head = _head(record) if job.thumbnail and cohort.settings.strip != "none" else None
    thumbnail = case_thumbnail(case, head) if job.thumbnail else None
    return ScanOutcome(entry, entry_line(entry), warnings=flags, seconds=seconds, thumbnail=thumbnail)


def _head(record: Record) -> Volume:
    """The reference channel of a scan as it was read, the first one that it has."""
    return read_image(next(path for path in record["images"].values() if path is not None))


def _sources(record: Record, previous: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The source files; one with the path, size and modification time of the previous entry is not read again."""
    known = previous["sources"] if previous else {}
    return {name: _source(path, known.get(name, {})) for name, path in _paths(record).items() if path is not None}


def _paths(record: Record) -> dict[str, str | None]:
    return {**record["images"]} | ({"label": record["label"]} if "label" in record else {})


def _source(path: str | Path, known: dict[str, Any]) -> dict[str, Any]:
    source = _facts(path)  # before its bytes are read, so that a later change has another time
    return {**source, "sha256": known["sha256"] if _is_known(source, known) else sha256_of(path)}


def _facts(path: str | Path) -> dict[str, Any]:
    """Path, size and modification time of a source file; the path alone where there is none."""
    source: dict[str, Any] = {"path": os.path.abspath(path)}
    try:
        found = os.stat(path)
    except OSError:
        return source
    return {**source, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _is_known(source: dict[str, Any], known: dict[str, Any]) -> bool:
    return "size" in source and source.items() <= known.items()


def _subject(record: Record) -> dict[str, str]:
    site = {"site": record["site"]} if "site" in record else {}
    return {"id": record["id"], "subject": record["subject"], **site}


def _is_unchanged(entry: dict[str, Any], sources: dict[str, dict[str, Any]], root: Path) -> bool:
    """Whether the source files have the same bytes (their paths may differ) and the arrays exist."""
    digests = [{name: source["sha256"] for name, source in group.items()} for group in (entry["sources"], sources)]
    return digests[0] == digests[1] and _has_arrays(entry, root)


def _has_arrays(entry: dict[str, Any], root: Path) -> bool:
    return all(has_array(root, entry, kind) for kind in entry["arrays"])


def intensity_statistics(channel: np.ndarray) -> dict[str, float]:
    """Statistics of the stored values other than 0, to six digits; empty for a channel that the scan lacks."""
    values = channel[channel != 0].astype(np.float64)
    if not len(values):
        return {}
    numbers = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
    return {name: float(f"{number:.6g}") for name, number in numbers.items()}
