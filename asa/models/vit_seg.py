"""Segmentation by a light head on a token encoder: from tokens alone, or from tokens and the image.

From tokens alone: transposed convolutions in the manner of Primus (Wald et al., 2025), or a linear map. From both: a
few convolutions at half the resolution. Letters: volume `B C D H W`, grid T x H x W of L tokens `B L E`, patch size s,
K output channels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock
from torch import Tensor, nn

from asa.models.kernels import PatchConv, use_own_kernels
from asa.models.sw_vit import SWViT, initialise, sw_vit_base, sw_vit_small, sw_vit_tiny
from asa.ops.patches import token_map, unpatchify
from asa.ops.symmetry import mirror_patches


class TokenSegmentation(nn.Module):
    """An encoder, and a head from its last tokens to logits of K classes, background included, or regions.

    Only `ConvSegmentationViT` reads the image beside them.
    """

    mirrored = False
    head: nn.Linear

    def __init__(self, encoder: SWViT, out_channels: int) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, out_channels

    def forward(self, volume: Tensor, deep_supervision: bool = False) -> Tensor | list[Tensor]:
        """Logits `(B, K, D, H, W)` of volumes `(B, C, D, H, W)`, with `deep_supervision` in a list of one resolution.

        A ValueError for volumes of another size than the encoder's.
        """
        logits = self.decode(self.encoder(volume))
        if self.encoder.mirror_patches:
            logits = mirror_patches(logits, self.encoder.patch_size)
        return [logits] if deep_supervision else logits

    def decode(self, tokens: Tensor) -> Tensor:
        """The last tokens `(B, L, E)` -> logits `(B, K, D, H, W)`, of a head that reads nothing else."""
        raise NotImplementedError


class LinearSegmentationViT(TokenSegmentation):
    """A linear map from each token to the logits of its patch's voxels.

    With a frozen encoder it measures the quality of the encoder's features: how well a linear map predicts labels.
    """

    def __init__(self, encoder: SWViT, out_channels: int) -> None:
        super().__init__(encoder, out_channels)
        self.head = nn.Linear(encoder.embed_dim, out_channels * encoder.patch_size**3)
        nn.init.zeros_(self.head.bias)

    def decode(self, tokens: Tensor) -> Tensor:
        return unpatchify(self.head(tokens), self.encoder.grid, self.encoder.patch_size)


class SegmentationViT(TokenSegmentation):
    """A token encoder, and transposed convolutions from its last tokens to the logits of all voxels.

    Whatever the head knows of the image, it reads from the tokens, unlike a U-Net. Each transposed convolution halves
    the voxel size and the width; kernel and stride are 2, so it is a linear map of each token to its eight parts, and
    is computed as a matrix product.

    Raises:
        ValueError: a patch size that is not a power of two, or a width that cannot be halved as often.
    """

    def __init__(self, encoder: SWViT, out_channels: int) -> None:
        super().__init__(encoder, out_channels)
        steps = encoder.patch_size.bit_length() - 1
        if encoder.patch_size != 2**steps or steps < 1:
            raise ValueError(f"the head takes patches of 2, 4, 8, ... voxels, got {encoder.patch_size}")
        if encoder.embed_dim % 2 ** (steps - 1):
            raise ValueError(f"a token width of {encoder.embed_dim} cannot be halved {steps - 1} times")
        widths = [encoder.embed_dim // 2**k for k in range(steps)]
        self.ups, self.norms = _upsampling(widths)
        self.head = nn.Linear(widths[-1], 8 * out_channels)
        initialise([*self.ups, self.head])

    def decode(self, tokens: Tensor) -> Tensor:
        tokens, grid = _upsampled(tokens, self.encoder.grid, self.ups, self.norms)
        return unpatchify(self.head(tokens), grid, 2)


class ConvSegmentationViT(TokenSegmentation):
    """A token encoder for what is where, and convolutions at half the resolution for where exactly it ends.

    The last tokens are brought to half the resolution by transposed convolutions, as in `SegmentationViT`, the image
    without a loss, eight voxels as eight channels. Residual convolutions of both, joined, give the logits of eight
    voxels each. Nothing is computed at full resolution, where most of a U-Net's operations are; and the convolutions
    see the image near the voxel only, so the anatomy has to come from the tokens.

    Args:
        width: channels of the convolutions.
        blocks: residual blocks of two 3x3x3 convolutions.

    Raises:
        ValueError: a patch size that is not a power of two of 4 or more, or no block.
    """

    def __init__(self, encoder: SWViT, out_channels: int, width: int = 24, blocks: int = 2) -> None:
        super().__init__(encoder, out_channels)
        steps = encoder.patch_size.bit_length() - 1
        if encoder.patch_size != 2**steps or steps < 2:
            raise ValueError(f"the head takes patches of 4, 8, 16, ... voxels, got {encoder.patch_size}")
        if blocks < 1:
            raise ValueError(f"model.blocks={blocks}: the head has 1 block or more")
        widths = [max(encoder.embed_dim // 2**k, width) for k in range(steps - 1)]
        self.ups, self.norms = _upsampling([*widths, width])
        block: dict[str, Any] = dict(spatial_dims=3, kernel_size=3, stride=1, norm_name="instance")
        self.image_block = UnetBasicBlock(in_channels=8 * encoder.in_channels, out_channels=width, **block)
        self.image_block.conv1.conv = PatchConv.sharing(self.image_block.conv1.conv)
        channels = pairwise([2 * width, *[width] * blocks])
        self.blocks = nn.Sequential(*(UnetResBlock(in_channels=a, out_channels=b, **block) for a, b in channels))
        self.head = nn.Linear(width, 8 * out_channels)
        initialise([*self.ups, self.head])
        use_own_kernels(self)

    def forward(self, volume: Tensor, deep_supervision: bool = False) -> Tensor | list[Tensor]:
        """Segment a volume `(B, C, D, H, W)`; see `TokenSegmentation.forward`."""
        tokens, grid = _upsampled(self.encoder(volume), self.encoder.grid, self.ups, self.norms)
        known = token_map(tokens, grid)
        if self.encoder.mirror_patches:
            known = mirror_patches(known, self.encoder.patch_size // 2)
        joined = torch.cat([self.image_block(volume), known], dim=1)
        if volume.device.type == "cpu":  # the faster layout there
            joined = joined.contiguous(memory_format=torch.channels_last_3d)
        features = self.blocks(joined).permute(0, 2, 3, 4, 1).flatten(1, 3)
        logits = unpatchify(self.head(features), grid, 2)
        return [logits] if deep_supervision else logits


def _upsampling(widths: Sequence[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Linear maps of each token to its eight parts, of the next width, and the norms after them."""
    ups = nn.ModuleList(nn.Linear(wide, 8 * narrow) for wide, narrow in pairwise(widths))
    return ups, nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])


def _upsampled(
    tokens: Tensor, grid: tuple[int, int, int], ups: nn.ModuleList, norms: nn.ModuleList
) -> tuple[Tensor, tuple[int, int, int]]:
    """Tokens `(B, L, E)` after each of the maps, and their grid."""
    for up, norm in zip(ups, norms, strict=True):
        finer = unpatchify(up(tokens), grid, 2)  # B F 2T 2H 2W
        t, h, w = grid
        grid = (2 * t, 2 * h, 2 * w)
        tokens = nn.functional.gelu(norm(finer.flatten(2).transpose(1, 2)))
    return tokens, grid


def vit_seg_base(out_channels: int, **overrides: Any) -> SegmentationViT:
    """The token head on `sw_vit_base`, which takes `overrides`."""
    return SegmentationViT(sw_vit_base(**overrides), out_channels)


def vit_seg_small(out_channels: int, **overrides: Any) -> SegmentationViT:
    """The token head on `sw_vit_small`."""
    return SegmentationViT(sw_vit_small(**overrides), out_channels)


def vit_seg_tiny(out_channels: int, **overrides: Any) -> SegmentationViT:
    """The token head on `sw_vit_tiny`."""
    return SegmentationViT(sw_vit_tiny(**overrides), out_channels)


def vit_conv_base(out_channels: int, width: int = 40, blocks: int = 2, **overrides: Any) -> ConvSegmentationViT:
    """Tokens and convolutions on `sw_vit_base`, which takes `overrides`."""
    return ConvSegmentationViT(sw_vit_base(**overrides), out_channels, width, blocks)


def vit_conv_small(out_channels: int, width: int = 32, blocks: int = 2, **overrides: Any) -> ConvSegmentationViT:
    """Tokens and convolutions on `sw_vit_small`."""
    return ConvSegmentationViT(sw_vit_small(**overrides), out_channels, width, blocks)


def vit_conv_tiny(out_channels: int, width: int = 24, blocks: int = 2, **overrides: Any) -> ConvSegmentationViT:
    """Tokens and convolutions on `sw_vit_tiny`."""
    return ConvSegmentationViT(sw_vit_tiny(**overrides), out_channels, width, blocks)


def vit_linear_base(out_channels: int, **overrides: Any) -> LinearSegmentationViT:
    """The linear map on `sw_vit_base`, which takes `overrides`."""
    return LinearSegmentationViT(sw_vit_base(**overrides), out_channels)


def vit_linear_small(out_channels: int, **overrides: Any) -> LinearSegmentationViT:
    """The linear map on `sw_vit_small`."""
    return LinearSegmentationViT(sw_vit_small(**overrides), out_channels)


def vit_linear_tiny(out_channels: int, **overrides: Any) -> LinearSegmentationViT:
    """The linear map on `sw_vit_tiny`."""
    return LinearSegmentationViT(sw_vit_tiny(**overrides), out_channels)
