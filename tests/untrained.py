"""An untrained segmentation network as a checkpoint, a scan for it, and its prediction."""

import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from asa.config import build
from asa.data.io.nifti import write_image
from asa.inference.segmentation import PredictSettings, Segmenter
from asa.training.checkpoint import save_checkpoint

WINDOW = [32, 32, 64]
DATA = {
    "channels": ["t1"],
    "labels": {1: "left_x", 2: "right_x", 5: "middle"},
    "prepare": {"crop": "foreground"},
    "lateral_pairs": [["left_x", "right_x"]],
    "spacing": [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
}
SETTINGS = PredictSettings(device="cpu", overlap=0.25)


def metadata(**data: Any) -> dict[str, Any]:
    """`DATA` with changes, of which resampling also changes the voxel size."""
    edge = data.get("prepare", {}).get("spacing") or 1.0
    return {**DATA, "spacing": [[edge] * 3] * 2, **data}


def checkpoint(folder: Path, seed: int = 0, out_channels: int = 4, **data: object) -> Path:
    """An untrained network as asa-finetune saves it. NumPy draws its weights: PyTorch's differ between processors."""
    rng = np.random.default_rng(seed)
    node: dict[str, object] = dict(_target_="asa.models.unet.unet_tiny", out_channels=out_channels, in_channels=1)
    node |= dict(feature_size=4, img_size=WINDOW)
    shell = nn.Module()
    shell.model = build(node)
    with torch.no_grad():
        for name, weight in shell.named_parameters():
            if weight.ndim > 1 or name.endswith("bias"):
                fan_in = weight[0].numel() if weight.ndim > 1 else 16
                weight.copy_(torch.from_numpy(rng.normal(0, fan_in**-0.5, tuple(weight.shape))))
    save_checkpoint(folder, 1, shell, {"model": node, "task": "segmentation", "data": metadata(**data)}, {}, keep=1)
    return folder


def a_scan(folder: Path, name: str = "a") -> Path:
    """An ellipsoid of noise without any symmetry."""
    rng = np.random.default_rng(0)
    grid = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in (30, 42, 28)), indexing="ij")
    inside = sum(axis**2 for axis in grid) < 1
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])  # LAS
    write_image(folder / f"{name}.nii.gz", np.where(inside, rng.uniform(100, 900, inside.shape), 0), affine)
    return folder / f"{name}.nii.gz"


def predicted(segmenter: Segmenter, path: Path, probabilities: Path | None = None) -> np.ndarray:
    out = path.with_name("prediction.nii.gz")
    segmenter.segment_file({"t1": path}, out, probabilities=probabilities)
    return voxels(out)


def voxels(path: Path) -> np.ndarray:
    """The array of a file, (x, y, z)."""
    return np.asarray(nibabel.load(path).dataobj)


def call(module, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["asa", *map(str, arguments)])
    return module.main()
