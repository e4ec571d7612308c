"""Laws of the region attention transformer."""

import pytest
import torch
from torch import Tensor

from asa import FocalRegionLoss, RegionAttentionTransformer, rat_base, rat_small, rat_tiny
from asa.restoration.method import Restoration
from asa.restoration.rat import NAFBlock, WindowAttention
from asa.restoration.regions import coarse_labels
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
