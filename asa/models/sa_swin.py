"""SA-Swin (MICCAI 2024): a shared Swin encoder for a volume and its mirror image, SACA between the two, four heads.

Letters: volume `B C D H W`, tokens f and f~ `B L E` of a volume and of its mirror image, M attention heads of width
d = E / M, projection width P.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.models.kernels import in_safe_precision
from asa.models.swin import STRIDE, Swin
from asa.ops.position import sincos_position_encoding
from asa.ops.symmetry import asymmetry, flip, pad_to_multiple

NORMS = ("pre", "post")
MAP_LEVEL = 0  # encoder level of the asymmetry map, 1/2 of the resolution: coarser ones are less sensitive


class SymmetryAwareCrossAttention(nn.Module):
    """SACA(f, f~) = softmax(Q K~^T / sqrt(d)) V~ per head, Q from f, K~ and V~ from f~, then a linear map of all heads.

    The equation is that of the paper's abstract; heads and the last map are as in its released code. SACA(f, f) is
    self-attention. It has no position encoding: permuting f~ changes nothing, permuting f permutes the output. A
    ValueError for a token width `dim` (E) that is not divisible by the heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a token width of {dim} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mirrored: Tensor) -> Tensor:
        """Attend from f `(B, L, E)` to f~ `(B, any number, E)`: `(B, L, E)`."""
        query = self._heads(self.query(tokens))
        key, value = (self._heads(part) for part in self.key_value(mirrored).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B M L d


class SymmetryAwareBlock(nn.Module):
    """Self-attention of f, cross-attention from f to f~ and an MLP, each with a residual connection.

    One layer of the released code.

    Args:
        dim, num_heads: token width E and attention heads M.
        norm: `"pre"` normalises the input of each part, `"post"` the sum of its input and output.
        self_attention: False leaves out the first part.
        position: add a plain sin-cos position encoding to f and f~. Without it, as released, the block cannot know
            which token is the counterpart of which.

    Raises:
        ValueError: another norm, or a width that is not divisible by the heads.
    """

    def __init__(
        self, dim: int, num_heads: int, norm: str = "pre", self_attention: bool = True, position: bool = False
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"the norm of the symmetry-aware block must be {' or '.join(NORMS)}, got {norm!r}")
        self.pre, self.position = norm == "pre", position
        self.attention = SymmetryAwareCrossAttention(dim, num_heads) if self_attention else None
        self.norm1 = nn.LayerNorm(dim) if self_attention else None
        self.cross = SymmetryAwareCrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, mirrored: Tensor, grid: Sequence[int] = ()) -> Tensor:
        """Update f from itself and from f~, both `(B, L, E)` in raster order of a `grid`: `(B, L, E)`.

        The grid, tokens along each axis, is needed with `position` only.
        """
        if self.position:
            encoding = sincos_position_encoding(grid, tokens.shape[2], device=tokens.device)  # L E
            tokens, mirrored = tokens + encoding, mirrored + encoding
        if self.attention is not None and self.norm1 is not None:
            inside = self.norm1(tokens) if self.pre else tokens
            tokens = tokens + self.attention(inside, inside)
            tokens = tokens if self.pre else self.norm1(tokens)
        if self.pre:
            tokens = tokens + self.cross(self.norm2(tokens), self.norm2(mirrored))
            return tokens + self.mlp(self.norm3(tokens))
        tokens = self.norm2(tokens + self.cross(tokens, mirrored))
        return self.norm3(tokens + self.mlp(tokens))


def with_mirror(volume: Tensor, mirrored: Tensor | None) -> Tensor:
    """Volumes `(B, C, D, H, W)` and their mirror images in one batch, `(2 B, ...)`; a ValueError without the latter."""
    if mirrored is None:
        raise ValueError("this network compares a volume with its mirror image: pass both")
    return torch.cat([volume, mirrored])


@dataclass(frozen=True)
class SASwinOutput:
    """Outputs of the four heads."""

    rotation: Tensor  # logits of the four rotations by quarter turns, (B, 4)
    contrast: Tensor  # projection for the contrastive loss, (B, P)
    volume: Tensor  # the inpainted volume, (B, C, D, H, W)
    side: Tensor  # z of the symmetry head, (B, P)
    mirrored: Tensor  # z~


class SASwin(nn.Module):
    """The pretraining network. Its encoder and SACA are what downstream networks start from.

    The symmetry head reads the mean of f and that of f~ before SACA; the other three read SACA(f, f~).

    Args:
        cross_heads, norm, self_attention, position: see `SymmetryAwareBlock`.
        projection: width P.
        img_size: of training, divisible by 32; this and all others are of the encoder, see `asa.models.swin.Swin`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 96,
        in_channels: int = 1,
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        cross_heads: int = 12,
        norm: str = "pre",
        self_attention: bool = True,
        position: bool = False,
        projection: int = 512,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Swin(img_size, in_channels, embed_dim, depths, num_heads, window, checkpointing)
        width = self.encoder.embed_dim
        self.saca = SymmetryAwareBlock(width, cross_heads, norm, self_attention, position)
        self.rotation = nn.Linear(width, 4)
        self.contrast = nn.Linear(width, projection)
        self.symmetry = nn.Linear(width, projection)
        self.decoder = Decoder(width, embed_dim, in_channels)

    def tokens(self, volume: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, f~ and SACA(f, f~), each `(B, L, E)`, of volumes and their mirror images `(B, C, D, H, W)`."""
        f, counterpart = self.encoder(with_mirror(volume, mirrored)).chunk(2)
        return f, counterpart, self.saca(f, counterpart, self.encoder.token_grid(volume))

    def forward(self, volume: Tensor, mirrored: Tensor) -> SASwinOutput:
        """The heads' outputs for volumes `(B, C, D, H, W)` and their mirror images, whose voxel i belongs to voxel i.

        Raises:
            ValueError: shapes that the encoder does not take.
        """
        f, counterpart, fused = self.tokens(volume, mirrored)
        pooled = fused.mean(dim=1)
        return SASwinOutput(
            rotation=self.rotation(pooled),
            contrast=self.contrast(pooled),
            volume=self.decoder(fused.transpose(1, 2).unflatten(2, self.encoder.token_grid(volume))),
            side=self.symmetry(f.mean(dim=1)),
            mirrored=self.symmetry(counterpart.mean(dim=1)),
        )

    def asymmetry(
        self, volume: Tensor, mirrored: Tensor | None = None, level: int = MAP_LEVEL
    ) -> tuple[Tensor, Tensor]:
        """Asymmetry of volumes `(B, C, D, H, W)` of any size: how much they differ from their mirror images. Zero-shot.

        The map is computed from the encoder's features at one resolution and resampled to the volume's grid. Each
        channel is standardised first, over the foreground of both sides: features have a large common mean, next to
        which differences are small.

        Args:
            mirrored: the counterpart of each voxel. None: the volume's own mirror image, for whole volumes with the
                mid-sagittal plane in the middle of W.
            level: of the features that the map compares: 0 for 1/2 of the resolution, 1 for 1/4, to 4 for 1/32.

        Returns:
            The score (1 - cos(z, z~)) / 2, `(B,)`, and a map `(B, D, H, W)` of (1 - cos) / 2 between the features of
            each voxel and of its counterpart. Without `mirrored` the map is averaged with its own mirror image, so
            that the flipped volume has the flipped map. Both are float32 from 0 to 1, and exactly 0 for a volume
            that equals its mirror image.
        """
        both = torch.cat([volume, flip(volume) if mirrored is None else mirrored])
        padded = pad_to_multiple(both, STRIDE)
        levels = self.encoder.levels(padded)
        here, there = _standardised(levels[level], padded)
        coarse = asymmetry(here, there, dim=1)[:, None]
        fine = F.interpolate(coarse, padded.shape[2:], mode="trilinear")[:, 0]
        d, h, w = volume.shape[2:]
        fine = fine[:, :d, :h, :w]
        side, other = self.symmetry(levels[-1].flatten(2).mean(dim=2)).chunk(2)
        return asymmetry(side, other), fine if mirrored is not None else (fine + flip(fine)) / 2


def _standardised(features: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """Features `(2 B, E, ...)` in two halves, standardised per channel over the foreground of both, `both` != 0."""
    head = (both != 0).any(dim=1, keepdim=True).float()
    one, other = F.interpolate(head, features.shape[2:], mode="area").chunk(2)  # fraction of foreground
    sides, voxels = features.float().chunk(2), (one + other).sum(dim=(2, 3, 4), keepdim=True).clamp(min=1)

    def average(here: Tensor, there: Tensor) -> Tensor:
        # Each side is summed by itself first: the same to the bit with the sides exchanged.
        sums = [(part * inside).sum(dim=(2, 3, 4), keepdim=True) for part, inside in ((here, one), (there, other))]
        return (sums[0] + sums[1]) / voxels

    mean = average(*sides)
    here, there = (side - mean for side in sides)
    deviation = average(here.square(), there.square()).sqrt() + 1e-6
    return here / deviation, there / deviation


class Decoder(nn.Sequential):
    """Tokens as a map to the volume: one convolution per level, each followed by x2, in the precision that is safe."""

    def __init__(self, width: int, embed_dim: int, channels: int) -> None:
        widths = [width, *(embed_dim * factor for factor in (8, 4, 2, 1, 1))]
        stages: list[nn.Module] = []
        for before, after in pairwise(widths):
            stages += [
                nn.Conv3d(before, after, 3, padding=1),
                nn.GroupNorm(1, after),  # an instance norm of a single voxel would be 0
                nn.GELU(),
                nn.Upsample(scale_factor=2, mode="trilinear"),
            ]
        super().__init__(*stages, nn.Conv3d(widths[-1], channels, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """`(B, E, ...)` -> `(B, C, D, H, W)`."""
        for stage in self:
            features = in_safe_precision(stage, features)
        return features


def swin_with_saca(
    cross_heads: int, norm: str = "pre", self_attention: bool = True, position: bool = False, **encoder: Any
) -> tuple[Swin, SymmetryAwareBlock]:
    """Encoder and symmetry-aware block of a network that starts from SA-Swin; `encoder`: keywords of the Swin."""
    swin = Swin(**encoder)
    return swin, SymmetryAwareBlock(swin.embed_dim, cross_heads, norm, self_attention, position)


BASE: dict[str, Any] = dict(embed_dim=48, num_heads=(3, 6, 12, 24), window=7, cross_heads=12)
SMALL: dict[str, Any] = {**BASE, "embed_dim": 24}
TINY: dict[str, Any] = dict(embed_dim=12, num_heads=(1, 2, 4, 8), window=4, cross_heads=4)


def sa_swin_base(**overrides: Any) -> SASwin:
    """The released network: width 48, two blocks per stage."""
    return SASwin(**{**BASE, **overrides})


def sa_swin_small(**overrides: Any) -> SASwin:
    """Half the width: for a single workstation GPU."""
    return SASwin(**{**SMALL, **overrides})


def sa_swin_tiny(**overrides: Any) -> SASwin:
    """A quarter of the width, windows of 4^3 tokens: for tests and demonstrations on a CPU."""
    return SASwin(**{**TINY, **overrides})
