"""SA-Swin (MICCAI 2024): a shared Swin encoder on a volume and its mirror image, SACA between the two, four heads.

Letters: volume `B C D H W`, tokens f and f~ `B L E` of its two sides, P the width of the projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.models.saca import SymmetryAwareBlock, look_across
from asa.models.swin import STRIDE, Swin
from asa.ops.symmetry import asymmetry, flip, pad_to_multiple

MAP_LEVEL = 1  # of the encoder, 1/4 of the resolution, where the asymmetry map is taken: coarser ones find less


@dataclass(frozen=True)
class Seen:
    """What the four heads say of volumes.

    Args:
        rotation: logits of the four quarter turns, `(B, 4)`.
        contrast: `(B, P)`, to be compared between views.
        volume: the restored volume, `(B, C, D, H, W)`.
        side, mirrored: z and z~ of the symmetry head, `(B, P)`.
    """

    rotation: Tensor
    contrast: Tensor
    volume: Tensor
    side: Tensor
    mirrored: Tensor


class SASwin(nn.Module):
    """The pretraining network. Encoder and SACA are what is used afterwards.

    The symmetry head reads the mean of f and that of f~ before SACA; the other three read SACA(f, f~).

    Args:
        img_size: volume size in voxels, one number or (D, H, W), that 32 divides. Whole volumes may have another.
        in_channels: channels C.
        embed_dim: width of the Swin's first level; E is 16 times that.
        depths, num_heads, window: of the Swin, see `asa.models.swin.Swin`.
        cross_heads: heads of SACA.
        norm: of SACA's block, `"pre"` or `"post"`.
        self_attention: of f before the cross-attention, as released.
        position: add the places' codes to f and f~ before SACA. Off as released, where SACA cannot know which token
            mirrors which.
        projection: width P.
        checkpointing: keep only each block's input for the gradient: less memory, one more forward pass of time.
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
        self.saca = SymmetryAwareBlock(width, cross_heads, norm=norm, self_attention=self_attention)
        self.position = position
        self.rotation = nn.Linear(width, 4)
        self.contrast = nn.Linear(width, projection)
        self.symmetry = nn.Linear(width, projection)
        self.decoder = _decoder(width, embed_dim, in_channels)

    def tokens(self, volume: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, f~ and SACA(f, f~), each `(B, L, E)`, of volumes and their mirror images `(B, C, D, H, W)`."""
        code = self.encoder.code(volume) if self.position else None
        return look_across(self.encoder, self.saca, volume, mirrored, code)

    def forward(self, volume: Tensor, mirrored: Tensor) -> Seen:
        """The heads' view of volumes whose mirror images lie beside them.

        Args:
            volume: `(B, C, D, H, W)`.
            mirrored: the same shape; voxel i is the counterpart of voxel i of `volume`.

        Raises:
            ValueError: shapes that do not fit; training in bfloat16 on a CPU with a depth at which PyTorch's
                convolution returns wrong gradients.
        """
        check_bfloat16_depth(volume)
        f, counterpart, fused = self.tokens(volume, mirrored)
        pooled = fused.mean(dim=1)
        grid = [size // STRIDE for size in volume.shape[2:]]
        return Seen(
            rotation=self.rotation(pooled),
            contrast=self.contrast(pooled),
            volume=self.decoder(fused.transpose(1, 2).unflatten(2, grid)),
            side=self.symmetry(f.mean(dim=1)),
            mirrored=self.symmetry(counterpart.mean(dim=1)),
        )

    def asymmetry(self, volume: Tensor, mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """How unlike its mirror image a volume is, without any training for it.

        Args:
            volume: `(B, C, D, H, W)` of any size.
            mirrored: what faces each voxel, of the same shape. None: the volume's own mirror image, for whole volumes
                with the mid-sagittal plane in the middle of W.

        Returns:
            The score (1 - cos(z, z~)) / 2, `(B,)`, and its map `(B, D, H, W)`: the same of the encoder's features at
            mirrored places, at 1/4 of the resolution, brought to the volume's grid. Both in float32, from 0 to 1, and
            exactly 0 where the volume is its own mirror image.
        """
        both = torch.cat([volume, flip(volume) if mirrored is None else mirrored])
        levels = self.encoder.levels(pad_to_multiple(both, STRIDE))
        padded = [size + -size % STRIDE for size in volume.shape[2:]]
        here, there = levels[MAP_LEVEL].chunk(2)
        found = F.interpolate(asymmetry(here, there, dim=1)[:, None], padded, mode="trilinear")[:, 0]
        side, other = self.symmetry(levels[-1].flatten(2).mean(dim=2)).chunk(2)
        d, h, w = volume.shape[2:]
        return asymmetry(side, other), found[:, :d, :h, :w]


def check_bfloat16_depth(volume: Tensor) -> None:
    """Raise a ValueError where PyTorch would compute wrong gradients of convolutions at five halved resolutions.

    oneDNN's bfloat16 weight gradient of a 3x3x3 convolution reads memory that was never written when the depth is 2,
    and only then: random gradients, now and then NaN (torch 2.13, AVX-512). A level has it for 32 and 64.
    """
    low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if low and torch.is_grad_enabled() and volume.device.type == "cpu" and volume.shape[2] in (32, 64):
        raise ValueError(
            f"a crop of depth {volume.shape[2]} cannot be trained in bf16 on a CPU, where PyTorch's "
            "convolution returns wrong gradients for it: take crop=[96, ...] or train.precision=fp32"
        )


def _decoder(width: int, embed_dim: int, channels: int) -> nn.Sequential:
    """Tokens as a map `(B, E, ...)` -> the volume `(B, C, D, H, W)`: a convolution a level, each followed by x2."""
    widths = [width, *(embed_dim * part for part in (8, 4, 2, 1, 1))]
    stages: list[nn.Module] = []
    for before, after in pairwise(widths):
        stages += [
            nn.Conv3d(before, after, 3, padding=1),
            nn.GroupNorm(1, after),  # instance norm has nothing to say of a single voxel
            nn.GELU(),
            nn.Upsample(scale_factor=2, mode="trilinear"),
        ]
    return nn.Sequential(*stages, nn.Conv3d(widths[-1], channels, 3, padding=1))


BASE: dict[str, Any] = dict(embed_dim=48, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24), window=7, cross_heads=12)
SMALL: dict[str, Any] = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24), window=7, cross_heads=12)
TINY: dict[str, Any] = dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window=4, cross_heads=4)


def sa_swin_base(**overrides: Any) -> SASwin:
    """The released network: width 48, two blocks a stage."""
    return SASwin(**{**BASE, **overrides})


def sa_swin_small(**overrides: Any) -> SASwin:
    """Half the width: for a workstation, or a CPU with patience."""
    return SASwin(**{**SMALL, **overrides})


def sa_swin_tiny(**overrides: Any) -> SASwin:
    """A quarter of the width, windows of 4^3 tokens: for tests and demonstrations on a CPU."""
    return SASwin(**{**TINY, **overrides})
