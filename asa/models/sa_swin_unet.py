"""Segmentation with SA-Swin: a Swin encoder, SACA at the bottleneck, and the decoder of SwinUNETR.

Letters: volume `B C D H W`, Swin width e (= the decoder's feature size), K output channels; level k = 0..4 of the
encoder has 1 / 2^(k+1) of the resolution.
"""

from itertools import pairwise
from typing import Any

from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

from asa.models import sa_swin
from asa.models.kernels import in_safe_precision
from asa.models.sa_swin import SymmetryAwareBlock, with_mirror
from asa.models.swin import STRIDE, Swin
from asa.ops.patches import grid_size

BOTTLENECK = 4


class SASwinUNet(nn.Module):
    """SwinUNETR (Tang et al., CVPR 2022) whose deepest features cross-attend to those of the mirror image.

    Args:
        out_channels: classes K, background included.
        saca: the symmetry-aware block of the bottleneck.
        across: attention heads of such blocks at further levels, by level: `{3: 6}`. Each attends over all its tokens.

    Raises:
        ValueError: a volume of one token, or a level that does not exist.
    """

    mirrored = True

    def __init__(
        self, encoder: Swin, out_channels: int, saca: SymmetryAwareBlock, across: dict[int, int] | None = None
    ) -> None:
        super().__init__()
        grid_size(encoder.img_size, STRIDE, several=True)  # checks the size
        further = {int(level): heads for level, heads in (across or {}).items()}  # keys are strings in JSON
        if wrong := [level for level in further if level not in range(BOTTLENECK)]:
            raise ValueError(f"model.across names level {wrong[0]}: the levels besides the bottleneck are 0 to 3")
        self.encoder, self.saca, self.out_channels = encoder, saca, out_channels
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
        self.ups = nn.ModuleList(
            UnetrUpBlock(in_channels=a, out_channels=b, upsample_kernel_size=2, **block)
            for a, b in pairwise([*reversed(widths), widths[0]])
        )
        self.head = UnetOutBlock(spatial_dims=3, in_channels=widths[0], out_channels=out_channels)

    def forward(
        self, volume: Tensor, deep_supervision: bool = False, mirrored: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Logits `(B, K, D, H, W)` of volumes `(B, C, D, H, W)`, with `deep_supervision` in a list of one resolution.

        `mirrored` are the mirror images: voxel i is the counterpart of the volume's voxel i; a ValueError without them.
        """
        fused = []
        for level, both in enumerate(self.encoder.levels(with_mirror(volume, mirrored))):
            f, counterpart = both.chunk(2)
            if level == BOTTLENECK:
                f = _cross_attend(self.saca, f, counterpart)
            elif str(level) in self.across:
                f = _cross_attend(self.across[str(level)], f, counterpart)
            fused.append(f)
        skips = [self.image_block(volume), *(skip(f) for skip, f in zip(self.skips, fused, strict=False)), fused[3]]
        features = in_safe_precision(self.bottleneck, fused[BOTTLENECK])
        for up in self.ups:
            features = in_safe_precision(up, features, skips.pop())
        logits = self.head(features)
        return [logits] if deep_supervision else logits


def _cross_attend(block: nn.Module, f: Tensor, counterpart: Tensor) -> Tensor:
    """Apply a symmetry-aware block to maps of tokens `(B, E, ...)`."""
    tokens, others = (part.flatten(2).transpose(1, 2) for part in (f, counterpart))
    return block(tokens, others, f.shape[2:]).transpose(1, 2).unflatten(2, f.shape[2:])


def sa_swin_unet_base(out_channels: int, **overrides: Any) -> SASwinUNet:
    """With the released encoder and SACA; `overrides` are keywords of `asa.models.sa_swin.SASwin`, and `across`."""
    return _unet(out_channels, **{**sa_swin.BASE, **overrides})


def sa_swin_unet_small(out_channels: int, **overrides: Any) -> SASwinUNet:
    """With those of `sa_swin_small`: for a single workstation GPU."""
    return _unet(out_channels, **{**sa_swin.SMALL, **overrides})


def sa_swin_unet_tiny(out_channels: int, **overrides: Any) -> SASwinUNet:
    """With those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    return _unet(out_channels, **{**sa_swin.TINY, **overrides})


def _unet(out_channels: int, across: dict[int, int] | None = None, **overrides: Any) -> SASwinUNet:
    swin, saca = sa_swin.swin_with_saca(**overrides)
    return SASwinUNet(swin, out_channels, saca, across)
