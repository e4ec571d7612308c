"""Raw scans to the store, and predictions back to the scan's own grid. The stages between are in `stages.py`."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.data.cohort import Record, check_records
from asa.data.files import PART, sha256_of
from asa.data.stages import STAGES, Case, PrepareSettings
from asa.data.store import (
    DTYPES,
    FOLDERS,
    FORMAT,
    MANIFEST,
    array_path,
    open_array,
    read_manifest,
    write_array,
    write_manifest,
)
from asa.data.volume import Volume, check_same_geometry, read_image, read_label

SAVE_EVERY = 10.0  # seconds between two writings of the manifest


@dataclass(frozen=True)
class PreparedCase:
    """One scan as it goes into the store or into a network.

    Args:
        image: (C, D, H, W) float32.
        label: (1, D, H, W) uint8, consecutive indices (0 is background), or None.
        chain: JSON-able; everything `to_native` needs, and the affine of this grid.
    """

    image: np.ndarray
    label: np.ndarray | None
    chain: dict[str, Any]


@dataclass
class Report:
    """What became of a cohort: ids prepared now, ids already done, reasons of failure and warnings by id."""

    prepared: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- one case


def prepare_case(
    images: dict[str, Volume],
    label: Volume | None,
    labels: dict[int, str],
    settings: PrepareSettings,
    *,
    name: str = "case",
) -> PreparedCase:
    """Bring one scan through all stages, in memory; `asa-prepare` and `asa-predict` both come through here.

    Args:
        images: channel name -> volume, all on one grid.
        label: label map on the same grid, or None.
        labels: declared values -> names; 0 is the background and is not declared.
        settings: as for the cohort.
        name: names the case in messages.

    Returns:
        Arrays on the prepared grid, and the chain of steps that leads back.

    Raises:
        ValueError: channels or label on different grids, a label value that is not declared, an empty image.
    """
    first, *others = images
    for channel in others:
        check_same_geometry(images[first], images[channel], f"{first} and {channel} of {name}")
    indices = None
    if label is not None:
        check_same_geometry(images[first], label, f"{first} and label of {name}")
        indices = _consecutive(label.data, labels, name)
    reference = images[first]
    stacked = np.stack([volume.data for volume in images.values()]).astype(np.float32)
    case = Case(stacked, np.zeros(0, bool), indices, reference.affine)
    chain: dict[str, Any] = {
        "shape": list(reference.data.shape),
        "affine": reference.affine.tolist(),
        "steps": [],
    }
    for stage in STAGES:
        try:
            parameters = stage.apply(case, settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if parameters is not None:
            chain["steps"].append({"stage": stage.name, **parameters})
    chain["stored_affine"] = case.affine.tolist()
    stored_label = None if case.label is None else np.ascontiguousarray(case.label[None])
    return PreparedCase(np.ascontiguousarray(case.image), stored_label, chain)


def to_native(array: np.ndarray, chain: dict[str, Any], *, order: int) -> np.ndarray:
    """Bring a result on the prepared grid back to the scan's own grid.

    Args:
        array: (C, D, H, W), float (probabilities; take the argmax afterwards) or integer (labels).
        chain: of the prepared case.
        order: 0 nearest neighbour, 1 trilinear, for floats of a scan that was resampled. Integers take 0;
            there each label's mask is brought back linearly and the largest wins, which keeps borders smooth.

    Returns:
        (C, x, y, z) in the axes of the scan's file; 0 outside the crop.

    Raises:
        ValueError: the array does not fit the chain, or integers with order 1.
    """
    if order not in (0, 1) or (order == 1 and array.dtype.kind != "f"):
        raise ValueError(f"to_native: order {order} for {array.dtype}: give 0 for labels, 0 or 1 for floats")
    expected = _prepared_shape(chain)
    if array.ndim != 4 or array.shape[1:] != expected:
        raise ValueError(f"to_native: array of shape {array.shape} is not (C, D, H, W) with D, H, W = {expected}")
    if array.dtype == np.float16:
        array = array.astype(np.float32)  # scipy does not interpolate halves
    undo = {stage.name: stage.undo for stage in STAGES}
    for step in reversed(chain["steps"]):
        back = undo[step["stage"]]
        array = array if back is None else back(array, step, order)
    return np.ascontiguousarray(array)


def _prepared_shape(chain: dict[str, Any]) -> tuple[int, ...]:
    """(D, H, W) of the prepared grid, from the last step that changed it."""
    for step in reversed(chain["steps"]):
        if step["stage"] == "crop":
            return tuple(step["size"])
        if step["stage"] == "resample":
            return tuple(step["shape"])
        if step["stage"] == "orient":
            size = [0, 0, 0]
            for total, (axis, _) in zip(chain["shape"], step["axes"], strict=True):
                size[axis] = total
            return tuple(size[::-1])
    raise AssertionError("a chain begins with orient")


def _consecutive(label: np.ndarray, labels: dict[int, str], name: str) -> np.ndarray:
    """Label values (0 and the declared ones) -> uint8 indices 0, 1, 2, ... in the order of the values."""
    values = np.array([0, *sorted(labels)])
    found, counts = np.unique(label, return_counts=True)
    for value, count in zip(found, counts, strict=True):
        if value not in values:
            declared = ", ".join(f"{key} {labels[key]}" for key in sorted(labels)) or "none"
            raise ValueError(
                f"{name}: label value {value} ({count} voxels) is not declared (declared: {declared}); "
                "declare it in labels, or prepare without the label"
            )
    return np.searchsorted(values, label).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- a cohort


@dataclass
class _Outcome:
    """What came of one record: its manifest entry, or the reason of its failure."""

    entry: dict[str, Any] | None = None
    reason: str = ""
    done_before: bool = False
    warnings: list[str] = field(default_factory=list)


def prepare_cohort(
    records: Sequence[Record],
    out: str | Path,
    *,
    labels: dict[int, str],
    settings: PrepareSettings | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Report:
    """Prepare a cohort into a store; a run that was interrupted goes on where it stopped.

    A scan is done when the store holds it and its source files still have the SHA-256 that they had. A scan
    that fails is reported and does not touch the others. The bytes of the store do not depend on
    interruptions or on `workers`.

    Args:
        records: what a reader returned.
        out: folder of the store, new or made with the same settings.
        labels: label values in the files -> names, without 0; empty for a cohort without labels.
        settings: how to prepare; the defaults of `PrepareSettings` when None.
        workers: processes; 1 works in this one.
        progress: show a bar.

    Returns:
        The report: prepared and skipped ids, failures with their reasons, warnings.

    Raises:
        ValueError: an unfit cohort, or `out` is a store made in another way.
    """
    settings = settings or PrepareSettings()
    check_records(records)
    labels = _checked_labels(labels)
    if workers < 1:
        raise ValueError(f"workers={workers}: give 1 or more processes")
    root = Path(out).absolute()
    manifest = _open(root, _head(records, labels, settings))
    entries = {entry["id"]: entry for entry in manifest["records"]}
    jobs = [(record, root, labels, settings, entries.get(record["id"])) for record in records]
    report, saved = Report(), time.monotonic()
    try:
        with tqdm(total=len(jobs), desc="prepare", unit="scan", disable=not progress) as bar:
            for id, outcome in _outcomes(jobs, workers):
                _settle(id, outcome, root, entries, report)
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    write_manifest(root, {**manifest, "records": list(entries.values())})
                    saved = time.monotonic()
    finally:
        write_manifest(root, {**manifest, "records": list(entries.values())})
    for ids in (report.prepared, report.skipped):
        ids.sort()
    report.failures = dict(sorted(report.failures.items()))
    report.warnings = dict(sorted(report.warnings.items()))
    return report


def _checked_labels(labels: dict[int, str]) -> dict[int, str]:
    for value, name in labels.items():
        if not isinstance(value, int) or value <= 0 or not name:
            raise ValueError(
                f"labels: {value!r}: {name!r} should be a whole number above 0 (the background is 0) and a name"
            )
    if len(labels) > 255 or len(set(labels.values())) < len(labels):
        raise ValueError("labels: at most 255 values, each with a name of its own")
    return {value: labels[value] for value in sorted(labels)}


def _head(records: Sequence[Record], labels: dict[int, str], settings: PrepareSettings) -> dict[str, Any]:
    """The manifest without its records: what every scan of a store has in common."""
    from asa import __version__

    packages = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "nibabel")}
    return {
        "format": FORMAT,
        "asa": __version__,
        "software": packages,
        "settings": asdict(settings),
        "channels": list(records[0]["images"]),
        "labels": {str(value): name for value, name in labels.items()},
        "records": [],
    }


def _open(root: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Begin a store, or go on with one that was made in the same way."""
    if not (root / MANIFEST).is_file():
        write_manifest(root, head)
        return head
    there = read_manifest(root)
    for key in ("settings", "channels", "labels"):
        if there[key] != head[key]:
            raise ValueError(
                f"{root}: this store was made with {key} {there[key]}, now asked for {head[key]}; "
                "use the same, or another out="
            )
    for folder in FOLDERS.values():
        for left_over in (root / folder).glob(f".*{PART}"):
            left_over.unlink()
    return {**head, "records": there["records"]}


def _outcomes(jobs: list[tuple[Any, ...]], workers: int) -> Iterator[tuple[str, _Outcome]]:
    if workers == 1:
        for job in jobs:
            yield job[0]["id"], _attempt(*job)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_attempt, *job): job[0]["id"] for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenExecutor:
                    reason = "a worker process was killed, out of memory perhaps; run again with fewer workers"
                    yield futures[future], _Outcome(reason=reason)
        finally:
            pool.shutdown(cancel_futures=True)


def _settle(id: str, outcome: _Outcome, root: Path, entries: dict[str, dict[str, Any]], report: Report) -> None:
    """Enter one outcome into the manifest's entries and the report."""
    if outcome.warnings:
        report.warnings[id] = outcome.warnings
    if outcome.entry is not None:
        entries[id] = outcome.entry
        (report.skipped if outcome.done_before else report.prepared).append(id)
        return
    report.failures[id] = outcome.reason
    if entries.pop(id, None) is not None:  # its source changed and is bad now: what the store held is out of date
        for kind in FOLDERS:
            array_path(root, id, kind).unlink(missing_ok=True)


def _attempt(
    record: Record,
    root: Path,
    labels: dict[int, str],
    settings: PrepareSettings,
    before: dict[str, Any] | None,
) -> _Outcome:
    """Prepare one record; runs in a worker process, so a failure becomes a reason in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            sources = _sources(record)
            if before is not None and _is_done(before, sources, root):
                return _Outcome({**before, **_person(record), "sources": sources}, done_before=True)
            outcome = _Outcome(_prepare_record(record, sources, root, labels, settings))
        except Exception as error:  # one scan must not stop the cohort
            kind = "" if isinstance(error, (ValueError, FileNotFoundError)) else f"{type(error).__name__}: "
            return _Outcome(reason=kind + " ".join(str(error).split()))
    outcome.warnings = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return outcome


def _sources(record: Record) -> dict[str, dict[str, str]]:
    paths = {**record["images"]} | ({"label": record["label"]} if "label" in record else {})
    return {name: {"path": str(Path(path).absolute()), "sha256": sha256_of(path)} for name, path in paths.items()}


def _person(record: Record) -> dict[str, str]:
    site = {"site": record["site"]} if "site" in record else {}
    return {"id": record["id"], "subject": record["subject"], **site}


def _is_done(entry: dict[str, Any], sources: dict[str, dict[str, str]], root: Path) -> bool:
    """Same source bytes (they may have moved), and the arrays are there."""
    digests = [{name: source["sha256"] for name, source in group.items()} for group in (entry["sources"], sources)]
    channels, *size = entry["shape"]
    return digests[0] == digests[1] and all(
        open_array(array_path(root, entry["id"], kind), (channels if kind == "image" else 1, *size), DTYPES[kind])
        is not None
        for kind in entry["arrays"]
    )


def _prepare_record(
    record: Record,
    sources: dict[str, dict[str, str]],
    root: Path,
    labels: dict[int, str],
    settings: PrepareSettings,
) -> dict[str, Any]:
    images = {channel: read_image(path) for channel, path in record["images"].items()}
    label = read_label(record["label"]) if "label" in record else None
    if label is not None:  # here the message can name the file
        _consecutive(label.data, labels, record["label"])
    case = prepare_case(images, label, labels, settings, name=record["id"])
    arrays = {"image": write_array(root, record["id"], "image", case.image)}
    counts = {}
    if case.label is not None:
        arrays["label"] = write_array(root, record["id"], "label", case.label)
        voxels = np.bincount(case.label.ravel(), minlength=len(labels) + 1)
        counts = {"label_voxels": {name: int(n) for name, n in zip(labels.values(), voxels[1:], strict=True)}}
    return {
        **_person(record),
        "sources": sources,
        "shape": list(case.image.shape),
        "chain": case.chain,
        "intensity": {channel: _statistics(part) for channel, part in zip(images, case.image, strict=True)},
        **counts,
        "arrays": arrays,
    }


def _statistics(channel: np.ndarray) -> dict[str, float]:
    """Of the stored values other than 0, to six digits."""
    values = channel[channel != 0].astype(np.float64)
    numbers = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
    return {name: float(f"{number:.6g}") for name, number in numbers.items()}
