"""One record of a cohort: checked, prepared, written; or the reason why not."""

from __future__ import annotations

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
from asa.data.io.nifti import axis_codes, identity_of, read_image, read_label, spacing_of
from asa.data.preprocessing.midsagittal import MidsagittalPlane
from asa.data.preprocessing.pipeline import PreparedCase, prepare_case, stored_indices
from asa.data.preprocessing.quality_control import Look, Visit, look_at
from asa.data.preprocessing.steps import PrepareSettings
from asa.data.store import DTYPES, array_path, open_array, write_array
from asa.errors import reason_of


@dataclass(frozen=True)
class Plan:
    """How a cohort is prepared; the same for all of its scans.

    Args:
        labels: label values in the files -> names, without 0; empty for a cohort without labels.
        ignored: label values whose voxels count neither in a loss nor in a score.
        regions: name -> label values that it joins, for evaluation, in order.
        settings: what is done to a scan.
        missing: a scan that lacks a channel is "refuse"d, or the channel becomes "zero" and the entry says so.
        duplicates: of scans with the same voxels the first id stays and the others are "refuse"d, or all are "keep"t.

    Raises:
        ValueError: labels, ignored and regions that contradict each other, or another choice.
    """

    labels: Mapping[int, str] = field(default_factory=dict)
    ignored: Sequence[int] = ()
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    settings: PrepareSettings = field(default_factory=PrepareSettings)
    missing: str = "refuse"
    duplicates: str = "refuse"

    def __post_init__(self) -> None:
        for value, name in self.labels.items():
            if not isinstance(value, int) or value <= 0 or not name:
                raise ValueError(
                    f"labels: {value!r}: {name!r} should be a whole number above 0 (the background is 0) and a name"
                )
        if len(self.labels) > 254 or len(set(self.labels.values())) < len(self.labels):
            raise ValueError("labels: at most 254 values, each with a name of its own")
        for value in self.ignored:
            if not isinstance(value, int) or value in self.labels or value == 0:
                raise ValueError(f"ignored: {value!r} should be a label value that labels does not name")
        for name, values in self.regions.items():
            strange = [value for value in values if value not in self.labels]
            if strange or not values:
                raise ValueError(f"regions: {name} joins {strange or 'nothing'}; give values that labels names")
        if self.missing not in ("refuse", "zero"):
            raise ValueError(f"missing={self.missing!r}: choose refuse or zero")
        if self.duplicates not in ("refuse", "keep"):
            raise ValueError(f"duplicates={self.duplicates!r}: choose refuse or keep")
        object.__setattr__(self, "labels", {value: self.labels[value] for value in sorted(self.labels)})
        object.__setattr__(self, "ignored", sorted(self.ignored))
        object.__setattr__(self, "regions", {name: list(values) for name, values in self.regions.items()})


@dataclass(frozen=True)
class Job:
    """One record to prepare, for a worker process. Without a root nothing is written."""

    record: Record
    root: Path | None
    plan: Plan
    before: dict[str, Any] | None
    draw: bool


@dataclass
class Outcome:
    """What came of one record: its manifest entry, or the reason of its failure; unknown if its process was killed."""

    entry: dict[str, Any] | None = None
    reason: str = ""
    unknown: bool = False
    done_before: bool = False
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    look: Look | None = None


def attempt(job: Job) -> Outcome:
    """Prepare one record; runs in a worker process, so a failure becomes a reason in one line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bytes should not depend on the machine's cores
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            outcome = _prepare_record(job)
        except Exception as error:  # one scan must not stop the cohort
            outcome = Outcome(reason=reason_of(error))
        finally:
            torch.set_num_threads(threads)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    outcome.warnings = list(dict.fromkeys(said + outcome.warnings))
    return outcome


def _prepare_record(job: Job) -> Outcome:
    record, plan, root = job.record, job.plan, job.root
    absent = [channel for channel, path in record["images"].items() if path is None]
    if absent and plan.missing == "refuse":
        raise ValueError(
            f"has no {', '.join(absent)}; add the file, leave the scan out, or set missing=zero to fill in zeros"
        )
    sources = _sources(record)
    if root is not None and job.before is not None and _is_done(job.before, sources, root):
        entry = {**job.before, **_person(record), "sources": sources}
        look = _look_again(entry, root, plan.settings) if job.draw else None
        return Outcome(entry, done_before=True, warnings=_flags(absent), look=look)
    started = time.perf_counter()
    images = {channel: None if path is None else read_image(path) for channel, path in record["images"].items()}
    label = read_label(record["label"]) if "label" in record else None
    if label is not None:  # here the message can name the file
        stored_indices(label.data, plan.labels, plan.ignored, record["label"])
    identity = {channel: identity_of(volume) for channel, volume in images.items() if volume is not None}
    seconds = {"read": time.perf_counter() - started}
    case = prepare_case(images, label, plan.labels, plan.settings, ignored=plan.ignored, name=record["id"])
    seconds |= case.seconds
    arrays, counts = {}, {}
    if case.label is not None:
        voxels = np.bincount(case.label.ravel(), minlength=256)[1 : len(plan.labels) + 1]
        counts = {"label_voxels": {name: int(n) for name, n in zip(plan.labels.values(), voxels, strict=True)}}
    if root is not None:
        started = time.perf_counter()
        arrays["image"] = write_array(root, record["id"], "image", case.image)
        if case.label is not None:
            arrays["label"] = write_array(root, record["id"], "label", case.label)
        seconds["write"] = time.perf_counter() - started
    entry = {
        **_person(record),
        "sources": sources,
        "identity": identity,
        **({"missing": absent} if absent else {}),
        "shape": list(case.image.shape),
        "chain": case.chain,
        "quality": case.quality,
        "intensity": {channel: _statistics(part) for channel, part in zip(images, case.image, strict=True)},
        **counts,
        "arrays": arrays,
    }
    return Outcome(entry, warnings=_flags(absent), seconds=seconds, look=_look(case) if job.draw else None)


def _flags(absent: list[str]) -> list[str]:
    return [f"has no {', '.join(absent)}: filled with zeros"] if absent else []


def _look(case: PreparedCase) -> Look:
    spacing = spacing_of(np.array(case.chain["stored_affine"]))[::-1]
    return look_at(case.image[case.first], case.brain, spacing, case.plane)


def _look_again(entry: dict[str, Any], root: Path, settings: PrepareSettings) -> Look:
    """What is drawn of a scan that the store holds already."""
    image = open_array(array_path(root, entry["id"], "image"), tuple(entry["shape"]), DTYPES["image"])
    assert image is not None
    there = next(part for part in image if part.any())
    quality = entry["quality"]
    plane = None
    if "shift_mm" in quality:
        yaw, roll, shift = (
            0.0 if settings.midway else quality[key] for key in ("yaw_degrees", "roll_degrees", "shift_mm")
        )
        plane = MidsagittalPlane(yaw, roll, shift, quality["mirror_correlation"])
    spacing = spacing_of(np.array(entry["chain"]["stored_affine"]))[::-1]
    return look_at(np.asarray(there), there != 0, spacing, plane)


def visit_of(record: Record, outcome: Outcome) -> Visit:
    """What a checkup shows of a record and what came of it."""
    facts: dict[str, Any] = {}
    entry = outcome.entry
    if entry is not None:
        affine = np.array(entry["chain"]["affine"])
        facts = {
            "shape": "x".join(map(str, entry["chain"]["shape"])),
            "spacing_mm": "x".join(f"{side:.2f}" for side in spacing_of(affine)),
            "orientation": axis_codes(affine),
            "stored_shape": "x".join(map(str, entry["shape"][1:])),
            **entry["quality"],
            **{f"voxels_{name}": n for name, n in entry.get("label_voxels", {}).items()},
            **{f"seconds_{stage}": round(taken, 2) for stage, taken in outcome.seconds.items()},
        }
    warned = outcome.warnings
    return Visit(record["id"], record["subject"], record.get("site", ""), outcome.reason, warned, facts, outcome.look)


def _sources(record: Record) -> dict[str, dict[str, str]]:
    paths = {**record["images"]} | ({"label": record["label"]} if "label" in record else {})
    return {
        name: {"path": str(Path(path).absolute()), "sha256": sha256_of(path)}
        for name, path in paths.items()
        if path is not None
    }


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


def _statistics(channel: np.ndarray) -> dict[str, float]:
    """Of the stored values other than 0, to six digits; empty for a channel that the scan lacks."""
    values = channel[channel != 0].astype(np.float64)
    if not len(values):
        return {}
    numbers = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
    return {name: float(f"{number:.6g}") for name, number in numbers.items()}
