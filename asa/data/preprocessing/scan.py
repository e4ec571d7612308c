"""One record of a cohort: read, prepared and written to the store, or the reason why it failed; its quality control."""

import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from asa.data.datasets.record import Record
from asa.data.io.files import sha256_of
from asa.data.io.nifti import axis_codes, identity_of, read_image, read_label, spacing_of
from asa.data.preprocessing.midsagittal import plane_of
from asa.data.preprocessing.pipeline import Case, prepare_case, stored_indices, to_prepared
from asa.data.preprocessing.resampling import bounding_box
from asa.data.preprocessing.settings import CohortSettings
from asa.data.store import RECORDS, Entry, entry_line, has_array, open_array, parse_entry, write_array
from asa.errors import reason_of


class ScanJob(NamedTuple):
    """One record to prepare in a worker process."""

    record: Record
    previous: bytes | None  # its line in the store of an earlier run


@dataclass(frozen=True)
class Thumbnail:
    """Three slices of the first channel of a prepared scan, in RAS+ axes on the prepared grid."""

    grey: tuple[np.ndarray, ...]  # axial (H, W), coronal (D, W) and sagittal (D, H) slice, uint8
    brain: tuple[np.ndarray, ...]  # the foreground or the brain mask, bool; after a strip, `grey` shows the head around
    spacing: tuple[float, float, float]  # along D, H, W in mm
    # The mid-sagittal plane in voxels: (w at h = 0, w at h = H - 1) on the axial slice, (w at d = 0, w at d = D - 1) on
    # the coronal one.
    midline: tuple[tuple[float, float], tuple[float, float]] | None


@dataclass(frozen=True)
class ScanQuality:
    """Quality control of one scan.

    Facts are flat and JSON-able, like `shape` "256x256x180" or `yaw_degrees` -1.25. The ending of a key is its unit
    (`_degrees`, `_mm`, `_ml`), and `seconds_STAGE` is the duration of a stage. Keys may differ between scans.
    """

    id: str
    subject: str
    site: str  # "" if unknown
    reason: str  # why the scan failed, "" if it did not
    warnings: list[str]
    facts: dict[str, Any]
    thumbnail: Thumbnail | None  # None where the scan could not be read


@dataclass
class ScanOutcome:
    """The entry of one record in the store, or the reason of its failure."""

    entry: dict[str, Any] | None = None
    line: bytes = b""  # of the entry
    reason: str = ""
    # What the store holds under the id stays, although the scan failed: its worker was killed, or that is another scan.
    keep: bool = False
    unchanged: bool = False  # the store held the scan already
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> duration
    thumbnail: Thumbnail | None = None


def known_entry(record: Record, root: Path, line: bytes) -> Entry | None:
    """The entry of a scan that the store holds and whose files have the path, size and time that they had; else None.

    None, too, where `prepare_scan` has something to say of it. This reads headers of arrays at most.
    """
    try:
        entry = parse_entry(root / RECORDS, record["id"], line)
    except ValueError:
        return None
    if "problem" in record or _absent(record) or _subject(record) != _subject(entry):
        return None
    files, known = _files(record), entry["sources"]
    same = files.keys() == known.keys() and all(_is_known(file, known[name]) for name, file in files.items())
    return entry if same and _has_arrays(entry, root) else None


def prepare_scan(
    job: ScanJob, root: Path | None, cohort: CohortSettings, *, software: Mapping[str, str | None], thumbnail: bool
) -> ScanOutcome:
    """Prepare one record in a worker process; an exception becomes a reason in one line.

    Without a root, the folder of the store, nothing is written. `software` has the versions that are others than in the
    manifest, for the entry.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the bytes do not depend on the number of cores
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            outcome = _prepare(job, root, cohort, software, thumbnail)
        except Exception as error:  # one scan must not stop the cohort
            # What cannot be read now, as on a disk that is not there, was not found to be wrong.
            keep = isinstance(error, OSError) or "problem" in job.record or _holds_another(job, root)
            outcome = ScanOutcome(reason=reason_of(error).removeprefix(f"{job.record['id']}: "), keep=keep)
        finally:
            torch.set_num_threads(threads)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    outcome.warnings = list(dict.fromkeys(messages + outcome.warnings))
    return outcome


def _prepare(
    job: ScanJob, root: Path | None, cohort: CohortSettings, software: Mapping[str, str | None], thumbnail: bool
) -> ScanOutcome:
    record, previous, case = job.record, None, None
    if "problem" in record:
        raise ValueError(record["problem"])
    absent = ", ".join(_absent(record))
    if absent and cohort.missing == "refuse":
        advice = "add the file, leave the scan out, or set missing=zero to fill in zeros"
        raise FileNotFoundError(f"has no {absent}; {advice}")
    if root is not None and job.previous is not None:
        previous = parse_entry(root / RECORDS, record["id"], job.previous)
    known = previous["sources"] if previous else {}
    sources = _sources(record, known)
    images = {file["sha256"] for file in _images(known)}  # a copy of a dataset has the same under other paths
    if previous and images.isdisjoint(file["sha256"] for file in _images(sources)) and _holds_another(job, root):
        raise ValueError(
            f"the store holds another scan of this id, of {_images(known)[0]['path']}: give dataset=NAME "
            "for the second of two datasets, or another out="
        )
    before, now = ({name: file["sha256"] for name, file in files.items()} for files in (known, sources))
    if root is not None and previous is not None and before == now and _has_arrays(previous, root):
        lasting = {key: value for key, value in previous.items() if key != "site"}
        entry: Entry = {**lasting, **_subject(record), "sources": sources}
        outcome = ScanOutcome(entry, unchanged=True)
    else:
        entry, case = _prepare_anew(record, sources, root, cohort)
        entry |= {"software": dict(software)} if software else {}
        outcome = ScanOutcome(entry, seconds=case.seconds)
    outcome.line = entry_line(entry)
    if absent:
        outcome.warnings.append(f"has no {absent}: filled with zeros")
    if previous is not None and "label" in previous["arrays"] and "label" not in record:
        outcome.warnings.append("loses the label map that the store had: give its label again to get it back")
    if thumbnail:
        image, brain = (case.image[case.first], case.brain) if case else _stored_views(entry, root)
        if cohort.settings.strip != "none":  # the brain is shown in its head
            path = next(path for path in record["images"].values() if path is not None)
            image = to_prepared(read_image(path, nan=cohort.settings.nan), entry["chain"])
        outcome.thumbnail = make_thumbnail(image, brain, entry["chain"])
    return outcome


def _prepare_anew(
    record: Record, sources: dict[str, dict[str, Any]], root: Path | None, cohort: CohortSettings
) -> tuple[Entry, Case]:
    """The entry of a scan whose arrays are written, and the prepared scan."""
    started = time.perf_counter()
    nan = cohort.settings.nan
    images = {name: None if path is None else read_image(path, nan=nan) for name, path in record["images"].items()}
    label = read_label(record["label"]) if "label" in record else None
    if label is not None:  # checked here, where the message can name the file
        stored_indices(label.data, cohort.labels, cohort.ignored, record["label"])
    identity = {channel: identity_of(volume) for channel, volume in images.items() if volume is not None}
    seconds = {"read": time.perf_counter() - started}
    case = prepare_case(images, label, cohort.labels, cohort.settings, ignored=cohort.ignored, name=record["id"])
    case.seconds = seconds | case.seconds
    arrays, counts, absent = {}, {}, _absent(record)
    if case.label is not None:
        voxels = np.bincount(case.label.ravel(), minlength=256)[1 : len(cohort.labels) + 1]
        counts = {"label_voxels": {name: int(n) for name, n in zip(cohort.labels.values(), voxels, strict=True)}}
    if root is not None:
        started = time.perf_counter()
        for kind, array in (("image", case.image), ("label", case.label)):
            if array is not None:
                arrays[kind] = write_array(root, record["id"], kind, array)
        case.seconds["write"] = time.perf_counter() - started
    return {
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
    }, case


def _absent(record: Record) -> list[str]:
    """The channels that a scan lacks."""
    return [channel for channel, path in record["images"].items() if path is None]


def _files(record: Record) -> dict[str, dict[str, Any]]:
    """Path, size and modification time of each source file; the path alone where there is none."""
    files: dict[str, dict[str, Any]] = {}
    label = {"label": record["label"]} if "label" in record else {}  # without one, a channel may have that name
    for name, path in {**record["images"], **label}.items():
        if path is not None:
            files[name] = {"path": os.path.abspath(path)}
            with suppress(OSError):
                found = os.stat(path)
                files[name] |= {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
    return files


def _sources(record: Record, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The source files with their SHA-256; one with its known path, size and modification time is not read again."""
    sources = _files(record)  # before their bytes are read, so that a later change has another time
    for name, file in sources.items():
        before = known.get(name, {})
        file["sha256"] = before["sha256"] if _is_known(file, before) else sha256_of(file["path"])
    return sources


def _is_known(file: dict[str, Any], known: dict[str, Any]) -> bool:
    return "size" in file and file.items() <= known.items()


def _subject(record: Record | Entry) -> dict[str, str]:
    site = {"site": record["site"]} if "site" in record else {}
    return {"id": record["id"], "subject": record["subject"], **site}


def _holds_another(job: ScanJob, root: Path | None) -> bool:
    """Whether the store holds, under the id of a scan, what was made from other image files, which still exist."""
    if root is None or job.previous is None:
        return False
    try:
        entry = parse_entry(root / RECORDS, job.record["id"], job.previous)
    except ValueError:
        return False
    own = {os.path.abspath(path) for path in job.record["images"].values() if path is not None}
    known = [file["path"] for file in _images(entry["sources"])]
    return bool(own) and own.isdisjoint(known) and all(map(os.path.isfile, known))


def _images(sources: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [file for name, file in sorted(sources.items()) if name != "label"]


def _has_arrays(entry: Entry, root: Path) -> bool:
    return all(has_array(root, entry, kind) for kind in entry["arrays"])


def intensity_statistics(channel: np.ndarray) -> dict[str, float]:
    """Statistics of the stored values other than 0, to six digits; empty for a channel that the scan lacks."""
    values = channel[channel != 0].astype(np.float64)
    if not len(values):
        return {}
    numbers = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
    return {name: float(f"{number:.6g}") for name, number in numbers.items()}


def scan_quality(record: Record, outcome: ScanOutcome) -> ScanQuality:
    """The quality control of a scan that `prepare_scan` has prepared, or failed to."""
    facts: dict[str, Any] = {}
    if (entry := outcome.entry) is not None:
        affine = np.array(entry["chain"]["affine"])
        facts = {
            "shape": "x".join(map(str, entry["chain"]["shape"])),
            "spacing_mm": "x".join(f"{side:.2f}" for side in spacing_of(affine)),
            "orientation": axis_codes(affine),
            "stored_shape": "x".join(map(str, entry["shape"][1:])),
            **entry["quality"],
            **{f"voxels_{name}": n for name, n in entry.get("label_voxels", {}).items()},
            **{f"seconds_{stage}": round(duration, 2) for stage, duration in outcome.seconds.items()},
        }
    site, reason = record.get("site", ""), outcome.reason
    return ScanQuality(record["id"], record["subject"], site, reason, outcome.warnings, facts, outcome.thumbnail)


def _stored_views(entry: Entry, root: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The reference channel of a stored scan and its foreground, for the thumbnail."""
    assert root is not None
    image = open_array(root, entry, "image")
    assert image is not None
    # In float16 NumPy's percentiles of many values are NaN.
    first = np.asarray(next(channel for channel in image if channel.any()), dtype=np.float32)
    return first, first != 0


def make_thumbnail(image: np.ndarray, brain: np.ndarray, chain: dict[str, Any]) -> Thumbnail:
    """Three slices of an image (D, H, W) through the middle of its brain, a bool mask that is not empty."""
    x, y, z = spacing_of(np.array(chain["stored_affine"])).tolist()
    spacing = np.array([z, y, x])
    depth, height, width = ((side.start + side.stop - 1) // 2 for side in bounding_box(brain))
    low, high = np.percentile(image, 0.5), np.percentile(image[brain], 99.5)
    cuts = (np.s_[depth], np.s_[:, height], np.s_[:, :, width])
    scale = 255 / max(float(high) - float(low), 1e-6)
    grey = [np.clip((image[cut].astype(np.float32) - low) * scale, 0, 255).astype(np.uint8) for cut in cuts]
    midline = None
    if (plane := plane_of(chain)) is not None:
        last = np.array(image.shape) - 1
        normal = plane.pose()[:3, 2]

        def across(d: float, h: float) -> float:  # w of the plane at (d, h), in voxels
            offset = (np.array([d, h]) - last[:2] / 2) * spacing[:2]
            return float((plane.shift - normal[:2] @ offset) / normal[2] / spacing[2] + last[2] / 2)

        midline = (across(depth, 0), across(depth, last[1])), (across(0, height), across(last[0], height))
    return Thumbnail(tuple(grey), tuple(np.array(brain[cut]) for cut in cuts), (z, y, x), midline)
