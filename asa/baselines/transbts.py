"""TransBTS: a transformer at the bottom of a 3-D CNN (Wang et al., MICCAI 2021).

Where the paper leaves a detail open, it is that of the released code.

Letters: volume `B C D H W`, first width F, tokens `B L E` of an eighth of the volume's sizes, K output channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.blocks.transformerblock import TransformerBlock
from torch import Tensor, nn

from asa.baselines.base import Comparator, Window, conv3
from asa.errors import require
from asa.ops.patches import grid_size, triple

STRIDE = 8
BLOCKS = (1, 2, 2, 4)  # residual blocks at each resolution of the encoder


class TransBTS(nn.Module):
    """Residual encoder, transformer on its deepest features, and a decoder with the encoder's features."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int, int],
        width: int = 16,  # F, at full resolution
        embed_dim: int = 512,
        depth: int = 4,
        heads: int = 8,
        hidden: int = 4096,  # width of the MLPs
    ) -> None:
        super().__init__()
        self.grid = grid
        widths = [width * 2**level for level in range(len(BLOCKS))]
        self.stem = nn.Sequential(conv3(in_channels, width), nn.Dropout3d(0.2))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResBlock(3, size, ("group", {"num_groups": 8})) for _ in range(count)))
            for size, count in zip(widths, BLOCKS, strict=True)
        )
        self.downs = nn.ModuleList(conv3(size, 2 * size, stride=2) for size in widths[:-1])
        self.embed = nn.Sequential(nn.BatchNorm3d(widths[-1]), nn.ReLU(), conv3(widths[-1], embed_dim))
        self.position = nn.Parameter(torch.zeros(1, grid[0] * grid[1] * grid[2], embed_dim))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, hidden, heads, 0.1) for _ in range(depth))
        for block in self.blocks:
            block.norm_cross_attn = nn.Identity()  # made for other networks: a parameter without a gradient stops DDP
        self.norm = nn.LayerNorm(embed_dim)
        self.bottom = nn.Sequential(_double(embed_dim, widths[-1]), Residual(widths[-1]))
        self.ups = nn.ModuleList(Up(2 * size, size) for size in widths[-2::-1])
        self.head = nn.Conv3d(width, out_channels, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> logits `(B, K, D, H, W)`."""
        features, skips = self.stem(volume), []
        for stage, down in zip(self.stages, self.downs, strict=False):
            skips.append(stage(features))
            features = down(skips[-1])
        tokens = self.embed(self.stages[-1](features)).flatten(2).transpose(1, 2)  # B L E
        tokens = self.drop(tokens + self.position)
        for block in self.blocks:
            tokens = block(tokens)
        features = self.bottom(self.norm(tokens).transpose(1, 2).unflatten(2, self.grid))
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            features = up(features, skip)
        return self.head(features)


class Residual(nn.Module):
    """Two convolutions with batch norm, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = _double(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, F, D, H, W)` -> the same."""
        return features + self.convs(features)


class Up(nn.Module):
    """Features at twice the resolution, joined with the encoder's."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Conv3d(before, after, 1), nn.ConvTranspose3d(after, after, 2, 2))
        self.join = nn.Sequential(nn.Conv3d(2 * after, after, 1), Residual(after))

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """`(B, 2F, D, H, W)` and `(B, F, 2D, 2H, 2W)` -> the shape of the second."""
        return self.join(torch.cat((skip, self.up(features)), dim=1))


def _double(before: int, after: int) -> nn.Sequential:
    halves = (nn.Sequential(conv3(a, after), nn.BatchNorm3d(after), nn.ReLU()) for a in (before, after))
    return nn.Sequential(*halves)


def transbts_base(
    out_channels: int, img_size: int | Sequence[int] = 128, in_channels: int = 1, **sizes: int
) -> Comparator:
    """TransBTS with its published sizes: 16 features, 4 blocks of width 512 with MLPs of 4096 and 8 heads.

    32.72 million parameters for four channels, four classes and 128^3 voxels. 32.99 are printed for it: the
    released code also makes a linear layer of 0.26 million that it never calls.
    """
    require("einops", "swin", "MONAI's transformer block in TransBTS")
    size = triple(img_size)
    grid = grid_size(size, STRIDE, several=True)
    return Comparator(TransBTS(in_channels, out_channels, grid, **sizes), Window(size, in_channels), out_channels)


def transbts_tiny(out_channels: int, **overrides: Any) -> Comparator:
    """TransBTS with narrow layers: for tests and demonstrations on a CPU."""
    narrow = dict(img_size=64, width=8, embed_dim=64, depth=2, heads=4, hidden=128)
    return transbts_base(out_channels, **{**narrow, **overrides})
