"""Laws of the published networks to compare with."""

import sys
from pathlib import Path

import pytest
import torch

from asa.baselines.nnformer import SkipBlock
from asa.models import create_model
from asa.training.checkpoint import load_encoder, load_model, save_checkpoint

NAMES = ("unetr", "swin_unetr", "nnformer", "transbts", "resenc", "primus")
SIZE = (32, 32, 64)
# Classes, channels, crop and parameters of the published sizes, each at a setting of which a figure is known (see the
# functions).
PUBLISHED = {
    "unetr_base": (14, 1, 96, 92_784_046),
    "swin_unetr_base": (14, 1, 96, 62_187_296),
    "nnformer_base": (14, 1, 128, 150_656_322),
    "transbts_base": (4, 4, 128, 32_723_492),
    "resenc_l": (1, 1, 160, 102_348_965),
    "primus_m": (14, 1, 96, 147_661_030),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_their_parameters_and_are_built_without_memory(name: str) -> None:
    classes, channels, crop, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name, out_channels=classes, img_size=crop, in_channels=channels)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_resenc_is_planned_for_crops_of_160_voxels() -> None:
    with torch.device("meta"):
        assert create_model("resenc_l", out_channels=2).encoder.img_size == (160, 160, 160)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"{name}_tiny", out_channels=3, img_size=SIZE, in_channels=2).eval()  # no block is dropped
    with torch.no_grad():
        for parameter in model.parameters():  # some norms start at 0, and hide the convolution below them
            parameter.add_(0.01 * torch.randn_like(parameter))
    scales = model(torch.rand(1, 2, *SIZE), deep_supervision=True)
    assert [tuple(one.shape) for one in scales] == [(1, 3, *(n >> level for n in SIZE)) for level in range(len(scales))]
    torch.stack([logits.square().sum() for logits in scales]).sum().backward()
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
    node = {"_target_": f"asa.baselines.{name}_tiny", **own}
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
    with pytest.raises(ValueError, match="not a whole number of patches of 32"):
        create_model("nnformer_tiny", out_channels=2, img_size=48)
    with pytest.raises(ValueError, match="not a whole number of patches of 8"):
        create_model("primus_tiny", out_channels=2, img_size=12)
    with pytest.raises(ValueError, match="larger than 16"):
        create_model("resenc_tiny", out_channels=2, img_size=16)
    with pytest.raises(ValueError, match="larger than 8"):
        create_model("transbts_tiny", out_channels=2, img_size=8)
    with pytest.raises(ValueError, match="takes volumes of shape"):
        create_model("unetr_tiny", out_channels=2, img_size=32)(torch.rand(1, 1, 32, 32, 48))


@pytest.mark.parametrize("name", ["unetr", "swin_unetr", "transbts"])
def test_a_missing_einops_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match="swin"):
        create_model(f"{name}_tiny", out_channels=2, img_size=64)


def test_skip_attention_reads_the_same_window_of_the_encoder() -> None:
    torch.manual_seed(0)
    block = SkipBlock(8, 2, (2, 2, 3), (0, 0, 0), drop_path=0.0)
    up, skip = torch.randn(2, 1, 4, 2, 6, 8).unbind()
    out = up + skip
    for d, h, w in ((d, 0, w) for d in (0, 2) for w in (0, 3)):
        window = (slice(None), slice(d, d + 2), slice(h, h + 2), slice(w, w + 3))
        q = block.norm1(up[window]).reshape(12, 2, 4)  # tokens heads width
        k, v = block.attn.qkv(block.norm1(skip[window])).reshape(12, 2, 2, 4).unbind(1)
        scores = torch.einsum("qhc,khc->hqk", q, k) / 2
        places = [(a, b, c) for a in range(2) for b in range(2) for c in range(3)]
        for i, one in enumerate(places):
            for j, other in enumerate(places):
                a, b, c = (x - y for x, y in zip(one, other, strict=True))
                scores[:, i, j] += block.attn.relative_position_bias_table[((a + 1) * 3 + b + 1) * 5 + c + 2]
        attended = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).reshape(1, 2, 2, 3, 8)
        out[window] = out[window] + block.attn.proj(attended)
    torch.testing.assert_close(block(up, skip), out + block.mlp(block.norm2(out)))
