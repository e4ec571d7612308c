"""The prepared store: one manifest and plain memory-mapped arrays, `C D H W` in RAS+ (W left to right).

STORE/manifest.json      settings, software, channels, labels, and one line per scan, sorted by id
STORE/images/ID.npy      float16 (C, D, H, W)
STORE/labels/ID.npy      uint8 (1, D, H, W), class indices: index k means value ([0] + label_values)[k];
                         `asa.ops.labels.IGNORED` (255) marks voxels that count neither in a loss nor in a score

The manifest is JSON for every tool, and so is the line of a scan without its comma. Only the lines that are asked for
are parsed, so that a store of a hundred thousand scans opens in a second:

    {
      "format": 2,
      ...
      "records": [
    {"id": "a", "subject": "a", ...},
    {"id": "b", "subject": "b", ...}
    ]
    }

A manifest that is written in another way, by an earlier version or by hand, is parsed whole; asa-prepare rewrites it.
"""

import hashlib
import io
import json
import math
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import lt
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from asa.data.io.files import JSON, check_id, read_json, sha256_of, write_whole

FORMAT = 2
KEYS = {"format", "settings", "channels", "labels", "ignored", "regions", "records"}
MANIFEST = "manifest.json"
FOLDERS = {"image": "images", "label": "labels"}  # of the arrays
OPENING, CLOSING = b'  "records": [\n', b"]\n}\n"  # the lines before and after those of the scans
TEXT = rb'"((?:[^"\\\x00-\x1f]|\\.)*)"'
LINE = re.compile(rb'\{"id": ' + TEXT + rb', "subject": ' + TEXT + rb"[,}]")
CHANGED = "bytes changed; delete it and run asa-prepare again"
DTYPES = {"image": np.float16, "label": np.uint8}
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # json.dumps would make one for every entry

Entry = dict[str, Any]


class Store:
    """A prepared cohort on disk, read-only.

    Args:
        path: folder that `prepare_cohort` wrote.

    Attributes:
        path: that folder, absolute.
        records: entries of the manifest, sorted by id, with id, subject, site, sources, shape, chain, statistics; each
            is read from the file when it is asked for.
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
        self.records: Records = manifest["records"]
        self.channels: list[str] = manifest["channels"]
        self.labels: dict[int, str] = {int(value): name for value, name in manifest["labels"].items()}
        self.ignored: list[int] = manifest["ignored"]
        self.regions: dict[str, list[int]] = manifest["regions"]
        self.settings: dict[str, Any] = manifest["settings"]
        common = json.dumps({key: manifest[key] for key in sorted(KEYS - {"records"})}, sort_keys=True)
        self.fingerprint = hashlib.sha256(common.encode()).hexdigest()
        if not self.records:
            raise ValueError(f"{self.path}: the store holds no scans; run asa-prepare again to see why they failed")
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
            ValueError: the store has no such scan, or its entry is not as `asa-prepare` writes it.
        """
        index = self.records.find(id)
        if index is None:
            raise ValueError(f"{self.path}: no scan {id!r} in this store of {len(self)}; prepare it, or correct the id")
        return self.records[index]

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

    def first_source(self, record: Mapping[str, Any]) -> Path:
        """The source image of the first channel that a scan has: one may be missing in the cohort."""
        sources = record["sources"]
        return next(Path(sources[channel]["path"]) for channel in self.channels if channel in sources)

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
        record = self.record(id)
        shape = tuple(record["shape"])
        path = array_path(self.path, id, kind)
        array = open_array(path, shape if kind == "image" else (1, *shape[1:]), DTYPES[kind])
        if array is None:
            raise ValueError(f"{path}: missing or damaged; run asa-prepare again, which prepares only what is missing")
        if path not in self._compared:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != record["arrays"].get(kind):
                raise ValueError(f"{path}: {CHANGED}")
            self._compared.add(path)
        return array


def array_path(root: Path, id: str, kind: str) -> Path:
    """Path of the "image" or "label" of a scan in a store."""
    return Path(array_file(root, id, kind))


def array_file(root: Path, id: str, kind: str) -> str:
    """`array_path` as text, for loops over a whole store: a Path takes as long to make as the file to open."""
    return os.path.join(root, FOLDERS[kind], f"{id}.npy")


def open_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """Memory-map a `.npy` file; None if it is missing, truncated, or of another shape or type."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, OverflowError):
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def has_array(path: str, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether `open_array` would open a file, without the cost of a memory map where `write_array` wrote it."""
    header, size = _array_header(shape, dtype)
    try:
        with open(path, "rb", buffering=0) as file:
            if file.read(len(header)) == header:
                return os.fstat(file.fileno()).st_size >= size
    except OSError:
        return False
    return open_array(Path(path), shape, dtype) is not None


@lru_cache
def _array_header(shape: tuple[int, ...], dtype: Any) -> tuple[bytes, int]:
    """What a file of `write_array` begins with, and its size in bytes."""
    header, kind = io.BytesIO(), np.dtype(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": kind.str, "fortran_order": False, "shape": shape})
    return header.getvalue(), len(header.getvalue()) + math.prod(shape) * kind.itemsize


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


class Records(Sequence[Entry]):
    """Entries of a manifest, each read from its line of the file and checked when it is asked for.

    Only ids, subjects and the places of the lines are in memory, and only they go to worker processes. If the manifest
    is replaced, as by `asa-prepare` when it adds scans, the entries of the same ids are read from the new one.

    Args:
        file: the manifest.
        ids, subjects: of each entry, in the order of the ids.
        spans: offset and length in bytes of the line of each entry, int64 `(N, 2)`.
        version: `_version` of the file that the spans are of.
        lines: what the spans are of in place of the file, for a manifest that has other lines.
    """

    def __init__(
        self,
        file: Path,
        ids: Sequence[str],
        subjects: Sequence[str],
        spans: np.ndarray,
        version: tuple[int, ...] = (),
        lines: bytes | None = None,
    ) -> None:
        self.file, self.ids, self.subjects = file, ids, subjects
        self._spans, self._file_version, self._lines = spans, version, lines

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: int | slice) -> "Entry | Records":
        """One entry, or a part of them, not read yet.

        Raises:
            IndexError: there are not so many.
            ValueError: the line is not an entry as `asa-prepare` writes it, or a new manifest does not have the scan.
        """
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return next(self._read([range(len(self))[index]]))

    def __iter__(self) -> Iterator[Entry]:
        return self._read(range(len(self)))

    def take(self, indices: Iterable[int]) -> "Records":
        """The entries at these indices, in this order, not read yet."""
        chosen = list(indices)
        ids, subjects = [self.ids[k] for k in chosen], [self.subjects[k] for k in chosen]
        return Records(self.file, ids, subjects, self._spans[chosen], self._file_version, self._lines)

    def find(self, id: str) -> int | None:
        """Index of a scan among the entries of a whole store, which are sorted; None where it has no such scan."""
        k = bisect_left(self.ids, id)
        return k if k < len(self.ids) and self.ids[k] == id else None

    def lines(self) -> Iterator[bytes]:
        """The entries as they were written, each without a comma."""
        return (line for _, line in self._read_lines(range(len(self))))

    def _read(self, indices: Iterable[int]) -> Iterator[Entry]:
        for k, line in self._read_lines(indices):
            entry = parse_entry(self.file, self.ids[k], line)
            if (entry["id"], entry["subject"]) != (self.ids[k], self.subjects[k]):
                raise ValueError(_not_ours(self.file, f"id or subject of {self.ids[k]}"))
            yield entry

    def _read_lines(self, indices: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        if self._lines is not None:
            for k in indices:
                start, size = self._spans[k].tolist()
                yield k, self._lines[start : start + size]
            return
        with self.file.open("rb", buffering=0) as file:
            if _version(file) != self._file_version:
                self._find_again()
                yield from self._read_lines(indices)
                return
            for k in indices:
                start, size = self._spans[k].tolist()
                yield k, os.pread(file.fileno(), size, start).rstrip(b"\n").removesuffix(b",")

    def _find_again(self) -> None:
        """The lines of the same ids in a manifest that was replaced."""
        new = read_manifest(self.file.parent)["records"]
        places = [new.find(id) for id in self.ids]
        if None in places:
            gone = self.ids[places.index(None)]
            raise ValueError(f"{self.file}: {gone} was removed from the store while it was in use; start again")
        part = new.take(places)
        self.subjects, self._spans = part.subjects, part._spans
        self._file_version, self._lines = part._file_version, part._lines


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a store, with `Records`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a manifest, or another format.
    """
    file = root / MANIFEST
    manifest = _read_by_line(file) or read_json(file)
    found = manifest.get("format") if isinstance(manifest, dict) and manifest.keys() >= KEYS else None
    if found != FORMAT:
        raise ValueError(f"{file}: store format {found!r}, this asa reads {FORMAT}; prepare it again into a new folder")
    if wrong := _wrong_common(manifest):
        raise ValueError(_not_ours(file, wrong))
    records = manifest["records"]
    ids = records.ids if isinstance(records, Records) else [record.get("id") for record in records]
    try:
        for id in ids:
            check_id(id)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if len(set(ids)) < len(ids):
        raise ValueError(f"{file}: scans with the same id; prepare the store again into a new folder")
    return manifest if isinstance(records, Records) else {**manifest, "records": _in_memory(file, records)}


def write_manifest(root: Path, common: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    """Write the manifest atomically.

    Args:
        root: folder of the store.
        common: what all scans have in common; "records" in it is ignored.
        entries: `entry_line` of each scan, by id.
    """
    head = json.dumps({**common, "records": []}, indent=2, ensure_ascii=False, allow_nan=False).encode()
    opening = head.removesuffix(b'  "records": []\n}') + OPENING
    lines = b",\n".join(entries[id] for id in sorted(entries))
    write_whole(root / MANIFEST, opening + lines + (b"\n" if lines else b"") + CLOSING)


def entry_line(entry: Mapping[str, Any]) -> bytes:
    """The line of an entry, which begins with its id and subject."""
    return ENCODER.encode({"id": entry["id"], "subject": entry["subject"], **entry}).encode()


def parse_entry(file: Path, id: str, line: bytes) -> Entry:
    """The entry of a line.

    Args:
        file, id: where it is from, for messages.
        line: as `entry_line` returns it.

    Raises:
        ValueError: it is not as `asa-prepare` writes it.
    """
    try:
        entry = JSON.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {id}: not valid JSON ({error}); restore the file") from None
    if wrong := _wrong_record(entry):
        raise ValueError(_not_ours(file, f"{wrong} of {id}"))
    return entry


def _read_by_line(file: Path) -> dict[str, Any] | None:
    """A manifest with a line for each entry; None if it is written in another way, or not sorted by id."""
    head: list[bytes] = []
    ids: list[str] = []
    subjects: list[str] = []
    sizes: list[int] = []
    if not file.is_file():
        return None
    with file.open("rb", buffering=1 << 20) as lines:
        version = _version(lines)
        for line in lines:
            head.append(line)
            if line == OPENING:
                break
        line = b""
        try:
            for line in lines:
                if (found := LINE.match(line)) is None:
                    break
                id, subject = found.groups()
                ids.append(_text(id))
                subjects.append(ids[-1] if subject == id else _text(subject))
                sizes.append(len(line))
            if line + lines.read(len(CLOSING)) != CLOSING or not all(map(lt, ids, ids[1:])):
                return None
            common = JSON.decode((b"".join(head) + CLOSING).decode())
        except (ValueError, RecursionError):
            return None  # `read_json` names what is wrong
    ends = sum(map(len, head)) + np.cumsum(sizes, dtype=np.int64)
    spans = np.stack([ends - sizes, np.array(sizes, dtype=np.int64)], axis=1)
    return {**common, "records": Records(file, ids, subjects, spans, version)} if isinstance(common, dict) else None


def _text(quoted: bytes) -> str:
    """What stands between the quotes of a string in JSON."""
    return json.loads(b'"' + quoted + b'"') if b"\\" in quoted else quoted.decode()


def _in_memory(file: Path, entries: Sequence[Entry]) -> Records:
    ordered = sorted(entries, key=lambda entry: entry["id"])
    lines = [entry_line(entry) for entry in ordered]
    sizes = np.array([len(line) for line in lines], dtype=np.int64)
    spans = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)
    ids, subjects = [entry["id"] for entry in ordered], [entry["subject"] for entry in ordered]
    return Records(file, ids, subjects, spans, lines=b"".join(lines))


def _version(file: IO[bytes]) -> tuple[int, ...]:
    """What is another one for a file that has replaced this one."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _not_ours(file: Path, what: str) -> str:
    return f"{file}: {what} is missing or not as asa-prepare writes it; prepare into a new folder"


def _wrong_common(manifest: Mapping[str, Any]) -> str:
    """The first entry of another type than `write_manifest` writes, as a store may come from anybody; else "".

    The records are among them, unless they are read later.
    """
    common = {"settings": dict, "channels": list, "labels": dict, "ignored": list, "regions": dict}
    for key, kind in common.items():
        if not isinstance(manifest[key], kind):
            return key
    if not isinstance(manifest["records"], list | Records):
        return "records"
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
    if not isinstance(manifest["records"], Records):
        for number, record in enumerate(manifest["records"], start=1):
            if wrong := _wrong_record(record):
                return f"{wrong} of record {number}"
    return ""


def _wrong_record(record: object) -> str:
    """The first key of an entry of one scan with another type than `asa-prepare` writes; else ""."""
    own = {"subject": str, "shape": list, "sources": dict, "arrays": dict, "chain": dict, "identity": dict}
    for key, kind in own.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            return key
    assert isinstance(record, dict)
    if len(record["shape"]) != 4 or not all(isinstance(size, int) for size in record["shape"]):
        return "shape"
    if not all(isinstance(digest, str) for digest in record["identity"].values()):
        return "identity"
    if not _is_affine(record["chain"].get("stored_affine")):
        return "chain.stored_affine"
    sources = record["sources"].values()
    paths = [source.get(key) for source in sources if isinstance(source, dict) for key in ("path", "sha256")]
    if len(paths) < 2 * len(sources) or not all(isinstance(path, str) for path in paths):
        return "sources"
    return "" if record["arrays"].keys() <= FOLDERS.keys() else "arrays"


def _is_affine(value: Any) -> bool:
    try:
        return [len(row) for row in value] == 4 * [4] and sum(abs(x) for row in value for x in row) < 1e300
    except TypeError:
        return False
