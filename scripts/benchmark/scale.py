"""Rows about a store of many scans, measured once each. Its files are hard links to a few, its volumes are holes."""

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.data.datasets.record import Record
from asa.data.io.files import sha256_of
from asa.data.io.nifti import write_image
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import make_loader
from asa.data.preprocessing.cohort import find_duplicates, prepare_cohort
from asa.data.preprocessing.settings import CohortSettings
from asa.data.splits import find_leaks, make_split, select, training_digests
from asa.data.store import MANIFEST, RECORDS, Store, array_path, entry_line, write_records
from asa.settings import LoaderSettings
from scripts.benchmark.clock import host_peak
from scripts.benchmark.plan import Spec

LINKS = 30_000  # names of one file; file systems allow 65,000
WORKERS = 2


def scale(spec: Spec, device: torch.device) -> dict[str, Any]:
    """Time and memory of one operation on a store of `records` scans, which the operation "make" has made.

    Returns:
        "seconds", and "cpu_seconds" of this process, on which other work of the machine has less influence;
        "peak_bytes" of the process, libraries included, and "extra_bytes", by how much the operation raised it; the
        size of the manifest and the records as "manifest_bytes".
    """
    root = Path(spec["scratch"]) / f"scale-{spec['records']}"
    call = OPERATIONS[spec["operation"]](root, spec)
    before, start, began = host_peak(), time.perf_counter(), time.process_time()
    call()
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - began}
    found |= {"peak_bytes": host_peak(), "repeats": 1}
    size = sum((root / "store" / file).stat().st_size for file in (MANIFEST, RECORDS))
    return {**found, "extra_bytes": found["peak_bytes"] - before, "manifest_bytes": size}


def make(root: Path, count: int, volume: list[int]) -> None:
    """A cohort of so many scans of one channel, and its store: two scans of each subject, at four sites."""
    (root / "raw").mkdir(parents=True)
    first = root / "raw" / "first.nii"
    write_image(first, np.random.default_rng(0).uniform(1, 2, (16, 16, 16)), np.eye(4))
    prepare_cohort([record(first, 0)], root / "store", CohortSettings(), progress=False)
    store = Store(root / "store")
    array = array_path(store.path, store.records.ids[0], "image")
    shape = [1, *volume]
    with array.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)})
        file.truncate(file.tell() + 2 * math.prod(shape))
    entry = {**store.records[0], "shape": shape, "arrays": {"image": sha256_of(array)}}
    entries = {}
    for k in range(count):
        if k % LINKS == 0:  # a file of its own, with the same bytes
            source, stored = root / "raw" / f"source-{k}.nii", store.path / f"array-{k}"
            source.write_bytes(first.read_bytes())
            with stored.open("wb") as file:
                file.write(array.read_bytes()[:128])
                file.truncate(array.stat().st_size)
        path = root / "raw" / f"scan-{k:07d}.nii"
        own = record(path, k)
        os.link(source, path)
        if k:
            os.link(stored, array_path(store.path, own["id"], "image"))
        facts = os.stat(source)
        file_of = {"path": own["images"]["t1"], "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
        sources = {"t1": {**file_of, "sha256": entry["sources"]["t1"]["sha256"]}}
        named = {key: own[key] for key in ("id", "subject", "site")}
        one = {**entry, **named, "sources": sources, "identity": {"t1": f"{k:032x}"}}
        entries[own["id"]] = entry_line(one)
    write_records(store.path, entries)


def record(path: Path, k: int) -> Record:
    """Scan k as a reader returns it."""
    subject = f"sub-{k // 2:07d}"
    return {
        "id": f"{subject}_ses-{k % 2}",
        "subject": subject,
        "site": f"site-{k % 8 // 2}",
        "images": {"t1": str(path)},
    }


Call = Callable[[], object]


def opened(root: Path, spec: Spec) -> Call:
    """Open the store, and read one entry from its middle."""
    middle = record(root, spec["records"] // 2)["id"]
    return lambda: Store(root / "store").record(middle)


def split(root: Path, spec: Spec) -> Call:
    """A split by subjects, and the entries of its three parts."""
    store = Store(root / "store")

    def call() -> None:
        parts = make_split(store.records, validation=0.1, test=0.1)
        for subjects in parts.values():
            select(store.records, subjects)

    return call


def by_site(root: Path, spec: Spec) -> Call:
    """A split by site, for which every entry is read."""
    store = Store(root / "store")
    return lambda: make_split(store.records, validation=0.1, site="site-1")


def duplicates(root: Path, spec: Spec) -> Call:
    """The search for scans with the same voxels."""
    records = Store(root / "store").records
    return lambda: find_duplicates(records, [])


def leakage(root: Path, spec: Spec) -> Call:
    """Digests of all scans, as a checkpoint of pretraining has them, and the search for the held-out ones in them."""
    records = Store(root / "store").records
    parts = make_split(records, validation=0.1, test=0.1)
    return lambda: find_leaks(records, parts, training_digests(records))


def first_batch(root: Path, spec: Spec) -> Call:
    """From nothing to the first batch of two workers, with their start."""

    def call() -> None:
        store = Store(root / "store")
        train = select(store.records, make_split(store.records, validation=0.1)["train"])
        dataset = CropDataset(store, train, (spec["edge"],) * 3, crop="random")
        next(iter(make_loader(dataset, 4, LoaderSettings(workers=WORKERS))))

    return call


def resume(root: Path, spec: Spec) -> Call:
    """asa-prepare where nothing has changed: every source and array is looked at, and the records are written."""
    records = [record(root / "raw" / f"scan-{k:07d}.nii", k) for k in range(spec["records"])]

    def call() -> None:
        report = prepare_cohort(records, root / "store", CohortSettings(), progress=False)
        if len(report.skipped) != len(records):
            raise RuntimeError(f"{len(records) - len(report.skipped)} scans were prepared again")

    return call


OPERATIONS: dict[str, Callable[[Path, Spec], Call]] = {
    "make": lambda root, spec: partial(make, root, spec["records"], spec["volume"]),
    "open": opened,
    "split": split,
    "split by site": by_site,
    "duplicates": duplicates,
    "leakage": leakage,
    "first batch": first_batch,
    "resume": resume,
}
