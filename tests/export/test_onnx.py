"""ONNX: exported networks compute the same as in PyTorch."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from asa.cli import export as command
from asa.config import build
from asa.export import onnx as export
from asa.export.onnx import export_onnx
from asa.training.checkpoint import load_model, save_checkpoint

ENCODER = dict(embed_dim=24, depth=2, num_heads=2, window=6, patch_size=8, in_channels=2)


def checkpoint(folder: Path, name: str, **overrides: object) -> Path:
    torch.manual_seed(0)
    node = {"_target_": f"asa.models.{name}", **ENCODER, **overrides}
    shell = nn.Module()
    shell.model = build(node)
    data = {"channels": ["t1", "t2"], "labels": {1: "csf"}, "prepare": {"crop": "none"}, "train_scans": ["ab12"]}
    save_checkpoint(folder, 1, shell, {"model": node, "data": data}, {}, keep=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "own"), [("unet.unet_tiny", {"feature_size": 2}), ("vit_seg.vit_conv_tiny", {"width": 4})]
)
def test_a_segmentation_network_computes_the_same_in_onnx_for_any_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, own: dict[str, int]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    size = dict(img_size=[64, 32, 32], out_channels=2, order="alternating", bias="grid")
    run = checkpoint(tmp_path / "run", name, **size, **own)
    monkeypatch.setattr(sys, "argv", ["asa-export", f"checkpoint={run}", f"out={tmp_path}/net.onnx"])
    assert command.main() == 0
    assert "differ from PyTorch's by at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        image = torch.randn(batch, 2, 64, 32, 32)
        with torch.inference_mode():
            expected = load_model(run)(image).numpy()
        (actual,) = session.run(["logits"], {"image": image.numpy()})
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    metadata = session.get_modelmeta().custom_metadata_map["asa"]
    assert json.loads(metadata)["window"] == [64, 32, 32] and json.loads(metadata)["labels"] == {"1": "csf"}
    assert "ab12" not in metadata


@pytest.mark.slow
def test_the_encoder_of_a_pretraining_is_exported_and_a_deviating_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    settings = dict(img_size=[16, 24, 16], decoder_depth=1, order="alternating", bias="grid")
    run = checkpoint(tmp_path / "run", "masked_autoencoder.asa_tiny", **settings)
    assert export_onnx(run, tmp_path / "encoder.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == "tokens" and session.get_outputs()[0].shape[1:] == [12, 24]
    content = (tmp_path / "encoder.onnx").read_bytes()
    monkeypatch.setattr(export, "_onnx", lambda *_: content)
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="differ from PyTorch's"):
        export_onnx(run, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_outputs_that_are_not_finite_in_onnx_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Session:
        def __init__(self, content: bytes, providers: list[str]) -> None:
            pass

        def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((len(inputs["image"]), 12, 24), np.nan, np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(export, "_onnx", lambda *_: b"")
    run = checkpoint(tmp_path / "run", "masked_autoencoder.asa_tiny", img_size=[16, 24, 16], decoder_depth=1)
    with pytest.raises(ValueError, match="differ from PyTorch's by nan; nothing was written"):
        export_onnx(run, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_a_missing_package_and_a_wrong_file_ending_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.onnx"):
        export_onnx(tmp_path, tmp_path / "net.pt")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is not installed.*asa-mri\[export\]"):
        export_onnx(tmp_path, tmp_path / "net.onnx")
