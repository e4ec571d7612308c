"""A task, a method and a network of a user's own package work in the commands as those of this package do."""

import csv
import sys
from pathlib import Path

import pytest

import asa
from asa.tasks.run import call
from asa.training.checkpoint import read_description

PACKAGE = '''
"""The volume of the brain, as a fraction of the scan: a regression from whole volumes."""

import csv
from pathlib import Path

import numpy as np
import torch
from torch import nn

from asa.data.io.files import write_json
from asa.data.loading.crops import CropDataset
from asa.inference.preprocessing import ScanPreprocessor, training_scan_metadata
from asa.tasks.prediction import only_checkpoint, predict_scans
from asa.tasks.volumes import open_store, set_model
from asa.training.checkpoint import read_model
from asa.training.plan import volume_batch


class Net(nn.Module):
    """The mean of linear features of a volume."""

    def __init__(self, img_size, in_channels=1, width=4):
        super().__init__()
        self.encoder = nn.Conv3d(in_channels, width, 8, 8)
        self.encoder.img_size, self.encoder.in_channels = (img_size,) * 3, in_channels
        self.head = nn.Linear(width, 1)

    def forward(self, volume):
        return self.head(self.encoder(volume).mean(dim=(2, 3, 4)))[:, 0]


class Regression(nn.Module):
    """Squared error of the fraction."""

    task = "brainvolume.BrainVolume"
    mirrored = False

    def __init__(self, *, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return {"loss": (self.model(batch["image"]) - batch["target"].float()).square().mean()}


class BrainVolume:
    """Brain volume from prepared scans."""

    command, units, cross_validates = "finetune", ("volumes", "scans"), False

    def __init__(self, config):
        self.config = config
        self.store, self.split, self.parts = open_store(config["data"], Path(config["out"]))
        ids = [record["id"] for record in self.store.records]
        self.targets = {id: {"target": float((self.store.image(id) > 0).mean())} for id in ids}
        set_model(config, in_channels=len(self.store.channels))

    def example(self, method, count):
        return volume_batch(method, count, target=True)

    def load_init(self, method):
        assert self.config["init"] is None

    def explain_init(self, method):
        raise ValueError("no transfer")

    def dataset(self, method):
        return self.crops(method, "train")

    def validation(self, method):
        crops = self.crops(method, "validation")

        def validate(step):
            errors = [method.model(crops[k, 0]["image"][None]) - crops[k, 0]["target"] for k in range(len(crops))]
            return {"error": float(torch.cat(errors).abs().mean())}, {}

        return validate

    def metadata(self):
        metadata = training_scan_metadata(self.parts["train"])
        return {"channels": self.store.channels, "prepare": self.store.settings, **metadata}

    def begin(self, run):
        print(f"regression in {run}")

    def finish(self, run, method, metrics):
        print(f"error {metrics['error']:.3f}")

    def crops(self, method, part):
        size = method.model.encoder.img_size
        return CropDataset(self.store, self.parts[part], size, attached=self.targets)

    @staticmethod
    def predict(config):
        predict_scans(Predictor(config), config)

    @staticmethod
    def evaluate(config):
        write_json(Path(config["out"]) / "summary.json", {"predictions": Path(config["predictions"]).name})


class Predictor:
    def __init__(self, config):
        checkpoint = only_checkpoint(config, "a volume")
        self.model, description = read_model(checkpoint, plugins=config["plugins"])
        self.preprocessor = ScanPreprocessor(checkpoint, description["data"], config["strip"])
        self.out = Path(config["out"])

    def predict_stored(self, id, image, chain, like):
        with torch.inference_mode():
            return float(self.model(torch.from_numpy(np.array(image, np.float32))[None]))

    def finish(self, found):
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "volumes.csv").open("w", newline="") as table:
            csv.writer(table).writerows(found.items())
        return "wrote volumes.csv"
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's package, importable, and a folder with its configurations."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "brainvolume.py").write_text(PACKAGE)
    mine = tmp_path / "mine"
    for folder in ("model", "method"):
        (mine / folder).mkdir(parents=True)
    (mine / "model" / "net.yaml").write_text("_target_: brainvolume.Net\nimg_size: ${crop}\nin_channels: null\n")
    method = "# @package _global_\nmethod:\n  _target_: brainvolume.Regression\n  model: ${model}\n"
    (mine / "method" / "volume.yaml").write_text(method)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield mine
    sys.modules.pop("brainvolume", None)


def test_a_task_of_another_package_is_planned_trained_and_asked_for_predictions(
    package: Path, store: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    chosen: dict = dict(
        config_dir=package, plugins=["brainvolume"], model="net", method="volume", crop=32,
        train=dict(steps=3, batch_size=1, log_every=1, device="cpu"), loader={"workers": 0}, optim={"warmup": 0},
        data={"split": {"validation": 1, "test": 1}},
    )  # fmt: skip
    assert asa.finetune(store, run, plan="only", plan_rate=1, **chosen) is None
    assert "total" in capsys.readouterr().out and not run.exists()
    assert asa.finetune(store, run, **chosen) == run
    assert "regression in" in (printed := capsys.readouterr().out) and "error 0." in printed
    assert read_description(run)["task"] == "brainvolume.BrainVolume"

    with pytest.raises(ValueError, match=r"package.module.Class with plugins=\[package\]"):
        asa.predict(run, store, tmp_path / "out")
    not_allowed = r"is not allowed: .* give a package of your own as plugins=\[mine\]"
    for plugins, said in (([], not_allowed), (["brainvolume"], "no encoder with tokens to read")):
        with pytest.raises(ValueError, match=said):
            call("embed", {"checkpoint": str(run), "input": str(store), "out": str(tmp_path), "plugins": plugins})
    for source, out, part in ((store, "stored", "test"), (raw / "s0_T1.nii.gz", "raw", None)):
        asa.predict(run, source, tmp_path / out, part=part, plugins=["brainvolume"])
        with (tmp_path / out / "volumes.csv").open(newline="") as table:
            assert len(list(csv.reader(table))) == 1
    evaluated = dict(policy="brainvolume.BrainVolume", plugins=["brainvolume"])
    assert asa.evaluate(tmp_path / "stored", store, tmp_path / "scores", **evaluated) == {"predictions": "stored"}


def test_a_method_that_names_no_task_is_refused(store: Path, tmp_path: Path, package: Path) -> None:
    text = (tmp_path / "code" / "brainvolume.py").read_text()
    (tmp_path / "code" / "brainvolume.py").write_text(text.replace('task = "brainvolume.BrainVolume"', ""))
    with pytest.raises(ValueError, match="names no task"):
        asa.finetune(
            store, tmp_path / "run", config_dir=package, plugins=["brainvolume"], model="net", method="volume", crop=32
        )


def test_each_method_is_trained_by_its_own_command(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asa-pretrain"):
        asa.finetune(store, tmp_path / "run", method="asa", model="asa_tiny", crop=32)
