"""MONAI bundles: MONAI runs them, and the label maps equal those of asa-predict."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, run, verify_net_in_out
from torch import nn

from asa.cli import export as command
from asa.config import build
from asa.data.io.nifti import read_image, read_label, write_image
from asa.export.monai_bundle import export_bundle
from asa.inference.segmentation import PredictSettings, Segmenter
from asa.training.checkpoint import save_checkpoint

WINDOW = [32, 32, 64]
DATA = {
    "channels": ["t1", "t2"],
    "labels": {"1": "csf", "2": "gm", "5": "wm"},
    "prepare": {"crop": "foreground", "spacing": 1.3},
    "train_scans": ["ab12"],
}
REGIONS = {"regions": [["whole", [1, 2, 5]], ["core", [2, 5]], ["inner", [5]]]}


def checkpoint(folder: Path, model: dict | None = None, **data: object) -> Path:
    """An untrained network as asa-finetune saves it."""
    torch.manual_seed(0)
    data = {**DATA, **data}
    outputs = len(data.get("regions", {})) or 4
    node = dict(_target_="asa.models.unet.unet_tiny", out_channels=outputs, feature_size=4, img_size=WINDOW)
    node = {**node, "in_channels": len(data["channels"]), **(model or {})}
    shell = nn.Module()
    shell.model = build(node)
    save_checkpoint(folder, 1, shell, {"model": node, "data": data}, {}, keep=1)
    return folder


def write_scan(folder: Path, channels: list[str]) -> dict[str, Path]:
    """An ellipsoid of noise in LPS orientation on anisotropic voxels, one file per channel."""
    rng = np.random.default_rng(0)
    grid = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in (24, 34, 26)), indexing="ij")
    inside, affine = sum(axis**2 for axis in grid) < 1, np.diag([-1.0, -1.0, 1.2, 1.0])
    files = {name: folder / f"a_{name}.nii.gz" for name in channels}
    for file in files.values():
        write_image(file, np.where(inside, rng.uniform(100, 900, inside.shape), 0), affine)
    return files


@pytest.mark.parametrize("data", [{"overlap": 0.7}, {**REGIONS, "channels": ["t1"]}], ids=["classes", "regions"])
def test_monai_runs_a_bundle_and_its_label_maps_equal_those_of_asa_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: dict
) -> None:
    trained, bundle = checkpoint(tmp_path / "run", **data), tmp_path / "bundle"
    monkeypatch.setattr(sys, "argv", ["asa-export", f"checkpoint={trained}", f"out={bundle}", "format=bundle"])
    assert command.main() == 0 and "docs/README.md" in capsys.readouterr().out
    files = write_scan(tmp_path / "scans", data.get("channels", DATA["channels"]))
    config = str(bundle / "configs" / "inference.json")
    places = {"bundle_root": str(bundle), "dataset_dir": str(tmp_path / "scans"), "output_dir": str(tmp_path / "out")}
    run(config_file=config, device="$torch.device('cpu')", probabilities=True, **places)
    Segmenter(trained, PredictSettings(device="cpu")).segment_file(files, tmp_path / "asa.nii.gz")
    (written,) = (tmp_path / "out").glob("*.nii.gz")
    found, expected = read_label(written), read_label(tmp_path / "asa.nii.gz")
    assert written.name == ("a_t1.nii.gz" if len(files) == 1 else "a.nii.gz")
    assert np.array_equal(found.data, expected.data) and np.array_equal(found.affine, expected.affine)
    assert len(np.unique(found.data)) > 1
    probabilities = [read_image(file).data for file in sorted((tmp_path / "out" / "probabilities").rglob("*.nii.gz"))]
    assert len(probabilities) == (3 if "regions" in data else 4)


def test_a_bundle_has_the_files_and_keys_that_monai_expects(tmp_path: Path) -> None:
    export_bundle(checkpoint(tmp_path / "run"), tmp_path / "bundle")
    config, metadata = (str(tmp_path / "bundle" / "configs" / f"{name}.json") for name in ("inference", "metadata"))
    write_scan(tmp_path / "scans", DATA["channels"])
    places = {"bundle_root": str(tmp_path / "bundle"), "dataset_dir": str(tmp_path / "scans")}
    workflow = ConfigWorkflow(config, workflow_type="infer", **places)
    workflow.initialize()
    assert workflow.check_properties() == [] and workflow.channel_def["3"] == "wm"
    verify_net_in_out(net_id="network_def", config_file=config, meta_file=metadata, device="cpu")
    content = json.loads(Path(metadata).read_text())
    required = "schema version monai_version pytorch_version numpy_version required_packages_version task description"
    assert {*required.split(), "authors", "copyright", "network_data_format"} <= content.keys()
    tensor = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}
    for side, name in (("inputs", "image"), ("outputs", "pred")):
        assert tensor <= content["network_data_format"][side][name].keys()
    for file in ("LICENSE", "docs/README.md", "models/model.pt"):
        assert (tmp_path / "bundle" / file).is_file()
    assert not any("ab12" in path.read_text() for path in (tmp_path / "bundle").rglob("*.json"))


def test_networks_that_cannot_be_a_bundle_are_rejected(tmp_path: Path) -> None:
    def rejected(words: str, run: Path) -> None:
        with pytest.raises(ValueError, match=words):
            export_bundle(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    pretraining = dict(
        _target_="asa.models.masked_autoencoder.asa_tiny", img_size=[16, 24, 16], decoder_depth=1, embed_dim=24
    )
    torch.manual_seed(0)
    shell = nn.Module()
    shell.model = build(pretraining)
    save_checkpoint(tmp_path / "pre", 1, shell, {"model": pretraining, "data": {"channels": ["t1"]}}, {}, keep=1)
    rejected("holds a segmentation network", tmp_path / "pre")
    rejected("cross-attends to the mirror image", checkpoint(tmp_path / "mirrored", {"symmetry": True}))
    code = checkpoint(tmp_path / "code", labels={"1": "$__import__('os').abort()", "2": "gm", "5": "wm"})
    rejected("which MONAI reads as code", code)


def test_a_folder_with_other_content_is_rejected(tmp_path: Path) -> None:
    trained, out = checkpoint(tmp_path / "run"), tmp_path / "out"
    for _ in range(2):  # a bundle may be overwritten
        export_bundle(trained, out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not a bundle"):
        export_bundle(trained, tmp_path / "notes")
