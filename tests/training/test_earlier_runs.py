"""Runs, checkpoints and bundles of the version before modules moved still load and resume."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import asa
from asa.config import build
from asa.data.io.nifti import read_image
from asa.training.checkpoint import find_weights

ROOT = Path(__file__).parents[2]
BEFORE = "432af3b"  # the last commit with asa/engine
TINY = ["loader.workers=0", "train.device=cpu", "train.log_every=1", "optim.warmup=1", "optim.schedule=constant"]
PRETRAIN = [*TINY, "model=asa_tiny", "crop=32", "train.batch_size=2", "data.placement=random"]
FINETUNE = [*TINY, "model=unet_tiny", "+model.feature_size=4", "crop=[64,32,32]", "train.batch_size=1"]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory):
    """Run a command of the earlier version: earlier("pretrain", "key=value", ...)."""
    folder = tmp_path_factory.mktemp("earlier")
    archive = subprocess.run(["git", "archive", BEFORE, "asa", "configs"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"this checkout has no commit {BEFORE} to make a run with")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as opened:
        opened.extractall(folder, filter="data")

    def run(command: str, *arguments: str) -> None:
        code = [sys.executable, "-m", "asa", command, *arguments]
        env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(code, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="module")
def runs(earlier, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining and a fine-tuning of the earlier version, two steps each."""
    out = tmp_path_factory.mktemp("runs")
    earlier("pretrain", f"data.store={store}", f"out={out}/pre", "train.steps=2", *PRETRAIN)
    earlier("finetune", f"data.store={store}", f"out={out}/fine", f"init={out}/pre", "train.steps=2", *FINETUNE)
    return out


def settings(arguments: list[str]) -> dict:
    return {key.removeprefix("+"): yaml.safe_load(value) for key, value in (text.split("=") for text in arguments)}


@pytest.mark.slow
def test_a_run_is_resumed_to_the_same_bits(runs: Path, store: Path, tmp_path: Path) -> None:
    assert "asa.models.asa.asa_tiny" in (runs / "pre" / "config.yaml").read_text()
    chosen = settings(PRETRAIN)
    asa.pretrain(store, runs / "pre", **chosen | {"train.steps": 4})
    asa.pretrain(store, tmp_path / "whole", **chosen | {"train.steps": 4})
    resumed, whole = (load_file(find_weights(run)) for run in (runs / "pre", tmp_path / "whole"))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_checkpoints_load_and_predict(runs: Path, raw: Path, tmp_path: Path) -> None:
    assert asa.load_encoder(runs / "pre").img_size == (32, 32, 32)
    assert asa.load_model(runs / "fine").out_channels == 4
    asa.predict(runs / "fine", raw / "s0_T1.nii.gz", tmp_path / "out")
    assert (tmp_path / "out" / "s0_T1.nii.gz").is_file()


@pytest.mark.slow
def test_a_bundle_predicts_what_the_checkpoint_does(runs: Path, earlier, raw: Path, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    earlier("export", f"checkpoint={runs}/fine", f"out={tmp_path}/bundle", "format=bundle")
    parser = ConfigParser()
    parser.read_config(tmp_path / "bundle" / "configs" / "inference.json")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "s0.nii.gz").write_bytes((raw / "s0_T1.nii.gz").read_bytes())
    parser["bundle_root"], parser["dataset_dir"] = str(tmp_path / "bundle"), str(tmp_path / "scans")
    parser["output_dir"], parser["device"] = str(tmp_path / "by_bundle"), "cpu"
    parser.get_parsed_content("evaluator").run()
    asa.predict(runs / "fine", tmp_path / "scans", tmp_path / "by_asa", predict={"device": "cpu"})
    one, other = (read_image(tmp_path / name / "s0.nii.gz").data for name in ("by_bundle", "by_asa"))
    np.testing.assert_array_equal(one, other)


def test_old_names_are_built_as_the_new_ones() -> None:
    from asa.models.masked_autoencoder import asa_tiny

    sizes = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}
    model = build({"_target_": "asa.models.asa.asa_tiny", **sizes})
    assert type(model) is type(asa_tiny(**sizes))
    assert type(build({"_target_": "asa.data.stages.PrepareSettings"})).__module__ == "asa.data.preprocessing.steps"
