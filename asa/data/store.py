"""The prepared store: one manifest and plain memory-mapped arrays, `C D H W` in RAS+ (W left to right).

STORE/manifest.json      settings, software, channels, labels, and one entry per scan, sorted by id
STORE/images/ID.npy      float16 (C, D, H, W)
STORE/labels/ID.npy      uint8 (1, D, H, W), class indices: index k means value ([0] + label_values)[k];
                         `asa.ops.labels.IGNORED` (255) marks voxels that count neither in a loss nor in a score
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import check_id, read_json, sha256_of, write_json, write_whole

FORMAT = 2
KEYS = {"format", "settings", "channels", "labels", "ignored", "regions", "records"}
MANIFEST = "manifest.json"
FOLDERS = {"image": "images", "label": "labels"}
CHANGED = "bytes changed; delete it and run asa-prepare again"
DTYPES = {"image": np.float16, "label": np.uint8}


class Store:
    """A prepared cohort on disk, read-only.

    Args:
        path: folder that `prepare_cohort` wrote.

    Attributes:
        path: that folder, absolute.
        records: entries of the manifest, sorted by id, with id, subject, site, sources, shape, chain, statistics.
        channels: names of the image channels, in stored order.
        labels: label value in the source files -> name.
        ignored: label values of the source files that are stored as `asa.ops.labels.IGNORED`.
        regions: name -> label values that it joins, for training or evaluation, in order; may be empty.
        settings: the preprocessing settings.
        fingerprint: SHA-256 of what all scans have in common (format, settings, channels, labels).

    Raises:
        ValueError: no store at the path, another format, or no scans; the message says what to run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        if not (self.path / MANIFEST).is_file():
            raise ValueError(f"{self.path}: no prepared store here; make one with asa-prepare out={self.path}")
        manifest = read_manifest(self.path)
        self.records: list[dict[str, Any]] = manifest["records"]
        self.channels: list[str] = manifest["channels"]
        self.labels: dict[int, str] = {int(value): name for value, name in manifest["labels"].items()}
        self.ignored: list[int] = manifest["ignored"]
        self.regions: dict[str, list[int]] = manifest["regions"]
        self.settings: dict[str, Any] = manifest["settings"]
        common = json.dumps({key: manifest[key] for key in sorted(KEYS - {"records"})}, sort_keys=True)
        self.fingerprint = hashlib.sha256(common.encode()).hexdigest()
        if not self.records:
            raise ValueError(f"{self.path}: the store holds no scans; run asa-prepare again to see why they failed")
        self._by_id = {record["id"]: record for record in self.records}
        self._compared: set[Path] = set()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def label_values(self) -> list[int]:
        """Declared label values in stored order: index k of a stored label means ([0] + label_values)[k]."""
        return sorted(self.labels)

    def record(self, id: str) -> dict[str, Any]:
        """The manifest entry of one scan.

        Raises:
            ValueError: the store has no such scan.
        """
        if id not in self._by_id:
            raise ValueError(f"{self.path}: no scan {id!r} in this store of {len(self)}; prepare it, or correct the id")
        return self._by_id[id]

    def image(self, id: str) -> np.ndarray:
        """Memory-mapped image (C, D, H, W) float16; reading a crop reads only its pages.

        When a process first opens an array, it compares the file with the SHA-256 in the manifest.

        Raises:
            ValueError: no such scan, or its array is missing or damaged.
        """
        return self._array(id, "image")

    def label(self, id: str) -> np.ndarray | None:
        """Memory-mapped label map (1, D, H, W) uint8 of class indices, None for an unlabelled scan.

        Raises:
            ValueError: no such scan, or its array is missing or damaged.
        """
        return self._array(id, "label") if "label" in self.record(id)["arrays"] else None

    def verify(self) -> list[tuple[str, str]]:
        """Compare every array with the SHA-256 in the manifest.

        Returns:
            (id, reason) for each array that is missing or has changed; empty for an intact store.
        """
        damaged = []
        for record in self.records:
            for kind, digest in record["arrays"].items():
                path = array_path(self.path, record["id"], kind)
                if not path.is_file():
                    damaged.append((record["id"], f"{path}: missing; run asa-prepare again"))
                elif sha256_of(path) != digest:
                    damaged.append((record["id"], f"{path}: {CHANGED}"))
        return damaged

    def _array(self, id: str, kind: str) -> np.ndarray:
        shape = tuple(self.record(id)["shape"])
        path = array_path(self.path, id, kind)
        array = open_array(path, shape if kind == "image" else (1, *shape[1:]), DTYPES[kind])
        if array is None:
            raise ValueError(f"{path}: missing or damaged; run asa-prepare again, which prepares only what is missing")
        if path not in self._compared:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != self.record(id)["arrays"].get(kind):
                raise ValueError(f"{path}: {CHANGED}")
            self._compared.add(path)
        return array


def array_path(root: Path, id: str, kind: str) -> Path:
    """Path of the "image" or "label" of a scan in a store."""
    return root / FOLDERS[kind] / f"{id}.npy"


def open_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """Memory-map a `.npy` file; None if it is missing, truncated, or of another shape or type."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, OverflowError):
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def read_box(volume: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Copy a box out of an array, with zeros where it lies outside. Only the pages of the box are read.

    Args:
        volume: `(C, D, H, W)`, memory-mapped or not.
        start: first voxel (D, H, W) of the box; may be negative.
        size: (D, H, W) of the box.

    Returns:
        `(C, *size)`.
    """
    inner = [slice(max(a, 0), max(min(a + n, m), 0)) for a, n, m in zip(start, size, volume.shape[1:], strict=True)]
    box = np.zeros((volume.shape[0], *size), dtype=volume.dtype)
    outer = [slice(s.start - a, s.start - a + max(s.stop - s.start, 0)) for s, a in zip(inner, start, strict=True)]
    box[(slice(None), *outer)] = volume[(slice(None), *inner)]
    return box


def write_array(root: Path, id: str, kind: str, array: np.ndarray) -> str:
    """Write an "image" (as float16) or "label" (uint8) (C, D, H, W) of a scan atomically: the SHA-256 of the file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=DTYPES[kind]), allow_pickle=False)
    path = array_path(root, id, kind)
    write_whole(path, buffer.getvalue())
    return sha256_of(path)


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a manifest, or another format.
    """
    file = root / MANIFEST
    manifest = read_json(file)
    found = manifest.get("format") if isinstance(manifest, dict) and manifest.keys() >= KEYS else None
    if found != FORMAT:
        raise ValueError(f"{file}: store format {found!r}, this asa reads {FORMAT}; prepare it again into a new folder")
    if wrong := _wrong_entry(manifest):
        raise ValueError(f"{file}: {wrong} is missing or not as asa-prepare writes it; prepare into a new folder")
    ids = [record.get("id") for record in manifest["records"]]
    try:
        for id in ids:
            check_id(id)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if len(set(ids)) < len(ids):
        raise ValueError(f"{file}: scans with the same id; prepare the store again into a new folder")
    return manifest


def _wrong_entry(manifest: Mapping[str, Any]) -> str:
    """The first entry of another type than `write_manifest` writes, as a store may come from anybody; else ""."""
    common = {"settings": dict, "channels": list, "labels": dict, "ignored": list, "regions": dict, "records": list}
    for key, kind in common.items():
        if not isinstance(manifest[key], kind):
            return key
    labels, names = manifest["labels"], [*manifest["labels"].values(), *manifest["channels"]]
    if len(labels) > 254 or not all(value.isdecimal() and len(value) < 20 for value in labels):
        return "labels"
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        return "a name in labels or channels"
    if not all(isinstance(values, list) and values for values in manifest["regions"].values()):
        return "a region"
    joined = [str(value) for values in manifest["regions"].values() for value in values]
    if not labels.keys() >= set(joined) or not all(isinstance(value, int) for value in manifest["ignored"]):
        return "a value in regions or ignored"
    own = {"subject": str, "shape": list, "sources": dict, "arrays": dict, "chain": dict}
    for number, record in enumerate(manifest["records"], start=1):
        for key, kind in own.items():
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                return f"{key} of record {number}"
        if len(record["shape"]) != 4 or not all(isinstance(size, int) for size in record["shape"]):
            return f"shape of record {number}"
        sources = record["sources"].values()
        paths = [source.get(key) for source in sources if isinstance(source, dict) for key in ("path", "sha256")]
        if len(paths) < 2 * len(sources) or not all(isinstance(path, str) for path in paths):
            return f"sources of record {number}"
        if not record["arrays"].keys() <= FOLDERS.keys():
            return f"arrays of record {number}"
    return ""


def write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest atomically, with records sorted by id."""
    ordered = {**manifest, "records": sorted(manifest["records"], key=lambda record: record["id"])}
    write_json(root / MANIFEST, ordered)
