"""Laws of the segmentation head that reads tokens only."""

import pytest
import torch

from asa.models.sw_vit import SWViT
from asa.models.vit_seg import SegmentationViT, split, vit_seg_tiny
from asa.ops.patches import patchify


def test_splitting_tokens_is_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    linear, grid = torch.nn.Linear(6, 8 * 3), (2, 3, 4)
    tokens = torch.randn(2, 24, 6)
    finer, size = split(linear(tokens), grid)
    kernel = linear.weight.unflatten(0, (3, 2, 2, 2)).permute(4, 0, 1, 2, 3)  # 6 3 2 2 2
    maps = tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3)
    expected = torch.nn.functional.conv_transpose3d(maps, kernel, stride=2)
    bias = linear.bias.unflatten(0, (3, 2, 2, 2)).repeat(1, *grid)  # one for each part
    torch.testing.assert_close(finer, (expected + bias).flatten(2).transpose(1, 2))
    assert size == (4, 6, 8)


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


def test_every_parameter_gets_a_gradient_and_all_voxels_their_own_logits() -> None:
    torch.manual_seed(0)
    model = vit_seg_tiny(2, img_size=16)
    (logits,) = model(torch.rand(1, 1, 16, 16, 16), deep_supervision=True)
    assert len(torch.unique(logits[0, 0])) == 16**3
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_patch_size_or_width_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="patches of 2, 4, 8"):
        SegmentationViT(SWViT(img_size=12, patch_size=6, embed_dim=24, depth=1, num_heads=2), 2)
    with pytest.raises(ValueError, match="a token width of 18 cannot be halved 2 times"):
        SegmentationViT(SWViT(img_size=16, patch_size=8, embed_dim=18, depth=1, num_heads=2), 2)
