"""scripts/whole-path, run by a reader from a wheel in a fresh environment, and what each path has to keep."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import serving
from untrained import call
from wheels import build_wheel

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
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands in a fresh environment: the wheel, and beside it the installed dependencies only."""
    wheel = build_wheel(tmp_path_factory.mktemp("source"))
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth, of the checkout, are not read
    return home / "bin"


def run(commands: Path, folder: Path, *paths: str) -> subprocess.CompletedProcess[str]:
    """Run the script into a folder, from the folder that it is in."""
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    command = [str(ROOT / "scripts" / "whole-path"), folder.name, *paths]
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)


def ran(commands: Path, folder: Path, path: str) -> Path:
    """The folder of a path that was run into a new folder."""
    found = run(commands, folder, path)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder / path


@pytest.fixture(scope="module")
def done(commands: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the path from nnU-Net's folder wrote."""
    folder = tmp_path_factory.mktemp("path") / "whole"
    found = run(commands, folder, "nnunet")
    assert found.returncode == 0 and "parameters" in found.stdout, found.stdout + found.stderr
    return folder / "nnunet"


def test_the_commands_are_those_of_the_wheel(commands: Path, tmp_path: Path) -> None:
    code = "import asa; print(asa.__file__)"
    shown = subprocess.run(
        [commands / "python", "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, env={}
    )
    assert Path(shown.stdout.strip()).is_relative_to(commands.parent), shown.stderr


def test_a_folder_that_exists_and_an_unknown_path_are_refused(commands: Path, tmp_path: Path) -> None:
    found = run(commands, tmp_path)
    assert found.returncode == 1 and "give a new folder" in found.stderr and not list(tmp_path.iterdir())
    found = run(commands, tmp_path / "new", "ls")
    assert found.returncode == 1 and "no path ls: choose from nnunet" in found.stderr and not list(tmp_path.iterdir())


def test_from_freesurfers_subjects_to_label_maps_on_their_grid(commands: Path, tmp_path: Path) -> None:
    folder = ran(commands, tmp_path / "whole", "freesurfer")
    (file,) = (folder / "predictions").glob("*.mgz")
    made, scan = read_label(file), read_image(folder / "subjects" / file.stem / "mri/T1.mgz")
    assert made.data.shape == scan.data.shape and np.array_equal(made.affine, scan.affine)
    results = json.loads((folder / "evaluation/summary.json").read_text())["results"]
    assert "Left-Thalamus" in results and Store(folder / "store").labels[2] == "Left-Cerebral-White-Matter"


def test_from_bids_and_ages_to_a_probe_and_a_network(commands: Path, tmp_path: Path) -> None:
    folder = ran(commands, tmp_path / "whole", "bids")
    assert (folder / "probe/report.html").is_file() and (folder / "evaluation/summary.json").is_file()
    tested = json.loads((folder / "finetuned/split.json").read_text())["test"]
    rows = list(csv.DictReader((folder / "predictions/predictions.csv").open(newline="")))
    assert len(tested) == 3 and sorted(row["id"] for row in rows) == sorted(tested)
    assert all(0 < float(row["predicted"]) < 120 for row in rows)


def test_a_package_of_ones_own_is_trained_and_predicts(commands: Path, tmp_path: Path) -> None:
    folder = ran(commands, tmp_path / "whole", "package")
    assert len(list((folder / "labels").glob("*.nii.gz"))) == 1
    assert (folder / "volumes/predictions.csv").read_text().startswith("id,subject,brain_ml,")


def test_the_notebook_of_the_first_hour_runs_from_the_wheel(commands: Path, tmp_path: Path) -> None:
    folder = ran(commands, tmp_path / "whole", "notebook") / "notebook_first_hour"
    assert len(list((folder / "predictions").glob("*.nii.gz"))) == 1
    assert "<html" in (folder / "viewer.html").read_text()[:200]


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
