"""Random changes of files that others may have made: only declared errors, no name outside a folder, bounded memory.

A second for each kind of file by default; `pytest tests/test_fuzz.py --fuzz-seconds 600` searches longer. The changes
follow from a seed that the failure names, with the file that it is about.
"""

import gzip
import json
import random
import resource
import struct
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stores import write_tree
from test_hostile import nifti_header
from untrained import checkpoint

from asa.config import flatten
from asa.data.datasets import folder, nnunet
from asa.data.io.files import read_yaml
from asa.data.io.nifti import read_image, read_label
from asa.data.io.tables import read_column
from asa.data.preprocessing.settings import CohortSettings
from asa.data.splits import read_split
from asa.data.store import Store
from asa.evaluation.comparison import read_run
from asa.evaluation.summary import CaseRow, cases_csv, summarise
from asa.evaluation.tables import MEASURES, matched, numbers
from asa.inference.anomaly import ASYMMETRY_TABLE as ASYMMETRY
from asa.inference.preprocessing import check_metadata
from asa.inference.whole_scans import TABLE as PREDICTIONS
from asa.training.checkpoint import read_model
from asa.training.checkpoint_files import WEIGHTS

DECLARED = (ValueError, OSError)
MEMORY = 600_000  # kB that a kind of file may take beyond what was taken before
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 10**30, 1e308, -0.5, "", "../../x", "/etc/passwd", "a\nb", "\x1b[0m", "=cmd|x", "NaN", [],
    {}, [[]], {"a": {}}, "x" * 5000, "{image} {mask}", "asa.models.unet.unet_base", "os.system", [10**9] * 3,
]  # fmt: skip
TEXTS = [
    b"../../x",
    b"NaN",
    b"1e999",
    b"null",
    b"[",
    b"{",
    b'"',
    b"\xff\xfe",
    b"\x00",
    b"-1",
    b"9" * 30,
    b"*a",
    b"!!python/x",
]


def changed_bytes(content: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """One to four changes of bytes, most of them before `end`."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(end or len(data), len(data))))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 4] = struct.pack("<f", rng.choice([np.inf, -np.inf, np.nan, 1e30, -1.0, 0.0]))
            case 2:
                data[at : at + 2] = struct.pack("<h", rng.choice([-1, 0, 1, 7, 16, 512, 32767, -32768]))
            case 3:
                data[at : at + rng.randrange(8)] = rng.choice(TEXTS)
            case 4:
                del data[at : at + rng.choice([1, 8, len(data)])]
            case 5:
                data[at:at] = data[at : at + rng.randrange(64)]
    return bytes(data)


def changed_tree(content: Any, rng: random.Random) -> Any:
    """JSON in which one to three values are others, or keys are renamed."""
    holder = {"all": json.loads(json.dumps(content))}
    for _ in range(rng.randint(1, 3)):
        node, key = holder, "all"
        while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if isinstance(node, dict) and node is not holder and rng.random() < 0.2:
            node[rng.choice(["../../x", "x", "", "1"])] = node.pop(key)
        else:
            node[key] = deepcopy(rng.choice(VALUES))
    return holder["all"]


def _images(place: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], object]]:
    voxels = np.arange(64, dtype="<f4").tobytes()
    seeds = {".nii": nifti_header((4, 4, 4)) + voxels, ".hdr": nifti_header((4, 4, 4), 0)[:348]}
    (place / "a.img").write_bytes(voxels)

    def make(rng: random.Random) -> Path:
        ending = rng.choice([".nii", ".nii.gz", ".hdr", "twice"])
        content = changed_bytes(seeds[".hdr" if ending == ".hdr" else ".nii"], rng, end=352)
        if ending in (".nii.gz", "twice"):
            content = gzip.compress(content, mtime=0)
        content = changed_bytes(content, rng) if ending == "twice" else content
        path = place / f"a{'.nii.gz' if ending == 'twice' else ending}"
        path.write_bytes(content)
        return path

    def read(path: Path) -> None:
        read_image(path)
        read_label(path)

    return make, read


def _checkpoints(place: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], object]]:
    content = next(checkpoint(place / "run").rglob(WEIGHTS)).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    description = json.loads(header["__metadata__"]["asa"])

    def make(rng: random.Random) -> Path:
        kind = rng.randrange(3)
        if kind == 0:
            other = changed_bytes(content, rng, end=length)
        else:
            new = {**header, "__metadata__": {"asa": json.dumps(changed_tree(description, rng))}}
            text = json.dumps(new if kind == 1 else changed_tree(header, rng)).encode()
            other = len(text).to_bytes(8, "little") + text + content[length:]
        (place / "x.safetensors").write_bytes(other)
        return place / "x.safetensors"

    def read(path: Path) -> None:
        check_metadata(str(path), read_model(path)[1]["data"])

    return make, read


def _manifests(place: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], object]]:
    from asa.data.store import FORMAT, write_array

    record = {"id": "s", "subject": "s", "sources": {"t1": {"path": "a.nii", "sha256": ""}}, "identity": {"t1": "0"}}
    record["chain"] = {"steps": [], "stored_affine": np.eye(4).tolist()}
    record |= {"shape": [1, 4, 4, 4], "arrays": {"image": write_array(place, "s", "image", np.ones((1, 4, 4, 4)))}}
    common = {
        "settings": {"crop": "none"},
        "channels": ["t1"],
        "labels": {"1": "x"},
        "ignored": [],
        "regions": {"a": [1]},
    }
    manifest = {"format": FORMAT, **common, "records": [record]}

    def make(rng: random.Random) -> Path:
        changed = changed_tree(manifest, rng) if rng.random() < 0.7 else None
        if isinstance(changed, dict) and isinstance(changed.get("records"), list):
            write_tree(place, changed)
        elif changed is None:
            write_tree(place, manifest)
            file = place / rng.choice(["manifest.json", "records.jsonl"])
            file.write_bytes(changed_bytes(file.read_bytes(), rng))
        else:
            (place / "manifest.json").write_text(json.dumps(changed))
        return place / "manifest.json"

    def read(path: Path) -> None:
        store = Store(path.parent)
        for found in store.records:
            assert (place / f"{found['id']}.npy").resolve().parent == place.resolve(), found["id"]
        store.verify()
        for found in store.records:
            store.image(found["id"])

    return make, read


def _tables(place: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], object]]:
    rows = [{"id": "a", "subject": "p", "t1": "a.nii", "label": "l.nii"}, {"id": "b", "subject": "q", "t1": "b.nii"}]
    csv, split = b'id,subject,t1\na,p,a.nii\n"b",q,b.nii\n', {"train": ["a"], "validation": [], "test": ["b"]}

    def make(rng: random.Random) -> Path:
        ending = rng.choice(["csv", "json", "split"])
        trees = {"json": rows, "split": split}
        other = changed_bytes(csv, rng) if ending == "csv" else json.dumps(changed_tree(trees[ending], rng)).encode()
        path = place / f"t.{ending}"
        path.write_bytes(other)
        return path

    def read(path: Path) -> None:
        if path.suffix == ".split":
            read_split(path)
            return
        for found in folder.records(None, table=path):
            assert (place / f"{found['id']}.nii.gz").resolve().parent == place.resolve(), found["id"]
        if path.suffix == ".csv":
            read_column(path, "t1", [{"id": "a", "subject": "p"}])

    return make, read


def _runs(place: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], object]]:
    config = {
        "method": {"_target_": "asa.methods.x", "model": {"depth": 4}},
        "train": {"steps": 3, "lr": 1e-3},
        "crop": [1, 2],
    }
    content = yaml.safe_dump(config, sort_keys=False).encode() + b"a: &a [1, 2]\nb: [*a, *a]\nc: 2026-01-01\n"

    def make(rng: random.Random) -> Path:
        tree = rng.random() < 0.3
        other = yaml.safe_dump(changed_tree(config, rng)).encode() if tree else changed_bytes(content, rng)
        (place / "config.yaml").write_bytes(other)
        return place / "config.yaml"

    return make, lambda path: flatten(read_yaml(path))


def _datasets(place: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], object]]:
    """The dataset.json of nnU-Net, with the files listed or found."""
    found = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz", "numTraining": 1}
    found |= {"labels": {"background": 0, "x": 1, "all": [1, 2], "ignore": 3}, "regions_class_order": [1, 2]}
    cases = {"a": {"images": ["a_0000.nii.gz", "a_0001.nii.gz"], "label": "a.nii.gz"}}
    for name in ("a_0000.nii.gz", "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()

    def make(rng: random.Random) -> Path:
        about = rng.choice([found, {**found, "dataset": cases}])
        tree = rng.random() < 0.7
        other = (
            json.dumps(changed_tree(about, rng)).encode() if tree else changed_bytes(json.dumps(about).encode(), rng)
        )
        (place / "dataset.json").write_bytes(other)
        return place / "dataset.json"

    def read(path: Path) -> None:
        labels, ignored, regions = nnunet.label_scheme(path.parent)
        CohortSettings(labels=labels, ignored=ignored, regions=regions)
        for record in nnunet.records(path.parent):
            assert (place / f"{record['id']}.nii.gz").resolve().parent == place.resolve(), record["id"]

    return make, read


def _evaluations(place: Path) -> tuple[Callable[[random.Random], Path], Callable[[Path], object]]:
    """What asa-evaluate wrote, and tables of predictions with that of the truth."""
    rows = [CaseRow(id, "x", {"dice": 0.5, "hd95_mm": 2.0, "nsd_1mm": 1.0}, 3, 4, 0.1, 0.2) for id in "abc"]
    summary = summarise(rows, {1: "x"}, "ibsr")
    files = {id: {"prediction": f"{id}.nii.gz", "truth": f"{id}.nii.gz", "image": None} for id in "abc"}
    whole, table = summary.as_json() | {"files": files}, cases_csv(summary).encode()
    truth, classes = b"id,subject,class,health\na,p,x,1\nb,q,y,0\n", b"id,p_x,p_y\na,0.9,0.1\nb,0.2,0.8\n"
    scores = b"id,score,mean,top,peak\na,0.9,0.1,0.1,1\nb,0.2,0.8,0.1,2\n"

    def make(rng: random.Random) -> Path:
        changed = rng.choice(["summary.json", "cases.csv", "predictions.csv", "asymmetry.csv", "truth.csv"])
        contents = {"summary.json": json.dumps(whole).encode(), "cases.csv": table, "truth.csv": truth}
        contents |= {"predictions.csv": classes, "asymmetry.csv": scores}
        for name, content in contents.items():
            tree = changed == "summary.json" and rng.random() < 0.8
            other = json.dumps(changed_tree(whole, rng)).encode() if tree else changed_bytes(content, rng)
            (place / name).write_bytes(other if name == changed else content)
        return place / changed

    def read(path: Path) -> None:
        if path.name in ("summary.json", "cases.csv"):
            run = read_run("other", path.parent)
            assert all(
                value is None or isinstance(value, str) for paths in run.files.values() for value in paths.values()
            )
        else:
            numbers(place, matched(place / PREDICTIONS, place / "truth.csv", "class")[0][0], ["p_x", "p_y"])
            numbers(place, matched(place / ASYMMETRY, place / "truth.csv", "health")[0][0], MEASURES)

    return make, read


@pytest.mark.parametrize("kind", [_images, _checkpoints, _manifests, _tables, _runs, _datasets, _evaluations])
def test_changed_files_give_declared_errors_only(
    kind: Callable[[Path], Any], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    place = tmp_path / "inside"
    place.mkdir()
    make, read = kind(place)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seed, until = 0, time.monotonic() + pytestconfig.getoption("--fuzz-seconds")
    refused = 0
    while time.monotonic() < until or seed < 20:
        path, started = make(random.Random(seed)), time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except DECLARED as error:
            refused += 1
            assert str(error) and "\n" not in str(error)[:80], f"seed {seed}, {path}: {error!r}"
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {path}: {error!r}") from error
        assert time.process_time() - started < 20, f"seed {seed}, {path}: takes long"
        seed += 1
    assert refused > seed / 10  # otherwise the changes are too mild to find anything
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY
    assert [item.name for item in tmp_path.iterdir()] == ["inside"]
