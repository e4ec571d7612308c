"""Segmentation with cross-attention to the mirror image: networks, windows, and the commands."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asa.cli import finetune, predict, pretrain
from asa.data.io.nifti import read_image, read_label
from asa.inference.segmentation import PredictSettings, sliding_window
from asa.methods.segment import Segmentation
from asa.models.sa_swin_unet import SASwinUNet, sa_swin_unet_tiny
from asa.models.unet import unet_tiny
from asa.training.checkpoint import load_model

SMALLEST = dict(embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2)
OPTIONS = ("+model.embed_dim=4", "+model.num_heads=[1,1,2,2]", "+model.window=2", "+model.cross_heads=2")


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "asa":
        options = dict(embed_dim=12, depth=2, num_heads=2, feature_size=2)
        return unet_tiny(3, img_size=(32, 32, 64), symmetry=True, **options)
    across = {3: 2} if kind == "two levels" else None
    return sa_swin_unet_tiny(3, img_size=(32, 32, 64), across=across, position=kind == "encoding", **SMALLEST)


@pytest.mark.parametrize("kind", ["asa", "one level", "two levels", "encoding"])
def test_every_parameter_gets_a_gradient_and_every_logit_depends_on_the_mirror_image(kind: str) -> None:
    model, volume = network(kind), torch.rand(2, 1, 32, 32, 64, generator=torch.Generator().manual_seed(0))
    method = Segmentation(model=model)
    assert method.mirrored
    label = torch.arange(3).repeat_interleave(22)[:64].expand(2, 1, 32, 32, 64)
    method({"image": volume, "mirror": volume.flip(-1), "label": label})["loss"].backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # Instance norms remove the constant that the bias of a convolution or a block adds to a channel.
    assert [name for name in without if not name.endswith("bias")] == []
    with torch.no_grad():
        logits, other = model(volume, mirrored=volume.flip(-1)), model(volume, mirrored=volume)
    assert logits.shape == (2, 3, 32, 32, 64)
    assert (logits != other).float().mean() > 0.99
    with pytest.raises(ValueError, match="pass both"):
        model(volume)


class Queries(nn.Module):
    """In place of a cross-attention: returns the tokens that ask."""

    def forward(self, f: Tensor, counterpart: Tensor, grid: object = None) -> Tensor:
        return f


@pytest.mark.parametrize("kind", ["asa", "one level", "two levels"])
def test_the_volume_asks_and_its_mirror_image_answers(kind: str) -> None:
    model = network(kind).eval()
    volume, mirrored = torch.rand(2, 1, 1, 32, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(model(volume, mirrored=mirrored), model(volume, mirrored=volume))
        model.saca = Queries()
        for level in getattr(model, "across", ()):
            model.across[level] = Queries()
        assert torch.equal(model(volume, mirrored=mirrored), model(volume, mirrored=volume))


def test_without_symmetry_the_u_net_has_no_cross_attention() -> None:
    options = dict(img_size=(32, 32, 64), embed_dim=12, depth=2, num_heads=2, feature_size=2)
    names = {name for name, _ in unet_tiny(3, **options).named_parameters()}
    assert not unet_tiny(3, **options).mirrored and not [name for name in names if "saca" in name]
    more = {name for name, _ in unet_tiny(3, symmetry=True, **options).named_parameters()} - names
    assert more and all(name.startswith("saca.") for name in more)


def test_invalid_sizes_and_levels_raise_an_error() -> None:
    with pytest.raises(ValueError, match="larger than 32"):
        sa_swin_unet_tiny(3, img_size=32, **SMALLEST)
    with pytest.raises(ValueError, match="names level 7"):
        sa_swin_unet_tiny(3, img_size=64, across={7: 2}, **SMALLEST)


class Across(nn.Module):
    """A network that returns the mirror image's window."""

    mirrored = True

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(img_size=(8, 8, 8))
        self.anywhere = nn.Parameter(torch.zeros(1))

    def forward(self, volume: Tensor, mirrored: Tensor) -> Tensor:
        return mirrored.clone()  # MONAI multiplies it in place


@pytest.mark.parametrize("width", [5, 8, 13, 20])
def test_every_window_is_paired_with_the_mirrored_window(width: int) -> None:
    volume = torch.rand(2, 9, 12, width, generator=torch.Generator().manual_seed(0))
    found = sliding_window(Across(), volume, PredictSettings(device="cpu"))
    torch.testing.assert_close(found, volume.flip(-1))


@pytest.mark.parametrize("kind", ["sa_swin", "asa"])
def test_pretraining_fine_tuning_and_prediction_run_in_sequence(
    kind: str, store: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def run(command, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["asa", *map(str, arguments)])
        return command.main()

    common = [
        f"data.store={store}", "crop=[32,32,64]", "train.steps=1", "train.batch_size=1", "optim.warmup=0",
        "loader.workers=0", "train.device=cpu", "data.split.validation=1",
    ]  # fmt: skip
    if kind == "sa_swin":
        models = ["model=sa_swin_tiny", "method=sa_swin", *OPTIONS], ["model=sa_swin_unet_tiny", *OPTIONS]
    else:
        sizes = ["+model.embed_dim=12", "+model.depth=2", "+model.num_heads=2"]
        models = ["model=asa_tiny", *sizes], ["model=unet_tiny", "model.symmetry=true", "+model.feature_size=2", *sizes]
    assert run(pretrain, *common, f"out={tmp_path / 'pretrained'}", *models[0]) == 0
    arguments = [*common, f"out={tmp_path / 'run'}", f"init={tmp_path / 'pretrained'}", "data.split.test=1", *models[1]]
    assert run(finetune, *arguments, "predict.overlap=0") == 0
    shown = capsys.readouterr().out
    assert "loaded" in shown and "dice" in shown
    model = load_model(tmp_path / "run")
    assert model.mirrored and isinstance(model, SASwinUNet) == (kind == "sa_swin")
    scan = raw / "s0_T1.nii.gz"
    options = ("predict.device=cpu", "predict.overlap=0")
    assert run(predict, f"checkpoint={tmp_path / 'run'}", f"input={scan}", f"out={tmp_path / 'out'}", *options) == 0
    label = read_label(tmp_path / "out/s0_T1.nii.gz")
    assert label.data.shape == read_image(scan).data.shape and set(np.unique(label.data)) <= {0, 1, 2, 5}
