"""scripts/whole-path, from nnU-Net's folder to the Hub, run as a reader of it would, and what it has to keep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import serving
from untrained import call

import asa
from asa.cli import predict
from asa.data.io.nifti import read_image, read_label
from asa.data.store import Store
from asa.inference.layout import label_maps_of
from asa.training import device
from asa.training.checkpoint_files import fetch
from asa.training.device import has_bf16_units

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the script."""
    folder = tmp_path_factory.mktemp("path") / "whole"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "scripts" / "whole-path"), folder.name]
    ran = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "parameters" in ran.stdout
    again = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert again.returncode == 1 and "give a new folder" in again.stderr
    return folder


def test_labels_and_geometry_are_kept_from_nnunets_folder_to_the_bids_derivative(done: Path) -> None:
    store = Store(done / "store")
    assert store.channels == ["T1"] and store.labels == {1: "CSF", 2: "GM", 3: "WM"} and len(store.records) == 3
    derivative = done / "bids/derivatives/asa"
    maps = label_maps_of(derivative)
    assert {id: path.relative_to(derivative).as_posix() for id, path in maps.items()} == {
        f"sub-{k}": f"sub-{k}/anat/sub-{k}_dseg.nii.gz" for k in ("04", "05")
    }
    lookup = [line.split("\t")[:2] for line in (derivative / "dseg.tsv").read_text().splitlines()[1:]]
    assert lookup == [["0", "background"], ["1", "CSF"], ["2", "GM"], ["3", "WM"]]
    for id, path in maps.items():
        made, scan = read_label(path), read_image(done / f"bids/{id}/anat/{id}_T1w.nii.gz")
        assert made.data.shape == scan.data.shape and np.array_equal(made.affine, scan.affine)
        assert set(np.unique(made.data)) <= {0, 1, 2, 3}
    results = json.loads((done / "evaluation/summary.json").read_text())["results"]
    assert results["WM"]["dice"]["used"] == 2 and results["WM"]["dice"]["mean"] > 0.5  # trained, not only run


def test_the_network_from_the_hub_predicts_what_the_run_predicted(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    trained, loaded = asa.load_model(done / "finetuned").state_dict(), asa.load_model(done / "hub").state_dict()
    assert trained.keys() == loaded.keys() and all(torch.equal(trained[key], loaded[key]) for key in trained)
    card = (done / "hub/README.md").read_text()
    assert "license: cc0-1.0" in card and "| WM | dice |" in card
    monkeypatch.setattr(device, "has_bf16_units", has_bf16_units)  # the script had this machine's precision
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the environment when it is imported
    fetch.cache_clear()
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.push("org/brains", {path.name: path.read_bytes() for path in (done / "hub").iterdir()})
        given = (f"input={done / 'bids'}", "layout=bids", f"out={tmp_path / 'again'}", "predict.device=cpu")
        assert call(predict, monkeypatch, "checkpoint=hf://org/brains", *given) == 0
    fetch.cache_clear()
    before, after = (label_maps_of(folder) for folder in (done / "bids/derivatives/asa", tmp_path / "again"))
    for id in ("sub-04", "sub-05"):
        assert np.array_equal(read_label(before[id]).data, read_label(after[id]).data)
