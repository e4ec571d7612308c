"""Segmentation with SA-Swin: a Swin encoder, SACA at the bottleneck, and the decoder of SwinUNETR.

Letters: volume `B C D H W`, Swin width e (= the decoder's feature size), level k = 0..4 of the encoder at 1 / 2^(k+1),
K output channels.
"""

import math
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

from asa.models import sa_swin
from asa.models.sa_swin import check_bfloat16_depth
from asa.models.saca import SymmetryAwareBlock
from asa.models.swin import STRIDE, Swin

BOTTLENECK = 4


class SASwinUNet(nn.Module):
    """SwinUNETR (Tang et al., CVPR 2022) whose deepest features have looked at those of the mirror image.

    Args:
        encoder: the Swin.
        out_channels: classes K, background included.
        saca: of the bottleneck.
        across: heads of a SACA at further levels, by level: `{3: 6}`. Attention there is over all tokens of a window.
        position: add the places' codes before the bottleneck's SACA, as in `asa.models.sa_swin.SASwin`.

    Raises:
        ValueError: a window of one token, or a level that there is not.
    """

    mirrored = True

    def __init__(
        self,
        encoder: Swin,
        out_channels: int,
        saca: SymmetryAwareBlock,
        across: dict[int, int] | None = None,
        position: bool = False,
    ) -> None:
        super().__init__()
        if math.prod(encoder.grid) == 1:
            raise ValueError(f"the U-Net takes volumes larger than {STRIDE}^3 voxels, got {encoder.img_size}")
        further = {int(level): heads for level, heads in (across or {}).items()}  # JSON knows keys of text only
        if wrong := [level for level in further if level not in range(BOTTLENECK)]:
            raise ValueError(f"model.across names level {wrong[0]}: the levels beside the bottleneck are 0 to 3")
        self.encoder, self.saca, self.position, self.out_channels = encoder, saca, position, out_channels
        widths = encoder.widths  # e, 2e, 4e, 8e, 16e
        self.across = nn.ModuleDict(
            {str(level): SymmetryAwareBlock(widths[level], heads) for level, heads in further.items()}
        )
        block: dict[str, Any] = dict(spatial_dims=3, kernel_size=3, norm_name="instance", res_block=True)
        self.image_block = UnetrBasicBlock(in_channels=encoder.in_channels, out_channels=widths[0], stride=1, **block)
        self.skips = nn.ModuleList(
            UnetrBasicBlock(in_channels=width, out_channels=width, stride=1, **block) for width in widths[:3]
        )
        self.bottleneck = UnetrBasicBlock(in_channels=widths[4], out_channels=widths[4], stride=1, **block)
        ups = [(widths[4], widths[3]), (widths[3], widths[2]), (widths[2], widths[1]), (widths[1], widths[0])]
        self.ups = nn.ModuleList(
            UnetrUpBlock(in_channels=before, out_channels=after, upsample_kernel_size=2, **block)
            for before, after in [*ups, (widths[0], widths[0])]
        )
        self.head = UnetOutBlock(spatial_dims=3, in_channels=widths[0], out_channels=out_channels)

    def forward(
        self, volume: Tensor, deep_supervision: bool = False, mirrored: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Segment volumes.

        Args:
            volume: `(B, C, D, H, W)`.
            deep_supervision: return a list; this network has one resolution to supervise.
            mirrored: what faces each voxel of the volume, of the same shape.

        Returns:
            Logits `(B, K, D, H, W)`, or a list of these.

        Raises:
            ValueError: the mirror images are missing; training in bfloat16 on a CPU with a depth at which PyTorch's
                convolution returns wrong gradients.
        """
        if mirrored is None:
            raise ValueError("this network compares a volume with its mirror image: give both")
        check_bfloat16_depth(volume)
        levels = self.encoder.levels(torch.cat([volume, mirrored]))
        code = self.encoder.code(volume) if self.position else None
        seen = []
        for level, both in enumerate(levels):
            f, counterpart = both.chunk(2)
            if level == BOTTLENECK:
                f = _look(self.saca, f, counterpart, code)
            elif str(level) in self.across:
                f = _look(self.across[str(level)], f, counterpart, None)
            seen.append(f)
        skips = [self.image_block(volume), *(skip(f) for skip, f in zip(self.skips, seen, strict=False)), seen[3]]
        features = self.bottleneck(seen[BOTTLENECK])
        for up in self.ups:
            features = up(features, skips.pop())
        logits = self.head(features)
        return [logits] if deep_supervision else logits


def _look(block: nn.Module, f: Tensor, counterpart: Tensor, code: Tensor | None) -> Tensor:
    """A block of tokens on maps `(B, E, ...)`."""
    tokens, others = (part.flatten(2).transpose(1, 2) for part in (f, counterpart))
    return block(tokens, others, code).transpose(1, 2).unflatten(2, f.shape[2:])


def sa_swin_unet_base(out_channels: int, **overrides: Any) -> SASwinUNet:
    """On the released encoder and cross-attention; `overrides` as for `asa.models.sa_swin.SASwin`, and `across`."""
    return _unet(out_channels, **{**sa_swin.BASE, **overrides})


def sa_swin_unet_small(out_channels: int, **overrides: Any) -> SASwinUNet:
    """On those of `sa_swin_small`: for a workstation, or a CPU with patience."""
    return _unet(out_channels, **{**sa_swin.SMALL, **overrides})


def sa_swin_unet_tiny(out_channels: int, **overrides: Any) -> SASwinUNet:
    """On those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    return _unet(out_channels, **{**sa_swin.TINY, **overrides})


def _unet(
    out_channels: int,
    cross_heads: int,
    norm: str = "pre",
    self_attention: bool = True,
    position: bool = False,
    across: dict[int, int] | None = None,
    **encoder: Any,
) -> SASwinUNet:
    swin = Swin(**encoder)
    saca = SymmetryAwareBlock(swin.embed_dim, cross_heads, norm=norm, self_attention=self_attention)
    return SASwinUNet(swin, out_channels, saca, across, position)
