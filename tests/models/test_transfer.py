"""The transfer of a pretrained encoder: the loaded encoder computes the same as before."""

import sys
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNETR, ViT, ViTAutoEnc
from torch import nn

from asa.cli import finetune
from asa.config import build
from asa.models.sw_vit import SWViT
from asa.models.transfer import (
    Source,
    from_monai,
    plan_transfer,
    transfer_encoder,
    transfer_report,
    transfer_table,
)
from asa.ops.patches import patchify
from asa.training.checkpoint import save_checkpoint
from asa.training.pretrained import read_source


def encoder(**overrides: object) -> SWViT:
    return SWViT(**{**dict(img_size=64, embed_dim=24, depth=4, num_heads=2, window=8), **overrides})


def source_of(model: SWViT) -> Source:
    head = {"decoder.0.weight": torch.zeros(2)}
    weights = {f"encoder.{name}": tensor.clone() for name, tensor in model.state_dict().items()} | head
    return Source(weights, model.patch_size)


def test_an_encoder_of_the_same_kind_is_loaded_whole() -> None:
    source, target = encoder(), encoder(img_size=(32, 64, 32))
    plan = transfer_encoder(source_of(source), target)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert {entry.action for entry in plan} == {"loaded", "left out"}
    assert [entry.name for entry in plan if entry.action == "left out"] == ["decoder.0.weight"]
    assert "loaded" in transfer_report(plan) and "not part of the encoder" in transfer_report(plan)


@pytest.mark.parametrize(("before", "now"), [(1, 4), (3, 3), (4, 1), (2, 3)])
def test_with_other_channels_equal_channels_give_the_same_tokens(before: int, now: int) -> None:
    source, target = encoder(img_size=16, in_channels=before), encoder(img_size=16, in_channels=now)
    plan = transfer_encoder(source_of(source), target)
    adapted = [entry.name for entry in plan if entry.action == "adapted"]
    assert adapted == (["encoder.patch_embed.weight"] if before != now else [])
    volume = torch.rand(1, 1, 16, 16, 16)
    here, there = (net(volume.expand(-1, net.in_channels, -1, -1, -1)) for net in (target, source))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("before", "now"), [(4, 8), (8, 12), (8, 16)])
def test_larger_patches_give_enlarged_patches_the_same_tokens(before: int, now: int) -> None:
    source = encoder(img_size=2 * before, patch_size=before, in_channels=2)
    target = encoder(img_size=2 * now, patch_size=now, in_channels=2)
    plan = transfer_encoder(source_of(source), target)
    (adapted,) = (entry for entry in plan if entry.action == "adapted")
    assert adapted.why == f"patches of {before} to {now} voxels, resampled"
    patches = torch.rand(8, 2, before, before, before)
    larger = nn.functional.interpolate(patches, size=now, mode="trilinear")
    expected = source.patch_embed(patchify(patches, before))
    torch.testing.assert_close(target.patch_embed(patchify(larger, now)), expected, atol=1e-5, rtol=1e-5)


def test_smaller_patches_give_smooth_patches_tokens_close_to_before() -> None:
    source, target = encoder(img_size=16, patch_size=8), encoder(img_size=16, patch_size=4)
    transfer_encoder(source_of(source), target)
    ramp = torch.linspace(-1, 1, 8)
    patch = (ramp[:, None, None] + 2 * ramp[:, None] - ramp)[None, None]
    smaller = nn.functional.interpolate(patch, size=4, mode="trilinear")
    here, there = target.patch_embed(patchify(smaller, 4)), source.patch_embed(patchify(patch, 8))
    assert nn.functional.cosine_similarity(here.flatten(), there.flatten(), dim=0) > 0.8


@pytest.mark.parametrize("window", [4, 16, 7])
def test_another_window_keeps_the_bias_of_the_offsets_in_both(window: int) -> None:
    source, target = encoder(), encoder(window=window)
    plan = transfer_encoder(source_of(source), target)
    adapted = [entry for entry in plan if entry.action == "adapted"]
    assert len(adapted) == 4 and all(entry.why.startswith(f"window 8 to {window}, the out") for entry in adapted)
    for one, other in zip(source.blocks, target.blocks, strict=True):
        old, new = one.attention.relative_position_bias, other.attention.relative_position_bias
        for offset in range(-window + 1, window):
            nearest = min(max(offset, -7), 7)
            assert torch.equal(new[:, offset + window - 1], old[:, nearest + 7])


def test_a_sequence_that_fits_both_windows_has_the_same_tokens() -> None:
    # 8 tokens: one window of 8, or a part of one of 16.
    source, target = encoder(img_size=16, depth=1), encoder(img_size=16, depth=1, window=16)
    transfer_encoder(source_of(source), target)
    volume = torch.rand(2, 1, 16, 16, 16)
    torch.testing.assert_close(target(volume), source(volume), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("other", [dict(depth=5), dict(embed_dim=12), dict(num_heads=4)])
def test_an_encoder_that_does_not_match_raises_an_error_and_loads_nothing(other: dict[str, int]) -> None:
    target = encoder(**other)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match="does not match"):
        transfer_encoder(source_of(encoder()), target)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    plan = plan_transfer(source_of(encoder()), target)
    assert any(entry.action in ("left out", "not found") for entry in plan)


MONAI = dict(in_channels=1, img_size=(16, 16, 16), hidden_size=24, mlp_dim=96, num_heads=2)


def monai_vit(proj_type: str = "conv", **overrides: object) -> ViT:
    torch.manual_seed(0)
    vit = ViT(**{**MONAI, **dict(patch_size=(8, 8, 8), num_layers=2, proj_type=proj_type), **overrides}).eval()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)
    return vit


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_with_one_window_and_equal_positions_monai_computes_the_same(proj_type: str, qkv_bias: bool) -> None:
    vit = monai_vit(proj_type, qkv_bias=qkv_bias)
    target = encoder(img_size=16, depth=2, window=8).eval()  # 8 tokens: one window, but for the shifted block
    target.blocks[1].attention.shift = 0
    transfer_encoder(from_monai(vit.state_dict()), target)
    turned = target.position.reshape(2, 2, 2, -1).permute(2, 1, 0, 3)  # z y x -> x y z
    vit.patch_embedding.position_embeddings = nn.Parameter(turned.reshape(1, 8, -1))
    volume = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        theirs = vit(volume.permute(0, 1, 4, 3, 2))[0].reshape(2, 2, 2, -1).permute(2, 1, 0, 3).reshape(1, 8, -1)
        torch.testing.assert_close(target(volume), theirs, atol=1e-4, rtol=1e-4)


def test_networks_that_contain_a_vit_are_recognised() -> None:
    networks = [
        ViTAutoEnc(1, (16, 16, 16), (4, 4, 4), hidden_size=24, mlp_dim=96, num_layers=12, num_heads=2),
        UNETR(out_channels=2, **MONAI),
        nn.ModuleDict({"module": ViT(patch_size=(8, 8, 8), num_layers=12, **MONAI)}),
    ]
    for model, patch in zip(networks, (4, 16, 8), strict=True):
        target = encoder(depth=12, patch_size=patch)
        plan = transfer_encoder(from_monai(model.state_dict()), target)
        by_name = {entry.name: entry for entry in plan}
        assert by_name["encoder.blocks.3.attention.proj.weight"].source.endswith("blocks.3.attn.out_proj.weight")
        assert by_name["encoder.blocks.3.mlp.0.bias"].action == "loaded"
        assert "x y z" in by_name["encoder.patch_embed.weight"].why
        assert by_name["encoder.blocks.0.attention.relative_position_bias"].why.startswith("0,")
        (left,) = (entry for entry in plan if entry.source.endswith("position_embeddings"))
        assert left.action == "left out" and left.why == "positions are computed here"


def test_the_table_has_one_line_per_tensor() -> None:
    target = encoder(in_channels=2, window=4)
    plan = plan_transfer(source_of(encoder()), target)
    lines = transfer_table(plan, target).splitlines()
    assert len(lines) == 1 + len(plan) + 1
    assert [word in lines[0] for word in ("tensor", "in the checkpoint", "action", "why")] == [True] * 4
    for name in target.state_dict():
        assert sum(line.startswith(f"encoder.{name} ") for line in lines) == 1


def test_a_pt_file_is_read_unless_it_could_run_code(tmp_path: Path) -> None:
    vit = monai_vit()
    for content in (vit.state_dict(), {"epoch": 3, "state_dict": vit.state_dict()}):
        torch.save(content, tmp_path / "vit.pt")
        source, description = read_source(tmp_path / "vit.pt")
        assert description == {} and source.patch_size == 8
    torch.save(vit, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"whole\.pt: .*could run code.*state_dict"):
        read_source(tmp_path / "whole.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: no ViT with MONAI"):
        read_source(tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: no named tensors"):
        read_source(tmp_path / "list.pt")


def tuned(monkeypatch: pytest.MonkeyPatch, store: Path, out: Path, *arguments: str) -> int:
    fixed = [
        f"data.store={store}", f"out={out}", "data.split={validation: 0, test: 1}", "model=unet_tiny",
        "+model.feature_size=4", "crop=[64,32,32]", "train.steps=1", "train.batch_size=1", "loader.workers=0",
        "train.device=cpu", "optim.warmup=0",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["asa-finetune", *fixed, *arguments])
    return finetune.main()


def test_explain_prints_the_plan_and_trains_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = dict(
        _target_="asa.models.masked_autoencoder.asa_tiny", in_channels=1, img_size=32, patch_size=4, position="mirror"
    )
    shell = nn.Module()
    shell.model = build(node)
    save_checkpoint(tmp_path / "pre", 1, shell, {"model": node, "data": {}}, {}, keep=1)
    assert tuned(monkeypatch, store, tmp_path / "run", f"init={tmp_path}/pre", "transfer=explain") == 0
    shown = capsys.readouterr().out
    assert "patches of 4 to 8 voxels, resampled" in shown and "decoder.0.norm1.weight" in shown
    assert "for the grid of 8 x 4 x 4 tokens" in shown and "nothing was trained" in shown
    assert not (tmp_path / "run").exists()
    explained = [f"init={tmp_path}/pre", "transfer=explain", "+model.num_heads=6"]
    assert tuned(monkeypatch, store, tmp_path / "run", *explained) == 0
    assert "refused: " in capsys.readouterr().out
    assert tuned(monkeypatch, store, tmp_path / "run", "transfer=explain") == 1
    assert "give init=" in capsys.readouterr().err


def test_fine_tuning_starts_from_a_vit_of_monai(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = ViT(1, (32, 32, 32), (8, 8, 8), hidden_size=96, mlp_dim=384, num_layers=4, num_heads=3)
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    assert tuned(monkeypatch, store, tmp_path / "run", f"init={tmp_path}/vit.pth") == 0
    shown = capsys.readouterr().out
    assert "axes x y z turned to z y x" in shown and "does not hold its training subjects" in shown
    assert "does not contain its number of heads: 3 assumed" in shown
    assert "transfer" not in (tmp_path / "run" / "config.yaml").read_text()
