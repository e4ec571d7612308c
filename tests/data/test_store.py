"""The store is plain arrays and one manifest: cheap to open, cheap to crop, and damage is found."""

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest

from asa.data.io.nifti import write_image
from asa.data.preprocessing.cohort import CohortSettings, prepare_cohort
from asa.data.store import FORMAT, Store


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A store of two scans with two channels, the first one labelled."""
    rng = np.random.default_rng(0)
    records = []
    for name in ("b", "a"):
        for channel in ("t1", "flair"):
            write_image(tmp_path / f"{name}_{channel}.nii", rng.uniform(10, 99, (9, 8, 7)), np.eye(4))
        images = {channel: str(tmp_path / f"{name}_{channel}.nii") for channel in ("t1", "flair")}
        records.append({"id": name, "subject": f"person-{name}", "site": "Rome", "images": images})
    label = np.zeros((9, 8, 7), np.uint8)
    label[2:5, 3:6, 2:6] = 4
    write_image(tmp_path / "b_label.nii", label, np.eye(4), dtype=np.uint8)
    records[0]["label"] = str(tmp_path / "b_label.nii")
    prepare_cohort(records, tmp_path / "store", CohortSettings(labels={4: "tumour", 1: "core"}), progress=False)
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
    with pytest.raises(ValueError):
        image[0, 0, 0, 0] = 1
    np.testing.assert_array_equal(np.load(made / "images/b.npy"), image)


def test_a_crop_reads_only_its_own_pages(made):
    """A volume of 4 GB, almost all of it a hole in the file: a crop must neither read nor hold the rest."""
    shape = (1, 1024, 2048, 1024)
    path = made / "images/a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 2 * math.prod(shape))
    store = Store(made)
    store.record("a")["shape"] = list(shape)
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
    manifest = json.loads((made / "manifest.json").read_text())
    for content, reason in (
        ({**manifest, "format": FORMAT + 1}, f"store format {FORMAT + 1}, this asa reads {FORMAT}"),
        ({"format": FORMAT}, "store format None"),
        ([], "store format None"),
        ({**manifest, "records": []}, "holds no scans; run asa-prepare again"),
    ):
        (made / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=reason):
            Store(made)
    (made / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: not valid JSON"):
        Store(made)


def test_an_unknown_scan_is_named(made):
    with pytest.raises(ValueError, match="no scan 'c' in this store of 2"):
        Store(made).image("c")


@pytest.mark.parametrize("id", ["../../escaped", "/etc/hostname", "a\nb", "", None, "x" * 300])
def test_an_id_of_a_manifest_names_no_file_outside_the_store(made, tmp_path, id):
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["records"][0]["id"] = id
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: .*not usable as an id"):
        Store(tmp_path)


def test_an_id_that_occurs_twice_in_a_manifest_is_refused(made, tmp_path):
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["records"].append(manifest["records"][0])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: scans with the same id"):
        Store(tmp_path)
