"""Laws of Restormer as this package uses it."""

import pytest
import torch
from torch import Tensor

from asa.restoration.method import FocalRegionLoss
from asa.restoration.restormer import Restormer, restormer_base, restormer_small, restormer_tiny


def picture(h: int = 24, w: int = 32, channels: int = 1, b: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(b, channels, h, w, generator=generator), torch.randint(4, (b, h, w), generator=generator)


def network(**overrides) -> Restormer:
    torch.manual_seed(0)
    return restormer_tiny(**overrides).eval()


def test_the_published_size_has_26_1_million_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in restormer_base(in_channels=3).parameters()) == pytest.approx(26.1e6, rel=0.002)


def test_the_smaller_sizes_have_the_parameters_that_they_say() -> None:
    for make, count in ((restormer_small, 1.6e6), (restormer_tiny, 0.2e6)):
        assert f"{count / 1e6:.1f} M parameters" in str(make.__doc__)
        with torch.device("meta"):
            assert sum(p.numel() for p in make().parameters()) == pytest.approx(count, abs=0.05e6)


def test_the_norms_are_over_the_channels_of_each_pixel() -> None:
    model, seen = network(), []
    block = model.network.latent[0]
    block.norm1.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    model(*picture())
    ((features, out),) = seen
    mean, variance = features.mean(dim=1, keepdim=True), features.var(dim=1, keepdim=True, correction=0)
    torch.testing.assert_close(out, (features - mean) / (variance + 1e-5).sqrt())
    assert not [module for module in model.modules() if isinstance(module, torch.nn.InstanceNorm2d)]


@pytest.mark.parametrize("upscale", [1, 2])
def test_an_output_of_zero_leaves_the_image_as_it_is(upscale: int) -> None:
    model, (image, labels) = network(upscale=upscale), picture()
    torch.nn.init.zeros_(model.network.output.conv.weight)
    larger = torch.nn.functional.interpolate(image, scale_factor=upscale, mode="bilinear")
    assert torch.equal(model(image, labels), larger)


@pytest.mark.parametrize(("h", "w"), [(32, 32), (1, 1), (17, 50), (7, 16)])
@pytest.mark.parametrize("upscale", [1, 2, 4])
def test_any_height_and_width_is_restored(h: int, w: int, upscale: int) -> None:
    out = network(upscale=upscale)(*picture(h, w))
    assert out.shape == (2, 1, h * upscale, w * upscale) and out.isfinite().all()


def test_label_maps_have_no_effect_and_images_of_a_batch_none_on_each_other() -> None:
    model, (image, labels) = network(), picture()
    out = model(image, labels)
    assert torch.equal(out, model(image, torch.zeros_like(labels)))
    torch.testing.assert_close(out[:1], model(image[:1], labels[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_parameter_gets_a_gradient(channels: int) -> None:
    model, (image, labels) = network(in_channels=channels), picture(channels=channels)
    out = model(image, labels)
    FocalRegionLoss()(out, torch.rand_like(out), labels).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(name in dict(model.named_parameters()) for name in model.no_weight_decay()) and model.no_weight_decay()


def test_wrong_images_label_maps_and_factors_raise_an_error() -> None:
    image, labels = picture()
    with pytest.raises(ValueError, match="takes colour images of"):
        network(in_channels=3)(image, labels)
    with pytest.raises(ValueError, match="the label map has shape"):
        network()(image, labels[:, :16])
    with pytest.raises(ValueError, match="upscale must be 1, 2 or 4"):
        restormer_tiny(upscale=3)
