"""Laws of loading nnssl's checkpoints: the encoder gives the features of the network that the file was written from.

The reference is written out here from the file's tensors by their names, and is the package
dynamic-network-architectures where it can be imported.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import asa
from asa.models import create_model
from asa.training.pretrained import load_pretrained, read_source

Features = Callable[[Tensor], Tensor]
SIZE = (32, 32, 64)
WIDTHS, BLOCKS = (8, 16, 32, 64, 64), (1, 1, 2, 2, 2)  # of resenc_tiny
WIDTH, DEPTH, HEADS = 144, 4, 4  # of primus_tiny
KEYS = {
    "resenc": {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"},
    "primus": {"key_to_encoder": "eva", "key_to_stem": "down_projection", "key_to_lpe": "eva.pos_embed"},
}


def resenc_weights() -> dict[str, Tensor]:
    weights = {}

    def conv_norm(name: str, before: int, after: int, kernel: int = 3, bias: bool = True) -> None:
        tensors = {"conv.weight": torch.randn(after, before, kernel, kernel, kernel) * (before * kernel**3) ** -0.5}
        tensors |= {"conv.bias": torch.randn(after)} if bias else {}
        tensors |= {"norm.weight": 1 + 0.3 * torch.randn(after), "norm.bias": torch.randn(after)}
        for key, tensor in tensors.items():  # each is there twice
            again = key.replace("conv", "all_modules.0").replace("norm", "all_modules.1")
            weights[f"{name}.{key}"] = weights[f"{name}.{again}"] = tensor

    conv_norm("encoder.stem.convs.0", 1, WIDTHS[0])
    before = WIDTHS[0]
    for stage, (width, count) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
        for number in range(count):
            block = f"encoder.stages.{stage}.blocks.{number}"
            conv_norm(f"{block}.conv1", before, width)
            conv_norm(f"{block}.conv2", width, width)
            if before != width:
                conv_norm(f"{block}.skip.1", before, width, kernel=1, bias=False)
            before = width
    weights["decoder.seg_layers.0.weight"] = torch.randn(1, 64, 1, 1, 1)
    return weights


def resenc_features(weights: dict[str, Tensor], volume: Tensor) -> Tensor:
    def conv_norm(name: str, maps: Tensor, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.conv.weight"]
        maps = F.conv3d(maps, weight, weights.get(f"{name}.conv.bias"), stride, padding=weight.shape[-1] // 2)
        mean, variance = maps.mean((2, 3, 4), keepdim=True), maps.var((2, 3, 4), keepdim=True, unbiased=False)
        scale, shift = (weights[f"{name}.norm.{part}"][:, None, None, None] for part in ("weight", "bias"))
        return (maps - mean) / (variance + 1e-5).sqrt() * scale + shift

    maps = F.leaky_relu(conv_norm("encoder.stem.convs.0", volume))
    for stage, count in enumerate(BLOCKS):
        for number in range(count):
            block, stride = f"encoder.stages.{stage}.blocks.{number}", 2 if stage and not number else 1
            straight = F.avg_pool3d(maps, stride)
            if f"{block}.skip.1.conv.weight" in weights:
                straight = conv_norm(f"{block}.skip.1", straight)
            out = conv_norm(f"{block}.conv2", F.leaky_relu(conv_norm(f"{block}.conv1", maps, stride)))
            maps = F.leaky_relu(out + straight)
    return maps


def primus_weights() -> dict[str, Tensor]:
    hidden = WIDTH * 8 // 3
    grid = [n // 8 for n in SIZE]
    shapes: dict[str, tuple[int, ...]] = {"down_projection.proj.weight": (WIDTH, 1, 8, 8, 8)}
    shapes |= {"down_projection.proj.bias": (WIDTH,), "eva.pos_embed": (1, math.prod(grid), WIDTH), "mask_token": (1,)}
    for number in range(DEPTH):
        linear = {"attn.q_proj": (WIDTH, WIDTH), "attn.k_proj": (WIDTH, WIDTH), "attn.v_proj": (WIDTH, WIDTH)}
        linear |= {"attn.proj": (WIDTH, WIDTH), "mlp.fc1_g": (hidden, WIDTH), "mlp.fc1_x": (hidden, WIDTH)}
        linear |= {"mlp.fc2": (WIDTH, hidden)}
        block = {f"{name}.weight": shape for name, shape in linear.items()}
        block |= {f"{name}.bias": shape[:1] for name, shape in linear.items() if name != "attn.k_proj"}
        norms = {"norm1": WIDTH, "norm2": WIDTH, "attn.norm": WIDTH, "mlp.norm": hidden}
        block |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
        block |= {"gamma_1": (WIDTH,), "gamma_2": (WIDTH,)}
        shapes |= {f"eva.blocks.{number}.{name}": shape for name, shape in block.items()}
    shapes |= {"eva.norm.weight": (WIDTH,), "eva.norm.bias": (WIDTH,)}
    return {
        name: torch.randn(shape) * (math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.5)
        for name, shape in shapes.items()
    }


def primus_features(weights: dict[str, Tensor], volume: Tensor) -> Tensor:
    grid = [n // 8 for n in volume.shape[2:]]
    places = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    count = WIDTH // HEADS // 6
    angles = torch.tensor(
        [[place[axis] * 10000 ** (-n / count) for axis in range(3) for n in range(count)] for place in places]
    )

    def rotate(tokens: Tensor) -> Tensor:  # B M L d
        pairs = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)

    def linear(name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    tokens = F.conv3d(
        volume, weights["down_projection.proj.weight"], weights["down_projection.proj.bias"], stride=8
    ).flatten(2).transpose(1, 2) + weights["eva.pos_embed"]  # fmt: skip
    for number in range(DEPTH):
        block = f"eva.blocks.{number}"
        inner = norm(f"{block}.norm1", tokens)
        q, k, v = (
            linear(f"{block}.attn.{name}_proj", inner).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv"
        )
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        out = linear(f"{block}.attn.proj", norm(f"{block}.attn.norm", out))
        tokens = tokens + weights[f"{block}.gamma_1"] * out
        inner = norm(f"{block}.norm2", tokens)
        gated = F.silu(linear(f"{block}.mlp.fc1_g", inner)) * linear(f"{block}.mlp.fc1_x", inner)
        out = linear(f"{block}.mlp.fc2", norm(f"{block}.mlp.norm", gated))
        tokens = tokens + weights[f"{block}.gamma_2"] * out
    return norm("eva.norm", tokens).transpose(1, 2).unflatten(2, grid)


def written_out(kind: str) -> tuple[dict[str, Tensor], Features]:
    make, compute = {"resenc": (resenc_weights, resenc_features), "primus": (primus_weights, primus_features)}[kind]
    weights = make()
    return weights, lambda volume: compute(weights, volume)


def of_the_package(kind: str) -> tuple[dict[str, Tensor], Features]:
    if kind == "resenc":
        unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", exc_type=ImportError)
        network = unet.ResidualEncoderUNet(
            1, 5, list(WIDTHS), torch.nn.Conv3d, 3, [1, 2, 2, 2, 2], list(BLOCKS), 2, 1, conv_bias=True,
            norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        )  # fmt: skip
        features: Features = lambda volume: network.encoder(volume)[-1]  # noqa: E731
    else:
        pytest.importorskip("torchvision", exc_type=Exception)  # imported by timm; needs a torch of the same kind
        primus = pytest.importorskip("dynamic_network_architectures.architectures.primus", exc_type=ImportError)
        network = primus.Primus(
            1, WIDTH, (8, 8, 8), 2, DEPTH, HEADS, input_shape=SIZE, init_values=0.1, scale_attn_inner=True
        )
        grid = [n // 8 for n in SIZE]

        def features(volume: Tensor) -> Tensor:
            tokens = network.down_projection(volume).flatten(2).transpose(1, 2)
            return network.eva(tokens)[0].transpose(1, 2).unflatten(2, grid)

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.eval()
    return dict(network.state_dict()), features


def write(path: Path, kind: str, weights: dict[str, Tensor], **plan: Any) -> Path:
    """A file as nnssl writes it."""
    pretraining = {"configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": list(SIZE)}}}
    whole = {"architecture_plans": {"arch_class_name": kind}, "pretrain_plan": pretraining, **KEYS[kind], **plan}
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": whole, "trainer_name": "BaseMAETrainer"}, path)
    return path


def loaded(path: Path, kind: str, **overrides: Any) -> tuple[torch.nn.Module, str]:
    source, description = read_source(path)
    assert description == {}
    model = create_model(f"{kind}_tiny", out_channels=2, **{"img_size": SIZE, **overrides}).eval()
    return model, load_pretrained(str(path), source, description, model, {})


def last_features(model: torch.nn.Module, volume: Tensor) -> Tensor:
    features = model.encoder(volume)
    return features[-1] if isinstance(features, list) else features


@pytest.mark.parametrize("reference", [written_out, of_the_package])
@pytest.mark.parametrize("kind", KEYS)
@torch.no_grad()
def test_a_loaded_encoder_has_the_features_of_its_reference(tmp_path: Path, kind: str, reference: Any) -> None:
    torch.manual_seed(0)
    weights, features = reference(kind)
    model, report = loaded(write(tmp_path / "x.pth", kind, weights), kind)
    volume = torch.randn(2, 1, *SIZE)
    expected = features(volume)
    assert expected.std() > 0.1
    torch.testing.assert_close(last_features(model, volume), expected, rtol=1e-4, atol=1e-4)
    count = len(model.encoder.state_dict())
    assert f"loaded    {count:>4} tensors" in report and "not found    0 tensors" in report


@pytest.mark.parametrize("kind", KEYS)
def test_a_fine_tuning_starts_from_such_a_file(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    torch.manual_seed(0)
    file = write(tmp_path / "x.pth", kind, written_out(kind)[0])
    settings: dict[str, Any] = {"model": f"{kind}_tiny", "crop": list(SIZE), "init": str(file), "transfer": "explain"}
    assert asa.finetune(store, tmp_path / "run", **settings) is None
    shown = capsys.readouterr().out
    name = {"resenc": "encoder.stages.1.0.skip.project.conv.weight", "primus": "encoder.blocks.0.attn.q_proj.weight"}
    assert name[kind] in shown and "left out" in shown and "the transfer is possible" in shown


@pytest.mark.parametrize("kind", KEYS)
@torch.no_grad()
def test_equal_channels_have_the_features_of_one(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    weights, features = written_out(kind)
    model, report = loaded(write(tmp_path / "x.pth", kind, weights), kind, in_channels=3)
    volume = torch.randn(1, 1, *SIZE)
    torch.testing.assert_close(
        last_features(model, volume.expand(-1, 3, -1, -1, -1)), features(volume), rtol=1e-4, atol=1e-4
    )
    assert "1 to 3 input channels" in report


def test_positions_are_interpolated_to_another_grid(tmp_path: Path) -> None:
    weights, _ = written_out("primus")
    places = torch.stack(torch.meshgrid(*(torch.arange(n // 8.0) for n in SIZE), indexing="ij"))  # 3 T H W
    weights["eva.pos_embed"] = places.repeat(WIDTH // 3, 1, 1, 1).flatten(1).T[None].contiguous()
    model, report = loaded(write(tmp_path / "x.pth", "primus", weights), "primus", img_size=(64, 64, 128))
    assert "positions of 4x4x8 to 8x8x16 tokens" in report
    # Token n of the finer grid lies at (n + 1/2) / 2 - 1/2 of the coarser one.
    inner = model.encoder.pos_embed.detach()[:3, 1:-1, 1:-1, 1:-1]
    expected = torch.stack(torch.meshgrid(*((torch.arange(1, n // 4 - 1) - 0.5) / 2 for n in SIZE), indexing="ij"))
    torch.testing.assert_close(inner, expected)


def test_an_encoder_under_other_names_is_found_by_the_plan(tmp_path: Path) -> None:
    weights = {f"net.{name}": tensor for name, tensor in resenc_weights().items()}
    keys = {"key_to_encoder": "net.encoder.stages", "key_to_stem": "net.encoder.stem"}
    model, _ = loaded(write(tmp_path / "x.pth", "resenc", weights, **keys), "resenc")
    first = model.encoder.stem.conv.weight
    assert torch.equal(first, weights["net.encoder.stem.convs.0.conv.weight"])


def test_files_that_cannot_be_loaded_are_refused_with_the_reason(tmp_path: Path) -> None:
    weights = resenc_weights()
    file = write(tmp_path / "resenc.pth", "resenc", weights)
    with pytest.raises(ValueError, match=r"does not match: .* stay untrained"):
        loaded(file, "primus")
    with pytest.raises(ValueError, match=r"does not match: .* stay untrained"):
        loaded(file, "unet")
    with pytest.raises(ValueError, match="trained from scratch: leave init out, or choose .*resenc_"):
        loaded(file, "unetr")
    flat = {**weights, "encoder.stem.convs.0.conv.weight": torch.zeros(3), 5: torch.zeros(1)}
    with pytest.raises(ValueError, match=r"encoder\.stem\.conv\.weight \(\(3,\) does not fit"):
        loaded(write(tmp_path / "flat.pth", "resenc", flat), "resenc")
    with pytest.raises(ValueError, match="does not name key_to_encoder"):
        read_source(write(tmp_path / "no_key.pth", "resenc", weights, key_to_encoder=None))
    with pytest.raises(ValueError, match=r"no tensors of ResEnc or Primus under nothing\.here"):
        read_source(write(tmp_path / "key.pth", "resenc", weights, key_to_encoder="nothing.here", key_to_stem="x"))
    plan = {"pretrain_plan": None}
    with pytest.raises(ValueError, match="positions of shape .* whose grid"):
        read_source(write(tmp_path / "grid.pth", "primus", primus_weights(), **plan))
    with pytest.raises(ValueError, match="contains more than tensors, which could run code"):
        read_source(write(tmp_path / "code.pth", "resenc", weights, init_args=Path("x")))


def test_a_primus_begins_with_weights_of_the_published_spread() -> None:
    model = create_model("primus_tiny", out_channels=2, img_size=32)
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    depth = {name: int(match[1]) for name in linear if (match := re.search(r"(\d+)\.(?:attn\.proj|mlp\.fc2)$", name))}
    assert sorted(depth.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    for name, part in linear.items():  # those that end a residual path are narrower by its place, as in BEiT
        smaller = math.sqrt(2 * (depth[name] + 1)) if name in depth else 1
        assert float(part.weight.detach().std()) == pytest.approx(0.02 / smaller, rel=0.05), name
        assert part.bias is None or not part.bias.any()
