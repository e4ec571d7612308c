"""The store is plain arrays, a manifest and a line per scan: cheap to open, cheap to crop, and damage is found."""

import math
import os
import pickle
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from stores import read_tree, write_tree

from asa.data.datasets.record import Record
from asa.data.io.files import write_json
from asa.data.io.nifti import write_image
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings
from asa.data.store import (
    FORMAT,
    Store,
    append_records,
    entry_line,
    has_array,
    open_array,
    write_records,
)
from asa.ops.labels import IGNORED

SETTINGS = CohortSettings(labels={4: "tumour", 1: "core"})


def cohort(root: Path) -> list[Record]:
    """Two scans with two channels, the first one labelled."""
    records: list[Record] = []
    for name in ("b", "a"):
        images = {channel: str(root / f"{name}_{channel}.nii") for channel in ("t1", "flair")}
        records.append({"id": name, "subject": f"person-{name}", "site": "Rome", "images": images})
    records[0]["label"] = str(root / "b_label.nii")
    return records


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The store of `cohort`."""
    rng = np.random.default_rng(0)
    for record in cohort(tmp_path):
        for path in record["images"].values():
            write_image(path, rng.uniform(10, 99, (9, 8, 7)), np.eye(4))
    label = np.zeros((9, 8, 7), np.uint8)
    label[2:5, 3:6, 2:6] = 4
    write_image(tmp_path / "b_label.nii", label, np.eye(4), dtype=np.uint8)
    prepare_cohort(cohort(tmp_path), tmp_path / "store", SETTINGS, progress=False)
    return tmp_path / "store"


def test_a_store_lists_its_contents(made):
    store = Store(made)
    assert len(store) == 2 and [record["id"] for record in store.records] == ["a", "b"]
    assert store.channels == ["t1", "flair"]
    assert store.labels == {1: "core", 4: "tumour"} and store.label_values == [1, 4]
    assert store.settings["normalise"] == "percentile"
    record = store.record("b")
    assert record["subject"] == "person-b" and record["site"] == "Rome" and record["shape"] == [2, 7, 8, 9]
    assert record["label_voxels"] == {"core": 0, "tumour": 36}
    assert set(record["sources"]) == {"t1", "flair", "label"}
    assert len(record["sources"]["t1"]["sha256"]) == 64 and Path(record["sources"]["t1"]["path"]).is_absolute()
    assert record["intensity"]["t1"]["max"] == 1.0


def test_arrays_are_memory_mapped_float16_and_uint8(made):
    store = Store(made)
    image, label = store.image("b"), store.label("b")
    assert isinstance(image, np.memmap) and image.dtype == np.float16 and image.shape == (2, 7, 8, 9)
    assert isinstance(label, np.memmap) and label.dtype == np.uint8 and label.shape == (1, 7, 8, 9)
    assert list(np.unique(label)) == [0, 2]  # index 2 of [0, 1, 4] is the value 4
    assert store.label("a") is None
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0, 0] = 1
    np.testing.assert_array_equal(np.load(made / "images/b.npy"), image)


def test_a_crop_reads_only_its_own_pages(made):
    """A volume of 4 GB, almost all of it a hole in the file: a crop must neither read nor hold the rest."""
    shape = (1, 1024, 2048, 1024)
    path = made / "images/a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 2 * math.prod(shape))
    manifest = read_tree(made)
    manifest["records"][0]["shape"] = list(shape)
    write_tree(made, manifest)
    store = Store(made)
    store._compared.add(path)  # with its SHA-256, as after the first time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop = np.array(store.image("a")[:, 500:532, 1000:1032, 500:532])
    assert crop.shape == (1, 32, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # kB


def test_a_flipped_byte_and_a_lost_file_are_found(made):
    assert Store(made).verify() == []
    path = made / "images/a.npy"
    payload = bytearray(path.read_bytes())
    payload[-3] ^= 1
    path.write_bytes(payload)
    (made / "labels/b.npy").unlink()
    (one, why), (other, missing) = Store(made).verify()
    assert one == "a" and "bytes changed" in why
    assert other == "b" and "missing" in missing
    with pytest.raises(ValueError, match=r"labels/b.npy: missing or damaged; run asa-prepare again"):
        Store(made).label("b")


def test_a_truncated_array_is_refused_when_it_is_opened(made):
    path = made / "images/a.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"images/a.npy: missing or damaged"):
        Store(made).image("a")


def test_what_is_not_a_store_is_refused_with_what_to_run(made, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no prepared store here; make one with asa-prepare out="):
        Store(tmp_path / "nowhere")
    manifest = read_tree(made)
    common = {key: value for key, value in manifest.items() if key != "records"}
    for content, reason in (
        ({**common, "format": FORMAT + 1}, f"store format {FORMAT + 1}, this asa reads {FORMAT}"),
        ({"format": FORMAT}, "store format None"),
        ([], "store format None"),
        ({**manifest, "format": FORMAT - 1}, "prepare it again into a new folder"),
    ):
        write_json(made / "manifest.json", content)
        with pytest.raises(ValueError, match=reason):
            Store(made)
    (made / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: not valid JSON"):
        Store(made)
    write_json(made / "manifest.json", common)
    write_records(made, {})
    with pytest.raises(ValueError, match="holds no scans; run asa-prepare again"):
        Store(made)
    (made / "records.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"records.jsonl: no such file"):
        Store(made)


def test_an_unknown_scan_is_named(made):
    for id in ("0", "aa", "c"):  # before, between and after those that are there
        with pytest.raises(ValueError, match=f"no scan '{id}' in this store of 2"):
            Store(made).image(id)


def test_indices_follow_the_order_of_the_values_and_not_that_of_the_manifest(made):
    write_tree(made, {**read_tree(made), "labels": {"10": "c", "4": "b", "1": "a"}})
    assert Store(made).label_values == [1, 4, 10] and list(Store(made).labels.values()) == ["a", "b", "c"]


def test_a_store_has_at_most_254_labels_so_that_no_index_means_ignored(made):
    manifest = read_tree(made)
    for count in (254, 255):
        write_tree(made, {**manifest, "labels": {str(value): f"label {value}" for value in range(1, count + 1)}})
        if count < IGNORED:
            assert Store(made).label_values[-1] == count
        else:
            with pytest.raises(ValueError, match=r"manifest\.json: labels is missing or not"):
                Store(made)


@pytest.mark.parametrize("id", ["../../escaped", "/etc/hostname", "a\nb", "", None, "x" * 300])
def test_an_id_of_a_store_names_no_file_outside_it(made, tmp_path, id):
    manifest = read_tree(made)
    manifest["records"][1]["id"] = id
    write_tree(tmp_path, manifest)
    reason = "not a record as asa-prepare writes it" if id is None else "not usable as an id"
    with pytest.raises(ValueError, match=rf"records\.jsonl: record 2: .*{reason}"):
        Store(tmp_path)


def test_the_last_line_of_a_scan_counts_and_a_line_that_is_cut_off_does_not(made):
    first, second = Store(made).records
    append_records(made, [entry_line({**first, "site": "Oslo"}), entry_line({**second, "id": "0"})])
    whole = (made / "records.jsonl").read_bytes()
    for cut in range(1, len(entry_line(second)), 100):
        (made / "records.jsonl").write_bytes(whole + entry_line({**second, "id": "cut"})[:cut])
        records = Store(made).records
        assert records.ids == ["0", "a", "b"] and records[1] == {**first, "site": "Oslo"} and records[2] == second
    (made / "records.jsonl").write_bytes(whole + b'{"id": "cut"\n' + whole)
    with pytest.raises(ValueError, match=r"records\.jsonl: record 5: not a record .* remove it"):
        Store(made)


def test_the_entries_of_a_store_are_its_lines(made):
    records, whole = Store(made).records, read_tree(made)["records"]
    assert list(records) == whole and [records[0], records[-1]] == whole
    assert list(records[1:]) == whole[1:] and list(records.take([1, 0])) == whole[::-1]
    assert records.ids == ["a", "b"] and records.subjects == ["person-a", "person-b"]
    assert list(pickle.loads(pickle.dumps(records))) == whole
    assert b"".join(line + b"\n" for line in records.lines()) == (made / "records.jsonl").read_bytes()
    with pytest.raises(IndexError):
        records[2]


def test_entries_are_found_again_in_a_file_that_has_new_ones(made):
    """asa-prepare may add scans to a store that a training reads."""
    store = Store(made)
    before, first, state = list(store.records), store.records[:1], pickle.dumps(store)
    new = {**before[0], "id": "_first", "subject": "new"}
    append_records(made, [entry_line({**before[1], "site": "Oslo"})])
    assert list(store.records) == [before[0], {**before[1], "site": "Oslo"}]
    write_records(made, {entry["id"]: entry_line(entry) for entry in (new, *before)})
    for opened in (store, pickle.loads(state)):
        assert list(opened.records) == before and opened.record("b") == before[1]
    assert list(first) == before[:1]
    write_records(made, {"b": entry_line(before[1])})
    with pytest.raises(ValueError, match=r"records\.jsonl: a was removed from the store while it was in use"):
        list(first)


def test_records_replaced_by_others_of_the_same_size_are_read_again(made):
    store = Store(made)
    entries = {entry["id"]: {**entry, "site": "Oslo"} for entry in store.records}
    write_records(made, {id: entry_line(entry) for id, entry in entries.items()})
    assert list(store.records) == list(entries.values())
    (made / "records.jsonl").write_bytes((made / "records.jsonl").read_bytes().replace(b"Oslo", b"Rome"))
    assert store.record("b") == {**entries["b"], "site": "Rome"}


@pytest.mark.parametrize("differs", ["file", "size", "time"])
def test_records_that_differ_only_in_their_file_size_or_time_are_read_again(made, differs):
    path, store = made / "records.jsonl", Store(made)
    first, second = store.records
    before = path.stat()
    first, second = {**first, "site": "Rom"}, {**second, "site": "Romes"}  # as long as before, at other places
    if differs == "size":
        second["site"] = "Roma"
    if differs == "file":
        write_records(made, {entry["id"]: entry_line(entry) for entry in (first, second)})
    else:
        path.write_bytes(b"".join(entry_line(entry) + b"\n" for entry in (first, second)))
    os.utime(path, ns=(0, before.st_mtime_ns + 10**9 * (differs == "time")))
    after = path.stat()
    same = {"file": after.st_ino, "size": after.st_size, "time": after.st_mtime_ns}
    old = {"file": before.st_ino, "size": before.st_size, "time": before.st_mtime_ns}
    assert {key for key in same if same[key] != old[key]} == {differs}
    assert list(store.records) == [first, second]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('"subject": "person-a"', '"subject": "person-a", "subject": 1'), "subject of a is missing or not"),
        (('"subject": "person-a"', '"subject": "person-a", "subject": "b"'), "id or subject of a is missing or not"),
        (('"subject": "person-a"', '"subject": "person-a", "id": "../b"'), "id or subject of a is missing or not"),
        (('"subject": "person-a"', '"subject": "person-a", "x": NaN'), "a: not valid JSON .NaN is not a number"),
        (('"subject": "person-a"', '"subject": "person-a", "x": ['), "a: not valid JSON"),
        (('"subject": "person-a"', '"subject": "person-a", "x": ' + "[" * 100_000), "a: not valid JSON"),
        (('"subject": "person-a"', '"subject": "person-a", "shape": [1], "y": "'), "a: not valid JSON"),
    ],
)
def test_an_entry_that_asa_did_not_write_is_refused_when_it_is_read(made, change, reason):
    path = made / "records.jsonl"
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ValueError, match=f"records.jsonl: {reason}"):
        Store(made).record("a")


def test_opening_a_store_of_many_scans_leaves_their_entries_on_disk(made):
    entry = {**Store(made).records[0], "filler": "x" * 2000}
    ids = [f"s{k:05d}" for k in range(5000)]
    write_records(made, {id: entry_line({**entry, "id": id}) for id in ids})
    tracemalloc.start()
    store = Store(made)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert store.records.ids == ids and store.record("s04321")["id"] == "s04321"
    assert (made / "records.jsonl").stat().st_size > 10_000_000 and held < peak < 3_000_000
    assert len(pickle.dumps(store)) < 500_000  # of which each worker of a loader has one


def test_an_array_is_there_exactly_if_it_can_be_opened(made):
    whole, shape = (made / "images/a.npy").read_bytes(), [2, 7, 8, 9]
    for k, payload in enumerate((whole, whole[:-1], b"", whole + b"x")):
        (made / f"images/{k}.npy").write_bytes(payload)
    np.save(made / "images/4.npy", np.asfortranarray(np.load(made / "images/a.npy")))
    with (made / "images/5.npy").open("wb") as file:
        np.lib.format.write_array(file, np.load(made / "images/a.npy"), version=(2, 0))
    np.save(made / "images/6.npy", np.zeros(shape, np.uint8))
    found = {}
    for id in (*map(str, range(7)), "none"):
        for size in (shape, [1, 7, 8, 9]):
            entry = {"id": id, "shape": size}
            found[id, size[0]] = has_array(made, entry, "image")
            assert found[id, size[0]] == (open_array(made, entry, "image") is not None), entry
    assert [name for name, there in found.items() if there] == [("0", 2), ("3", 2), ("4", 2), ("5", 2)]
    entry = Store(made).record("b")
    assert has_array(made, entry, "label") and open_array(made, entry, "label").shape == (1, 7, 8, 9)
    assert not has_array(made, {**entry, "id": "a"}, "label")
