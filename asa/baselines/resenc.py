"""ResEnc-L: nnU-Net with a residual encoder (Isensee et al., "nnU-Net Revisited", MICCAI 2024).

Letters: volume `B C D H W`, feature maps of level l `B F_l D/2^l H/2^l W/2^l`, K output channels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from asa.baselines.base import Comparator
from asa.models.transfer import other_channels
from asa.ops.patches import grid_size, triple


class ConvNorm(nn.Module):
    """A convolution that keeps the size, or with stride 2 halves it, and an instance norm."""

    def __init__(self, before: int, after: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(before, after, kernel, stride, padding=kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(after, affine=True)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, F, D, H, W)` -> the same with other channels."""
        return self.norm(self.conv(features))


class ResidualBlock(nn.Module):
    """Two convolutions beside a path that is pooled where they stride, and projected where they widen (ResNet-D)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(before, after, stride=stride), ConvNorm(after, after)
        pool = nn.AvgPool3d(stride) if stride > 1 else nn.Identity()
        project = ConvNorm(before, after, kernel=1, bias=False) if before != after else nn.Identity()
        self.skip = nn.ModuleDict({"pool": pool, "project": project})

    def forward(self, features: Tensor) -> Tensor:
        """`(B, F, D, H, W)` -> the same with other channels, each size divided by the stride."""
        straight = self.skip["project"](self.skip["pool"](features))
        return leaky_relu(self.conv2(leaky_relu(self.conv1(features))) + straight)


class ResidualEncoder(nn.Module):
    """The encoder: a stem, and a stage of residual blocks at each level, of `widths` F_l."""

    def __init__(
        self, img_size: int | Sequence[int], in_channels: int, widths: Sequence[int], blocks: Sequence[int]
    ) -> None:
        super().__init__()
        self.img_size, self.in_channels, self.widths = triple(img_size), in_channels, list(widths)
        grid_size(self.img_size, 2 ** (len(widths) - 1), several=True)  # checks it: one last voxel has no variance
        self.stem = ConvNorm(in_channels, widths[0])
        self.stages = nn.ModuleList()
        for level, (before, after) in enumerate(pairwise([widths[0], *widths])):
            first = ResidualBlock(before, after, stride=1 if level == 0 else 2)
            others = (ResidualBlock(after, after, 1) for _ in range(blocks[level] - 1))
            self.stages.append(nn.Sequential(first, *others))

    def forward(self, volume: Tensor) -> list[Tensor]:
        """The feature maps of all levels, from the finest, of a volume `(B, C, D, H, W)`."""
        maps = [leaky_relu(self.stem(volume))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]

    def layers_above(self, name: str) -> int:
        """Stages between a parameter and the last level: 0 for that level's."""
        return len(self.stages) - (1 + int(name.split(".")[1]) if name.startswith("stages.") else 0)

    def adapted(self, name: str, tensor: Tensor, patch_size: int | None) -> tuple[Tensor, str]:
        """A checkpoint's tensor for this number of channels, and what was changed; see `other_channels`."""
        return other_channels(tensor, self.in_channels) if name == "stem.conv.weight" else (tensor, "")


class Decoder(nn.Module):
    """The decoder: a transposed convolution, the encoder's features, one convolution, and logits at each level."""

    def __init__(self, widths: Sequence[int], out_channels: int) -> None:
        super().__init__()
        steps = [(below, width) for width, below in pairwise(widths)][::-1]
        self.ups = nn.ModuleList(nn.ConvTranspose3d(below, width, 2, 2) for below, width in steps)
        self.convs = nn.ModuleList(ConvNorm(2 * width, width) for _, width in steps)
        self.heads = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for _, width in steps)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Logits `(B, K, D/2^l, H/2^l, W/2^l)`, from the finest, of the encoder's feature maps."""
        features, logits = maps[-1], []
        for skip, up, conv, head in zip(maps[-2::-1], self.ups, self.convs, self.heads, strict=True):
            features = leaky_relu(conv(torch.cat((up(features), skip), dim=1)))
            logits.append(head(features))
        return logits[::-1]


def resenc_l(
    out_channels: int,
    img_size: int | Sequence[int] = 160,
    in_channels: int = 1,
    widths: Sequence[int] = (32, 64, 128, 256, 320, 320),
    blocks: Sequence[int] = (1, 3, 4, 6, 6, 6),
) -> Comparator:
    """ResEnc-L with its published sizes, as nnU-Net plans it for crops of 160^3 voxels: six levels, 32 to 320 features.

    102.35 million parameters for one channel and one class, as many as of the package dynamic-network-architectures.
    """
    decoder, encoder = Decoder(widths, out_channels), ResidualEncoder(img_size, in_channels, widths, blocks)
    model = Comparator(decoder, encoder, out_channels)
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ResidualBlock):  # each block starts as its straight path
            nn.init.zeros_(module.conv2.norm.weight)
    return model


def resenc_tiny(out_channels: int, **overrides: Any) -> Comparator:
    """ResEnc with five narrow levels of fewer blocks: for tests and demonstrations on a CPU."""
    narrow = dict(img_size=64, widths=(8, 16, 32, 64, 64), blocks=(1, 1, 2, 2, 2))
    return resenc_l(out_channels, **{**narrow, **overrides})
