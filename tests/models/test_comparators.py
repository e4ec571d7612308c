"""Laws of the published networks to compare with."""

import sys
from pathlib import Path

import pytest
import torch

from asa.models import create_model
from asa.training.checkpoint import load_encoder, load_model, save_checkpoint

NAMES = ("unetr", "swin_unetr")
SIZE = (32, 32, 64)


@pytest.mark.parametrize(("name", "millions"), [("unetr", 92.78), ("swin_unetr", 62.19)])
def test_the_published_sizes_have_their_parameters_and_are_built_without_memory(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(f"{name}_base", out_channels=14, img_size=96)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"{name}_tiny", out_channels=3, img_size=SIZE, in_channels=2)
    (logits,) = model(torch.rand(1, 2, *SIZE), deep_supervision=True)
    assert logits.shape == (1, 3, *SIZE)
    logits.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_computes_in_float32_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    model, volume = create_model(f"{name}_tiny", out_channels=2, img_size=SIZE).eval(), torch.rand(1, 1, *SIZE)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(volume)
    assert logits.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(logits, model(volume))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_rebuilds_the_network_and_a_changed_size_is_refused(tmp_path: Path, name: str) -> None:
    own = {"out_channels": 2, "img_size": list(SIZE), "in_channels": 1}
    shell = torch.nn.Module()
    shell.model = create_model(f"{name}_tiny", **own)
    node = {"_target_": f"asa.models.comparators.{name}_tiny", **own}
    save_checkpoint(tmp_path / "a", 1, shell, {"model": node, "data": {}}, {}, keep=1)
    loaded = load_model(tmp_path / "a").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in shell.model.state_dict().items())
    with pytest.raises(ValueError, match="this network has no encoder"):
        load_encoder(tmp_path / "a")
    save_checkpoint(tmp_path / "b", 1, shell, {"model": {**node, "in_channels": 9}, "data": {}}, {}, keep=1)
    with pytest.raises(ValueError, match="does not match the model"):
        load_model(tmp_path / "b")


def test_volumes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="not a whole number of patches of 16"):
        create_model("unetr_tiny", out_channels=2, img_size=40)
    with pytest.raises(ValueError, match="larger than 32"):
        create_model("swin_unetr_tiny", out_channels=2, img_size=32)
    with pytest.raises(ValueError, match="takes volumes of shape"):
        create_model("unetr_tiny", out_channels=2, img_size=32)(torch.rand(1, 1, 32, 32, 48))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_einops_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match="swin"):
        create_model(f"{name}_tiny", out_channels=2, img_size=64)
