"""The segmentation U-Net on a token encoder (ASA, MICCAI 2022, section 2.2).

Letters: volume `B C D H W`, feature size f, patch size s, K output channels. Level k has 1 / 2^k of the volume's
resolution and f * 2^k channels.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from asa.models import sw_vit
from asa.models.kernels import in_float32, use_own_kernels
from asa.models.sa_swin import SymmetryAwareBlock, with_mirror
from asa.models.sw_vit import SWViT, run_block
from asa.ops.patches import grid_size, token_map
from asa.ops.symmetry import mirror_patches

LEVELS = 6  # resolutions 1 to 1/32
HEADS = 5  # resolutions with a segmentation head: 1 to 1/16
BLOCK: dict[str, Any] = dict(spatial_dims=3, kernel_size=3, norm_name="instance")  # of all convolutions


class SegmentationUNet(nn.Module):
    """U-Net whose skips are hidden states of a transformer, brought to six resolutions by residual convolutions.

    Level 0 reads the image; levels 1 to 5 read the hidden states after 3/12, 5/12, 7/12, 9/12 and all of the encoder's
    blocks, upsampled or downsampled from the token grid. The decoder has five up blocks with skips, and a 1x1x1 head
    at each of the five finest levels.

    Args:
        out_channels, feature_size: classes K, background included; channels f of the finest level.
        checkpointing: as of the encoder, which has a keyword of its own.
        symmetry: the last tokens cross-attend to those of the mirror image (SACA) before they are decoded. That
            attention is over all pairs of tokens.

    Raises:
        ValueError: a volume size that is not divisible by 32 or too small for six levels; a patch size that is not a
            power of two.
    """

    def __init__(
        self,
        encoder: SWViT,
        out_channels: int,
        feature_size: int = 24,
        checkpointing: bool = False,
        symmetry: bool = False,
    ) -> None:
        super().__init__()
        grid_size(encoder.img_size, 2 ** (LEVELS - 1), several=True)  # checks the size
        scale = encoder.patch_size.bit_length() - 1
        if 2**scale != encoder.patch_size:
            raise ValueError(f"the U-Net takes patches of 2, 4, 8, ... voxels, got {encoder.patch_size}")
        self.encoder = encoder
        self.out_channels, self.checkpointing = out_channels, checkpointing
        self.saca = SymmetryAwareBlock(encoder.embed_dim, encoder.num_heads) if symmetry else None
        self.mirrored = symmetry  # whether the network also takes the mirror image
        depth = len(encoder.blocks)
        # The states after blocks 3, 5, 7, 9 and 12 of 12.
        self.taps = [max(round(depth * part / 12), 1) - 1 for part in (3, 5, 7, 9, 12)]
        width = [feature_size * 2**level for level in range(LEVELS)]
        self.image_block = UnetrBasicBlock(
            in_channels=encoder.in_channels, out_channels=width[0], stride=1, res_block=True, **BLOCK
        )
        self.skips = nn.ModuleList(_skip(encoder.embed_dim, width, scale, level) for level in range(1, LEVELS))
        self.ups = nn.ModuleList(
            UnetrUpBlock(in_channels=a, out_channels=b, upsample_kernel_size=2, res_block=True, **BLOCK)
            for a, b in pairwise(reversed(width))
        )
        self.heads = nn.ModuleList(
            UnetOutBlock(spatial_dims=3, in_channels=width[level], out_channels=out_channels) for level in range(HEADS)
        )
        use_own_kernels(self)

    def forward(
        self, volume: Tensor, deep_supervision: bool = False, mirrored: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Segment volumes `(B, C, D, H, W)`: logits `(B, K, D, H, W)`.

        Args:
            deep_supervision: return a list of the logits of all five heads, from the finest to the coarsest.
            mirrored: with `symmetry`, the mirror image: voxel i is the counterpart of the volume's voxel i.

        Raises:
            ValueError: a volume of another size than the encoder's, or a missing mirror image.
        """
        states = self._states(volume, mirrored)
        skips = [_run(0, self.image_block, volume, checkpointing=self.checkpointing)]
        for level, (tap, skip) in enumerate(zip(self.taps, self.skips, strict=True), start=1):
            features = _run(level, skip, token_map(states[tap], self.encoder.grid), checkpointing=self.checkpointing)
            finer = self.encoder.patch_size >> level  # voxels of this level along a token
            skips.append(mirror_patches(features, finer) if self.encoder.mirror_patches and finer > 1 else features)
        features = skips.pop()
        decoded = []
        for up in self.ups:
            level = len(skips) - 1
            features = _run(level, up, features, skips.pop(), checkpointing=self.checkpointing)
            decoded.append(features)
        decoded.reverse()
        if deep_supervision:
            return [head(features) for head, features in zip(self.heads, decoded, strict=True)]
        return self.heads[0](decoded[0])

    def _states(self, volume: Tensor, mirrored: Tensor | None) -> list[Tensor]:
        """The encoder's hidden states; with `symmetry` the last one after cross-attention to the mirror image's."""
        if self.saca is None:
            return self.encoder.hidden_states(volume)
        both = [state.chunk(2) for state in self.encoder.hidden_states(with_mirror(volume, mirrored))]
        return [*(own for own, _ in both[:-1]), run_block(self.saca, *both[-1], checkpointing=self.checkpointing)]


def _run(level: int, block: nn.Module, *maps: Tensor, checkpointing: bool) -> Tensor:
    """A block's output: on a CPU with channels last, and in float32 at the two coarsest levels.

    The layout avoids oneDNN's own, which pads 24 channels to 32. At the coarsest levels a bfloat16 convolution may be
    wrong: where a depth is 2, or a strided one ends at a width of 1.
    """
    layout = torch.channels_last_3d if maps[0].device.type == "cpu" else torch.contiguous_format
    maps = tuple(features.contiguous(memory_format=layout) for features in maps)
    run = partial(run_block, block, checkpointing=checkpointing)
    return in_float32(run, *maps) if level >= LEVELS - 2 else run(*maps)


def _skip(embed_dim: int, width: list[int], scale: int, level: int) -> nn.Module:
    """Token map at 1 / 2^scale -> features of a level, by transposed or strided convolutions."""
    if level < scale:
        return UnetrPrUpBlock(
            in_channels=embed_dim, out_channels=width[level], num_layer=scale - level - 1, stride=1,
            upsample_kernel_size=2, conv_block=True, res_block=True, **BLOCK,
        )  # fmt: skip
    if level == scale:
        return UnetrBasicBlock(in_channels=embed_dim, out_channels=width[level], stride=1, res_block=True, **BLOCK)
    widths = [embed_dim, *width[scale + 1 : level + 1]]
    return nn.Sequential(*(UnetResBlock(in_channels=a, out_channels=b, stride=2, **BLOCK) for a, b in pairwise(widths)))


def unet_base(out_channels: int, feature_size: int = 24, **overrides: Any) -> SegmentationUNet:
    """The paper's segmentation network; `overrides` are keywords of the U-Net and of its encoder, `sw_vit_base`."""
    return _unet(sw_vit.sw_vit_base, out_channels, feature_size, **overrides)


def unet_small(out_channels: int, feature_size: int = 16, **overrides: Any) -> SegmentationUNet:
    """The U-Net on `sw_vit_small`: for a single workstation GPU."""
    return _unet(sw_vit.sw_vit_small, out_channels, feature_size, **overrides)


def unet_tiny(out_channels: int, feature_size: int = 8, **overrides: Any) -> SegmentationUNet:
    """The U-Net on `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    return _unet(sw_vit.sw_vit_tiny, out_channels, feature_size, **overrides)


def _unet(
    make_encoder: Callable[..., SWViT],
    out_channels: int,
    feature_size: int,
    checkpointing: bool = False,
    symmetry: bool = False,
    **encoder: Any,
) -> SegmentationUNet:
    made = make_encoder(checkpointing=checkpointing, **encoder)
    return SegmentationUNet(made, out_channels, feature_size, checkpointing, symmetry)
