"""Laws of the supervised methods: what they give to the network and to the loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.losses.segmentation import DeeplySupervisedDiceCE, DeeplySupervisedRegionLoss
from asa.methods.segment import RegionSegmentation, Segmentation, is_segmentation_network
from asa.methods.whole_scans import Classification, Regression
from asa.models.classifier import asa_classifier_tiny, sa_swin_classifier_tiny, sa_swin_regressor_tiny

SMALLEST = dict(img_size=(32, 32, 64), embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2)


class Difference(nn.Module):
    """A network whose logits are the image and its difference from the mirror image, at two resolutions."""

    mirrored, out_channels = True, 2

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(img_size=(4, 4, 8), in_channels=1)

    def forward(self, volume: Tensor, mirrored: Tensor, deep_supervision: bool = False) -> list[Tensor]:
        logits = torch.cat([volume, volume - mirrored], dim=1)
        return [logits, F.avg_pool3d(logits, 2)] if deep_supervision else [logits]


def sides(count: int = 2) -> tuple[Tensor, Tensor]:
    """Volumes and their mirror images."""
    volume = torch.randn(count, 1, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    return volume, volume.flip(-1)


@pytest.mark.parametrize("method", [Segmentation, RegionSegmentation])
def test_a_segmentation_loss_is_that_of_the_image_and_its_mirror_image_at_all_resolutions(method: type) -> None:
    regions = {"regions": {"whole": [1, 2], "inner": [2]}} if method is RegionSegmentation else {}
    (image, mirror), label = sides(), torch.arange(256).reshape(2, 1, 4, 4, 8) % 2
    segmentation = method(model=Difference(), **regions)
    expected = segmentation.loss(Difference()(image, mirror, deep_supervision=True), label)
    found = segmentation({"image": image, "mirror": mirror, "label": label})["loss"]
    assert segmentation.mirrored and torch.equal(found, expected)
    assert isinstance(segmentation.loss, DeeplySupervisedDiceCE) == (method is Segmentation)


def test_a_class_is_predicted_where_its_logit_is_the_highest() -> None:
    logits = torch.tensor([[-3.0, 2.0], [-4.0, 1.0]]).reshape(2, 1, 1, 2)
    assert Segmentation(model=Difference()).label_map(logits).tolist() == [[[0, 0]]]
    assert Segmentation(model=Difference()).label_map(-logits).tolist() == [[[1, 1]]]


def test_a_region_is_predicted_where_its_logit_is_above_0() -> None:
    method = RegionSegmentation(model=Difference(), regions={"whole": [1, 2], "inner": [2]})
    logits = torch.tensor([[-0.1, 0.1, 0.1, 0.7, -0.7], [-0.1, -0.1, 0.4, 0.7, 0.2]]).reshape(2, 1, 1, 5)
    assert method.label_map(logits).tolist() == [[[0, 1, 2, 2, 2]]]


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_values_of_whole_scans_are_learnt_from_both_sides(kind: str) -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 1, 32, 32, 64)
    if kind == "classes":
        method, target = Classification(model=sa_swin_classifier_tiny(3, **SMALLEST)), torch.tensor([2, 0])
    else:
        method = Regression(model=sa_swin_regressor_tiny(mean=5.0, sd=2.0, **SMALLEST))
        target = torch.tensor([4.0, 9.0])
    out = method.model(image, image.flip(-1))
    expected = F.cross_entropy(out, target) if kind == "classes" else (out - target).abs().mean() / 2
    assert method.mirrored
    torch.testing.assert_close(method({"image": image, "mirror": image.flip(-1), "target": target})["loss"], expected)
    assert not torch.equal(method.model(image, image), out)


@pytest.mark.parametrize("loss", [DeeplySupervisedDiceCE(), DeeplySupervisedRegionLoss([[1, 2], [2]])])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_sums_of_a_segmentation_loss_in_float32(loss: nn.Module, half: torch.dtype) -> None:
    # More voxels of a class than float16 can count.
    logits = torch.randn(1, 3 if isinstance(loss, DeeplySupervisedDiceCE) else 2, 48, 64, 64) + 1
    label = torch.randint(3, (1, 1, 48, 64, 64))
    expected = loss([logits], label)
    with torch.autocast("cpu", half):
        assert torch.equal(loss([logits], label), expected)


def test_a_network_is_known_by_its_attributes_also_if_they_are_modules() -> None:
    class Network(nn.Module):
        out_channels, mirrored = 2, False

        def __init__(self, encoder: nn.Module | None) -> None:
            super().__init__()
            if encoder is not None:
                self.encoder = encoder

    assert is_segmentation_network(Network(nn.Identity()))
    assert not is_segmentation_network(Network(None)) and not is_segmentation_network(nn.Identity())


@pytest.mark.parametrize("kind", ["alone", "ASA", "SA-Swin"])
def test_a_class_is_read_from_the_mean_token_and_the_volume_asks_its_mirror_image(kind: str) -> None:
    torch.manual_seed(0)
    small = dict(img_size=(32, 32, 64), embed_dim=24, depth=1, num_heads=2, symmetry=kind != "alone")
    model = sa_swin_classifier_tiny(2, **SMALLEST) if kind == "SA-Swin" else asa_classifier_tiny(2, **small)
    model.eval()
    volume, mirrored = torch.rand(2, 1, 1, 32, 32, 64)
    with torch.no_grad():
        tokens, others = model.encoder(volume), model.encoder(mirrored)
        read = tokens if kind == "alone" else model.saca(tokens, others, model.encoder.token_grid(volume))
        expected = model.head(read.mean(dim=1))
        torch.testing.assert_close(model(volume, None if kind == "alone" else mirrored), expected)


def test_a_loss_of_classes_needs_two_outputs() -> None:
    with pytest.raises(ValueError, match="two or more outputs, the background first"):
        DeeplySupervisedDiceCE()([torch.zeros(1, 1, 4, 4, 4)], torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8))
