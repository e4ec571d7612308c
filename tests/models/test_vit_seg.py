"""Laws of the light segmentation heads: from tokens only, and from tokens joined with convolutions of the image."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from asa.models.kernels import SMALL, PatchConv
from asa.models.sw_vit import SWViT
from asa.models.unet import unet_base, unet_small
from asa.models.vit_seg import (
    ConvSegmentationViT,
    SegmentationViT,
    vit_conv_base,
    vit_conv_small,
    vit_conv_tiny,
    vit_seg_tiny,
)
from asa.ops.patches import patchify, unpatchify


def test_a_linear_map_of_tokens_to_their_parts_is_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    linear, grid = torch.nn.Linear(6, 8 * 3), (2, 3, 4)
    tokens = torch.randn(2, 24, 6)
    kernel = linear.weight.unflatten(0, (3, 2, 2, 2)).permute(4, 0, 1, 2, 3)  # 6 3 2 2 2
    maps = tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3)
    expected = torch.nn.functional.conv_transpose3d(maps, kernel, stride=2)
    bias = linear.bias.unflatten(0, (3, 2, 2, 2)).repeat(1, *grid)  # one for each part
    torch.testing.assert_close(unpatchify(linear(tokens), grid, 2), expected + bias)


def test_the_logits_of_a_patch_depend_on_its_token_alone() -> None:
    torch.manual_seed(0)
    model = vit_seg_tiny(3, img_size=(16, 16, 24), depth=1)
    seen: list[torch.Tensor] = []

    def replaced(module: object, inputs: object, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.detach().requires_grad_())
        return seen[-1]

    model.encoder.register_forward_hook(replaced)
    logits = model(torch.rand(1, 1, 16, 16, 24))
    assert logits.shape == (1, 3, 16, 16, 24)
    for k in (0, 5, 11):
        (gradient,) = torch.autograd.grad(patchify(logits, 8)[0, k].sum(), seen[0], retain_graph=True)
        assert [row for row in range(12) if gradient[0, row].any()] == [k]


def test_the_head_is_transposed_convolutions_each_with_a_norm_and_a_gelu() -> None:
    torch.manual_seed(0)
    model = vit_seg_tiny(3, img_size=(16, 16, 24), depth=1)
    volume = torch.rand(2, 1, 16, 16, 24)
    maps = model.encoder(volume).unflatten(1, (2, 2, 3)).permute(0, 4, 1, 2, 3)
    for up, norm in zip(model.ups, model.norms, strict=True):
        kernel = up.weight.unflatten(0, (-1, 2, 2, 2)).permute(4, 0, 1, 2, 3)
        maps = torch.nn.functional.conv_transpose3d(maps, kernel, stride=2)
        maps = torch.nn.functional.gelu(norm(maps.movedim(1, -1))).movedim(-1, 1)
    kernel = model.head.weight.unflatten(0, (3, 2, 2, 2)).permute(4, 0, 1, 2, 3)
    expected = torch.nn.functional.conv_transpose3d(maps, kernel, stride=2)
    torch.testing.assert_close(model(volume), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [vit_seg_tiny, vit_conv_tiny])
def test_linear_maps_begin_with_xavier_weights(make) -> None:
    torch.manual_seed(0)
    model = make(2, img_size=16)
    for linear in (*model.ups, model.head):
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.97 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()


@pytest.mark.parametrize("make", [vit_seg_tiny, vit_conv_tiny])
def test_every_parameter_gets_a_gradient_and_all_voxels_their_own_logits(make) -> None:
    torch.manual_seed(0)
    model = make(2, img_size=16)
    (logits,) = model(torch.rand(1, 1, 16, 16, 16), deep_supervision=True)
    assert len(torch.unique(logits[0, 0])) == 16**3
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_patch_size_or_width_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="patches of 2, 4, 8"):
        SegmentationViT(SWViT(img_size=12, patch_size=6, embed_dim=24, depth=1, num_heads=2), 2)
    with pytest.raises(ValueError, match="a token width of 18 cannot be halved 2 times"):
        SegmentationViT(SWViT(img_size=16, patch_size=8, embed_dim=18, depth=1, num_heads=2), 2)
    encoder = SWViT(img_size=16, patch_size=2, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="patches of 4, 8, 16"):
        ConvSegmentationViT(encoder, 2)
    with pytest.raises(ValueError, match="model.blocks=0"):
        vit_conv_tiny(2, img_size=16, blocks=0)


def test_tokens_and_the_image_meet_at_half_the_resolution() -> None:
    """The network written out, with the tokens and the image at half the resolution made in a slow, obvious way."""
    torch.manual_seed(0)
    model = vit_conv_tiny(3, img_size=(16, 16, 32), in_channels=2, width=8, depth=1, mirror_patches=True)
    volume = torch.rand(2, 2, 16, 16, 32)
    known = model.encoder(volume).unflatten(1, (2, 2, 4)).permute(0, 4, 1, 2, 3)
    for up, norm in zip(model.ups, model.norms, strict=True):
        kernel = up.weight.unflatten(0, (-1, 2, 2, 2)).permute(4, 0, 1, 2, 3)
        known = torch.nn.functional.conv_transpose3d(known, kernel, stride=2)
        known = torch.nn.functional.gelu(norm(known.movedim(1, -1)).movedim(-1, 1))
    known[..., 8:12], known[..., 12:] = known[..., 8:12].flip(-1), known[..., 12:].flip(-1)  # of the right half
    image = torch.stack(
        [volume[:, c, d::2, h::2, w::2] for c in (0, 1) for d in (0, 1) for h in (0, 1) for w in (0, 1)], dim=1
    )
    block, features = model.image_block, image
    for weight, norm in ((block.conv1.conv.weight, block.norm1), (block.conv2.conv.weight, block.norm2)):
        features = block.lrelu(norm(torch.nn.functional.conv3d(features, weight, padding=1)))
    features = model.blocks(torch.cat([features, known], dim=1))
    expected = torch.zeros(2, 3, 16, 16, 32)
    parts = model.head(features.movedim(1, -1)).unflatten(-1, (3, 2, 2, 2))
    for d, h, w in ((d, h, w) for d in (0, 1) for h in (0, 1) for w in (0, 1)):
        expected[:, :, d::2, h::2, w::2] = parts[..., d, h, w].movedim(-1, 1)
    torch.testing.assert_close(model(volume), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("make", "unet"), [(vit_conv_small, unet_small), (vit_conv_base, unet_base)])
def test_it_has_less_than_half_the_operations_of_a_unet(make, unet) -> None:
    counted = []
    for network in (make, unet):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network(4, img_size=96)(torch.empty(1, 1, 96, 96, 96))
        counted.append(counter.get_total_flops())
    assert counted[0] < 0.5 * counted[1]


@pytest.mark.parametrize("size", [(4, 6, 8), (64, 96, 2)], ids=["of the voxels", "of the patches"])
def test_a_convolution_of_patches_is_the_same_in_either_way(size: tuple[int, int, int]) -> None:
    """(2, 16, 32, 48) values at a place of W are more than SMALL."""
    torch.manual_seed(0)
    plain = torch.nn.Conv3d(16, 3, 3, padding=1, dtype=torch.float64)
    volume = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    own, results = PatchConv.sharing(plain), []
    parts = [volume[:, c, d::2, h::2, w::2] for c in (0, 1) for d in (0, 1) for h in (0, 1) for w in (0, 1)]
    assert (parts[0][..., 0].numel() * len(parts) <= SMALL) == (size == (4, 6, 8))
    for out in (own(volume), plain(torch.stack(parts, dim=1))):
        results.append([out, *torch.autograd.grad(out.pow(2).sum(), [volume, plain.weight, plain.bias])])
    torch.testing.assert_close(*results)
