"""Files of others in nnU-Net's layout, its export, tables of predictions, and phantoms: what does not fit is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stores import read_tree, write_tree
from untrained import a_scan, call

from asa.cli import evaluate, export, phantom, prepare
from asa.data.io.nifti import read_image, write_label
from asa.data.store import Store

ABOUT = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}


def dataset(root: Path, cases: tuple[str, ...] = ("a",), **about: object) -> Path:
    """A raw dataset of nnU-Net's version 2."""
    for case in cases:
        (root / "imagesTr").mkdir(parents=True, exist_ok=True)
        image = read_image(a_scan(root / "imagesTr", f"{case}_0000"))
        label = np.zeros(image.data.shape, np.uint8)
        label[10:20, 10:20, 10:20] = 1
        write_label(root / "labelsTr" / f"{case}.nii.gz", label, image)
    (root / "dataset.json").write_text(json.dumps({**ABOUT, **about}))
    return root


@pytest.mark.parametrize("about", [
    {"channel_names": {"9" * 5000: "T1"}}, {"channel_names": [1]}, {"channel_names": {"0": "a\nb"}},
    {"labels": {"background": 0, "x\ny": 1}}, {"labels": {"background": 0, "x": [True]}},
    {"labels": {"background": 0, "x": 1.5}}, {"dataset": 3}, {"dataset": None}, {"dataset": {"c": 3}},
    {"dataset": {"c": {}}}, {"dataset": {"c": {"images": [{}], "label": []}}}, {"file_ending": ["x"]},
    {"dataset": {"../../c": {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}},
])  # fmt: skip
def test_a_dataset_of_other_types_is_one_line_before_the_work(tmp_path: Path, monkeypatch, capsys, about: dict) -> None:
    root = dataset(tmp_path / "raw", **about)
    arguments = ["data=nnunet", f"data.root={root}", f"out={tmp_path}/store", "labels=dataset"]
    assert call(prepare, monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--traceback" not in error and "asa.data" not in error, error
    assert not list((tmp_path / "store").glob("*/*"))


def test_a_bad_case_is_named_and_the_others_are_prepared(tmp_path: Path, monkeypatch, capsys) -> None:
    root = dataset(tmp_path / "raw", ("a", "b"))
    (root / "imagesTr" / "a_0000.nii.gz").write_bytes(b"bad")
    arguments = ["data=nnunet", f"data.root={root}", f"out={tmp_path}/store", "labels=dataset"]
    assert call(prepare, monkeypatch, *arguments) == 1
    assert f"a: failed: {root}/imagesTr/a_0000.nii.gz: " in capsys.readouterr().out
    assert [record["id"] for record in Store(tmp_path / "store").records] == ["b"]
    assert call(prepare, monkeypatch, *arguments, "failed=skip") == 0
    assert "1 failed" in capsys.readouterr().out
    (root / "imagesTr" / "b_0000.nii.gz").write_bytes(b"bad")
    assert call(prepare, monkeypatch, *arguments[:-2], f"out={tmp_path}/none", "labels=dataset", "failed=skip") == 1


@pytest.mark.parametrize("change", [
    {"labels": {"1": 3, "2": "gm", "5": "wm"}}, {"labels": {"1": "a\nb", "2": "gm", "5": "wm"}},
    {"labels": {str(value): f"l{value}" for value in range(1, 400)}}, {"regions": {"a": ["x"]}},
    {"regions": {"a": [7]}}, {"regions": {"a": []}}, {"ignored": ["x"]}, {"channels": [3]}, {"channels": ["t1\nx"]},
    {"sources": {"t1": {"path": "x"}}},
])  # fmt: skip
def test_a_store_with_other_names_and_values_is_not_exported(
    store: Path, tmp_path: Path, monkeypatch, capsys, change: dict
) -> None:
    manifest = read_tree(store)
    file = "manifest.json" if change.keys() <= manifest.keys() else "records.jsonl"
    (manifest if file == "manifest.json" else manifest["records"][0]).update(change)
    write_tree(tmp_path, manifest)
    assert call(export, monkeypatch, f"store={tmp_path}", f"out={tmp_path}/out", "format=nnunet") == 1
    assert f"error: {tmp_path}/{file}: " in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["background", "ignore"])
def test_a_label_with_a_name_of_nnunets_own_is_not_exported(
    store: Path, tmp_path: Path, monkeypatch, capsys, name: str
) -> None:
    manifest = read_tree(store)
    manifest["labels"]["1"] = name
    write_tree(tmp_path, manifest)
    assert call(export, monkeypatch, f"store={tmp_path}", f"out={tmp_path}/out", "format=nnunet") == 1
    assert f"a label is called {name}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_export_writes_through_no_link(store: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "precious").write_text("kept")
    out = tmp_path / "out"
    assert call(export, monkeypatch, f"store={store}", f"out={out}", "format=nnunet") == 0
    for name in ("dataset.json", "imagesTr/s0_0000.nii.gz"):
        (tmp_path / "precious").write_bytes(kept := (out / name).read_bytes())
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "precious")
        (tmp_path / "precious").write_bytes(kept + b" ")
        assert call(export, monkeypatch, f"store={store}", f"out={out}", "format=nnunet") == 0
        assert (tmp_path / "precious").read_bytes() == kept + b" " and not (out / name).is_symlink()


CLASSES = "id,subject,class,predicted,p_x,p_y\na,,,x,0.9,0.1\nb,,,y,0.2,0.8\n"
ASYMMETRY = "id,score,mean,top,peak,x,y,z\na,0.1,0.2,0.3,0.4,0,0,0\nb,0.5,0.6,0.7,0.8,0,0,0\n"


@pytest.mark.parametrize(("policy", "table", "truth"), [
    *[("classification", CLASSES.replace("0.9", value), None) for value in ("abc", "", "nan", "inf", "-5", "1e999")],
    *[("asymmetry", ASYMMETRY.replace("0.1", value), None) for value in ("abc", "", "nan", "inf", "1e999")],
    ("classification", "id,p_x,p_y\na,1\nb,1,0\n", None), ("classification", "id,p_x,p_x\na,1,0\nb,1,0\n", None),
    ("classification", CLASSES + "a,,,x,0.9,0.1\n", None),
    ("asymmetry", ASYMMETRY + "a,0.1,0.2,0.3,0.4,0,0,0\n", None), ("asymmetry", "id,score\na,1\nb,2\n", None),
    ("classification", "", None), ("classification", CLASSES, ""),
    ("classification", CLASSES, 'id,class\na,"x\ny"\nb,y\n'),
    ("classification", CLASSES, "id,id,class\na,b,x\nb,a,y\n"),
    ("classification", CLASSES.replace("p_y", '"p_y\n=cmd"'), None), ("asymmetry", ASYMMETRY, "id,health\na,x\nb,y\n"),
])  # fmt: skip
def test_a_table_with_other_values_is_one_line_with_its_name(
    tmp_path: Path, monkeypatch, capsys, policy: str, table: str, truth: str | None
) -> None:
    good = {"classification": "id,class\na,x\nb,y\n", "asymmetry": "id,health\na,1\nb,0\n"}[policy]
    file = tmp_path / {"classification": "predictions.csv", "asymmetry": "asymmetry.csv"}[policy]
    arguments = [f"policy={policy}", f"predictions={tmp_path}", f"truth={tmp_path}/truth.csv", f"out={tmp_path}/out"]
    (tmp_path / "truth.csv").write_text(good if truth is None else truth)
    file.write_text(table)
    assert call(evaluate, monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert f"error: {file if truth is None else tmp_path / 'truth.csv'}: " in error and error.count("\n") == 1, error
    assert "--traceback" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [
    "subjects=1.5", "subjects=x", "seed=1.5", "seed=-1", "rim=3",
    "resolution=nan", "resolution=x", "kind=../x",
])  # fmt: skip
def test_an_impossible_phantom_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch, capsys, option: str
) -> None:
    options = {"kind": "structures", "subjects": "1", "seed": "0", "resolution": "8"} | dict([option.split("=")])
    assert call(phantom, monkeypatch, *[f"{key}={value}" for key, value in options.items()], f"out={tmp_path}/out") == 1
    error = capsys.readouterr().err
    assert f"{option.split('=')[0]}=" in error and error.count("\n") == 1 and "--traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_phantoms_replace_no_files_of_others(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("nilearn")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "subject_001_T1.nii.gz").write_text("mine")
    arguments = ["kind=structures", "subjects=1", "seed=0", "resolution=8", f"out={tmp_path}/out"]
    assert call(phantom, monkeypatch, *arguments) == 1
    assert "not empty and not a phantom cohort" in capsys.readouterr().err
    assert (tmp_path / "out" / "subject_001_T1.nii.gz").read_text() == "mine"
    shutil.rmtree(tmp_path / "out")
    assert call(phantom, monkeypatch, *arguments) == 0
    assert call(phantom, monkeypatch, *arguments) == 0  # again
