"""Laws of the region attention transformer."""

import numpy as np
import pytest
import torch
from torch import Tensor

from asa import FocalRegionLoss, RegionAttentionTransformer, rat_base, rat_small, rat_tiny
from asa.restoration.method import Restoration
from asa.restoration.rat import NAFBlock, RegionLayer, WindowAttention
from asa.restoration.regions import coarse_labels, region_index
from asa.training.device import on_device


def network(**overrides) -> RegionAttentionTransformer:
    """A tiny network whose residual scales are not at their initial value of 0."""
    torch.manual_seed(0)
    model = rat_tiny(**{**dict(dim=8, groups=1, depth=2, num_heads=2), **overrides})
    for name, parameter in model.named_parameters():
        if "scale" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def picture(h: int = 32, w: int = 32, channels: int = 1, b: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(b, channels, h, w, generator=generator)
    return image, torch.randint(4, (b, h, w), generator=generator)


def test_the_released_size_has_15_9_million_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in rat_base().parameters()) == pytest.approx(15.9e6, rel=0.005)


def test_the_smaller_sizes_have_the_parameters_that_they_say() -> None:
    for make, count in ((rat_small, 2.1e6), (rat_tiny, 0.2e6)):
        assert f"{count / 1e6:.1f} M parameters" in str(make.__doc__)
        with torch.device("meta"):
            assert sum(p.numel() for p in make().parameters()) == pytest.approx(count, abs=0.05e6)


@pytest.mark.parametrize("make", [rat_small, rat_tiny])
@pytest.mark.parametrize(("channels", "upscale"), [(1, 1), (3, 1), (1, 2), (3, 4)])
def test_every_parameter_gets_a_gradient(make, channels: int, upscale: int) -> None:
    torch.manual_seed(0)
    model = make(in_channels=channels, upscale=upscale, dim=8, num_heads=2)
    for name, parameter in model.named_parameters():
        if "scale" in name:
            torch.nn.init.ones_(parameter)
    image, labels = picture(16, 16, channels, b=1)
    out = model(image, labels)
    big = labels.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2)
    FocalRegionLoss()(out, torch.rand_like(out), big).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(("h", "w"), [(32, 32), (1, 1), (17, 50), (37, 16)])
@pytest.mark.parametrize("upscale", [1, 2, 4])
def test_any_height_and_width_is_restored(h: int, w: int, upscale: int) -> None:
    image, labels = picture(h, w)
    out = network(upscale=upscale)(image, labels)
    assert out.shape == (2, 1, h * upscale, w * upscale) and out.isfinite().all()


@pytest.mark.parametrize("upscale", [1, 2, 4])
@pytest.mark.parametrize("majority", [False, True])
def test_padding_is_a_region_of_its_own(upscale: int, majority: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from asa.restoration import rat

    seen: list[Tensor] = []
    indexed = rat.region_index
    monkeypatch.setattr(rat, "region_index", lambda labels: (seen.append(labels), indexed(labels))[1])
    image, labels = picture(18, 27, b=1)
    network(upscale=upscale, majority=majority)(image, labels)
    (only,) = seen  # one index for all layers
    inner = coarse_labels(labels, 4 // upscale, majority=majority)[0]
    h, w = inner.shape
    assert (h, w) == (-(-18 * upscale // 4), -(-27 * upscale // 4))
    grid = only.view(-(-h // 4) * 4, -(-w // 4) * 4)
    assert torch.equal(grid[:h, :w], inner)
    outside = torch.ones_like(grid, dtype=torch.bool)
    outside[:h, :w] = False
    assert len(grid[outside].unique()) == 1 and not torch.isin(grid[outside], labels).any()


def test_labels_have_no_effect_where_the_scale_of_the_region_attention_is_0() -> None:
    model = network()
    image, labels = picture()
    shuffled = labels.flatten(1)[:, torch.randperm(32 * 32)].view_as(labels)
    assert not torch.allclose(model(image, labels), model(image, shuffled), atol=1e-5)
    for name, parameter in model.named_parameters():
        if "region_scale" in name:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(model(image, labels), model(image, shuffled))


def test_relabelling_changes_nothing() -> None:
    model = network()
    image, labels = picture()
    renamed = torch.tensor([70000, -9, 3, 12])[labels]
    torch.testing.assert_close(model(image, labels), model(image, renamed))


def test_the_images_of_a_batch_are_independent() -> None:
    model = network()
    image, labels = picture()
    for i in range(2):
        alone = model(image[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(model(image, labels)[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_all_backends_give_the_same_output() -> None:
    image, labels = picture()
    results = [network(backend=backend)(image, labels) for backend in ("segments", "dense", "auto")]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_a_step_reads_no_value_of_its_device(backend: str) -> None:
    image, labels = picture()
    batch = on_device({"image": image, "target": image, "regions": labels}, torch.device("meta"))
    assert batch["image"].is_meta and batch["regions"] is labels  # the meta device has no values
    loss = Restoration(model=network(backend=backend)).to("meta")(batch)["loss"]
    assert loss.is_meta and loss.shape == ()


def test_windows_attend_only_to_themselves() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, 4)
    tokens = torch.randn(1, 64, 8)
    changed = tokens.clone().view(1, 8, 8, 8)
    changed[:, :4, 4:] += 1  # the window at the top right
    difference = (attention(tokens, (8, 8)) - attention(changed.view(1, 64, 8), (8, 8))).abs().sum(-1).view(8, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(difference > 0, expected)


def test_windows_are_attention_head_by_head_scaled_by_the_width_of_a_head() -> None:
    torch.manual_seed(0)
    attention, tokens = WindowAttention(8, 2, 4), torch.randn(2, 128, 8)
    q, k, v = attention.qkv(tokens).unflatten(1, (16, 8)).chunk(3, dim=-1)  # 16 rows of two windows of 4
    expected = torch.zeros(2, 16, 8, 8)
    for top in range(0, 16, 4):
        for left in (0, 4):
            inside = (slice(None), slice(top, top + 4), slice(left, left + 4))
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                own = [part[(*inside, head)].flatten(1, 2) for part in (q, k, v)]
                heads.append((own[0] @ own[1].transpose(1, 2) / 2).softmax(dim=-1) @ own[2])
            expected[inside] = torch.cat(heads, dim=-1).unflatten(1, (4, 4))
    torch.testing.assert_close(attention(tokens, (16, 8)), attention.proj(expected.flatten(1, 2)))


def test_a_layer_is_region_attention_and_window_attention_each_scaled_and_followed_by_an_mlp() -> None:
    torch.manual_seed(0)
    layer, tokens = RegionLayer(8, 2, 2.0, 4, "auto"), torch.randn(2, 64, 8)
    index = region_index(torch.randint(3, (2, 64)))
    assert not layer.region_scale.any() and not layer.window_scale.any()
    for name, parameter in layer.named_parameters():
        if "scale" in name or "norms" in name:
            torch.nn.init.normal_(parameter)
    expected = tokens + layer.region_scale * layer.regions(layer.norms[0](tokens), index)
    expected = expected + layer.mlps[0](layer.norms[1](expected))
    expected = expected + layer.window_scale * layer.windows(layer.norms[2](expected), (8, 8))
    expected = expected + layer.mlps[1](layer.norms[3](expected))
    torch.testing.assert_close(layer(tokens, index, (8, 8)), expected)


@pytest.mark.parametrize("upscale", [1, 2])
def test_an_output_of_zero_leaves_the_image_as_it_is(upscale: int) -> None:
    model, (image, labels) = network(upscale=upscale), picture(17, 30)
    for weight in model.head.parameters():
        torch.nn.init.zeros_(weight)
    larger = torch.nn.functional.interpolate(image, scale_factor=upscale, mode="bilinear")
    assert torch.equal(model(image, labels), larger)


def test_the_image_is_continued_by_its_border_to_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (image, labels) = network(), picture(17, 30)
    seen: list[Tensor] = []
    monkeypatch.setattr(model, "residual", lambda padded, regions: (seen.append(padded), 0 * padded)[1])
    model(image, labels)
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (0, 15), (0, 2)), mode="edge")
    np.testing.assert_array_equal(seen[0].numpy(), expected)


def test_the_residual_is_that_of_the_stages_with_their_connections() -> None:
    model, (image, labels) = network(groups=2), picture()
    for block in (module for module in model.modules() if isinstance(module, NAFBlock)):
        torch.nn.init.normal_(block.scale1)
    index = region_index(coarse_labels(labels, 4, majority=False).flatten(1))
    full = model.encoders[0](model.stem(image))
    half = model.encoders[1](model.downs[0](full))
    quarter = model.downs[1](half)
    middle = quarter
    for group in model.groups:
        tokens = middle.flatten(2).transpose(1, 2)
        for layer in group.layers:
            tokens = layer(tokens, index, (8, 8))
        middle = middle + group.conv(tokens.transpose(1, 2).unflatten(2, (8, 8)))
    half = model.decoders[0](model.ups[0](quarter + middle) + half)
    full = model.decoders[1](model.ups[1](half) + full)
    torch.testing.assert_close(model(image, labels), image + model.head(full))


def test_a_new_naf_block_is_the_identity() -> None:
    features = torch.randn(2, 6, 5, 7)
    assert torch.equal(NAFBlock(6)(features), features)


def test_wrong_images_and_label_maps_raise_an_error() -> None:
    model = network()
    image, labels = picture()
    with pytest.raises(ValueError, match="takes grey images of"):
        model(image.expand(-1, 3, -1, -1), labels)
    with pytest.raises(ValueError, match="takes colour images of"):
        network(in_channels=3)(image, labels)
    with pytest.raises(ValueError, match="the label map has shape"):
        model(image, labels[:, :16])
    with pytest.raises(ValueError, match="is empty"):
        model(image, labels[:, :0])
    with pytest.raises(ValueError, match="must have integers"):
        model(image, labels + 0.5)
    with pytest.raises(ValueError, match="upscale must be 1, 2 or 4"):
        rat_tiny(upscale=3)
