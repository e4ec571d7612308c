"""Laws of networks that read the patches of the right half mirrored."""

import re

import pytest
import torch
from torch import nn

from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import asa_tiny
from asa.models.transfer import other_position
from asa.models.unet import unet_tiny
from asa.models.vit_seg import vit_linear_tiny, vit_seg_tiny
from asa.ops.patches import patchify, unpatchify
from asa.ops.symmetry import mirror_patches

SIZE = (16, 16, 32)  # 2 x 2 x 4 patches
MIRRORED = dict(position="mirror_sincos", mirror_patches=True, depth=2, window=16)  # one window, of all tokens


def without_order(network: nn.Module) -> nn.Module:
    """The network with attention that does not depend on the order of the tokens, with outputs that are not 0."""
    for name, parameter in network.named_parameters():
        if "relative_position_bias" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return network.eval()


def columns(patches: torch.Tensor) -> torch.Tensor:
    """`(B, L, ...)` with the token's column as the last but one of three axes."""
    return patches.unflatten(1, (2, 2, 4))


def test_mirrored_places_of_a_mirrored_volume_have_equal_patches() -> None:
    volume = torch.rand(2, 1, *SIZE)
    own, other = (columns(patchify(mirror_patches(each, 8), 8)) for each in (volume, volume.flip(-1)))
    assert torch.equal(own, other.flip(3))
    assert not torch.equal(columns(patchify(volume, 8)), columns(patchify(volume.flip(-1), 8)).flip(3))


@pytest.mark.parametrize("width", [8, 24, 32])
def test_mirroring_patches_is_its_own_inverse_and_keeps_the_left_half_and_the_middle(width: int) -> None:
    volume = torch.rand(1, 2, 8, 8, width)
    mirrored, kept = mirror_patches(volume, 8), (width // 8 + 1) // 2 * 8
    assert torch.equal(mirror_patches(mirrored, 8), volume)
    assert torch.equal(mirrored[..., :kept], volume[..., :kept])
    for start in range(kept, width, 8):
        part = slice(start, start + 8)
        assert torch.equal(mirrored[..., part], volume[..., part].flip(-1))


@pytest.mark.parametrize("make", [vit_seg_tiny, vit_linear_tiny])
def test_the_mirror_image_has_the_mirrored_segmentation(make) -> None:
    torch.manual_seed(0)
    model, volume = without_order(make(3, img_size=SIZE, **MIRRORED)), torch.rand(1, 1, *SIZE)
    found, mirrored = model(volume), model(volume.flip(-1))
    torch.testing.assert_close(mirrored, found.flip(-1))
    assert (found - found.flip(-1)).abs().max() > 0.01
    plain = without_order(make(3, img_size=SIZE, **MIRRORED | {"mirror_patches": False}))
    assert (plain(volume.flip(-1)) - plain(volume).flip(-1)).abs().max() > 0.01


def test_the_mirror_image_with_the_mirrored_mask_has_the_mirrored_reconstruction() -> None:
    torch.manual_seed(0)
    model = without_order(asa_tiny(img_size=SIZE, **MIRRORED, decoder_depth=2))
    volume, mask = torch.rand(1, 1, *SIZE), torch.rand(1, 16).argsort() < 10
    found = torch.zeros(1, 16, 8**3).masked_scatter(mask[:, :, None], model(volume, mask))
    turned = columns(mask).flip(3).flatten(1)
    other = torch.zeros(1, 16, 8**3).masked_scatter(turned[:, :, None], model(volume.flip(-1), turned))
    expected = columns(found.unflatten(2, (8, 8, 8))).flip(3).flip(-1).flatten(4).flatten(1, 3)
    torch.testing.assert_close(other, expected)


@pytest.mark.parametrize("width", [8, 24, 32])
def test_the_reconstruction_is_that_of_the_volume_with_mirrored_patches_mirrored_back(width: int) -> None:
    torch.manual_seed(0)
    model, plain = (asa_tiny(img_size=(16, 16, width), **MIRRORED | {"mirror_patches": own}) for own in (True, False))
    plain.load_state_dict(model.state_dict())
    volume, mask = torch.rand(1, 1, 16, 16, width), torch.rand(1, width // 2).argsort() < width // 3
    own, expected = (torch.zeros(1, width // 2, 8**3) for _ in range(2))
    own[mask] = model(volume, mask)[0].detach()
    expected[mask] = plain(mirror_patches(volume, 8), mask)[0].detach()
    grid = (2, 2, width // 8)
    torch.testing.assert_close(unpatchify(own, grid, 8), mirror_patches(unpatchify(expected, grid, 8), 8))


def test_a_u_net_reads_the_tokens_features_in_their_places() -> None:
    """The only difference to the plain network with mirrored patches is where the features of a token are put."""
    torch.manual_seed(0)
    size = (32, 32, 64)
    model = unet_tiny(3, feature_size=4, img_size=size, **MIRRORED | {"window": 128})
    read: dict[int, torch.Tensor] = {}
    for level, skip in enumerate(model.skips[:3], start=1):
        skip.register_forward_hook(lambda module, inputs, out, level=level: read.__setitem__(level, out))
    taken: list[torch.Tensor] = []
    for up in model.ups[-3:]:
        up.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[1]))
    model(torch.rand(1, 1, *size))
    for level, map_ in zip((2, 1), taken, strict=False):
        torch.testing.assert_close(map_, mirror_patches(read[level], 8 >> level))


def test_a_method_learns_with_it() -> None:
    torch.manual_seed(0)
    method = MaskedPretraining(model=asa_tiny(img_size=SIZE, **MIRRORED), decode=0.5)
    loss = method({"image": torch.rand(2, 1, *SIZE), "seed": torch.arange(2)})["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in method.parameters())


def test_an_encoder_that_was_pretrained_otherwise_is_refused() -> None:
    before = {"position": "mirror_sincos", "mirror_patches": True}
    assert other_position(before, before) is None
    assert re.search(
        "mirror_patches=true, this model has mirror_patches=false: add model.mirr",
        str(other_position(before, {"position": "mirror_sincos"})),
    )
    assert re.search(
        "with mirror_patches=false, this model has mirror_patches=true",
        str(other_position({"position": "mirror_sincos"}, before)),
    )
    assert re.search(r"add model.position=mirror_sincos model.mirror_patches=true$", str(other_position(before, {})))
