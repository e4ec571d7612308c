"""The segmentation U-Net on a token encoder (ASA, MICCAI 2022, section 2.4).

Letters: volume `B C D H W`, feature size f, patch size s, K output channels. A level k lies at 1 / 2^k of the
volume's resolution and has f * 2^k channels.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.layers.factories import Norm
from torch import Tensor, nn
from torch.nn import functional as F

from asa.models import sw_vit
from asa.models.saca import SymmetryAwareBlock
from asa.models.sw_vit import SWViT, run_block
from asa.ops.normalise import InstanceNormalisation

LEVELS = 6  # resolutions 1 to 1/32
HEADS = 5  # resolutions with a segmentation head: 1 to 1/16


class InstanceNorm(nn.InstanceNorm3d):
    """Instance normalisation that leaves channels last where they are; PyTorch's own brings them to the front.

    On a CPU it also brings them there: the plain convolution that PyTorch takes for one channel and for small maps
    gives them first.
    """

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> the same."""
        wide = features.dtype in (torch.float32, torch.float64)
        # ONNX has an operator for PyTorch's own.
        if features.device.type == "cpu" and wide and not torch.compiler.is_exporting():
            last = features.contiguous(memory_format=torch.channels_last_3d)
            return InstanceNormalisation.apply(last, self.eps)
        if features.is_contiguous() or not features.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(features)
        return F.group_norm(features, self.num_features, eps=self.eps)


Norm.add_factory_class("instance_any_layout", InstanceNorm)


class PointwiseConv(nn.Conv3d):
    """1x1x1 convolution. On a CPU it is a matrix product, which leaves channels last where they are.

    With one thread, what torchrun gives a process, PyTorch takes a plain convolution that brings them to the front.
    """

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> the same with other channels."""
        if features.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(features)
        out = F.linear(features.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
        return out.permute(0, 4, 1, 2, 3)


class SegmentationUNet(nn.Module):
    """U-Net whose skips are hidden states of a transformer, brought to six resolutions by residual convolutions.

    Level 0 reads the image itself; levels 1 to 5 read the hidden states after 3/12, 5/12, 7/12, 9/12 and all of the
    encoder's blocks, up- or downsampled from the token grid. Five up blocks with skips lead back; the five finest
    levels have a 1x1x1 head each.

    Args:
        encoder: the token encoder; its patch size is a power of two.
        out_channels: classes K, background included.
        feature_size: channels f of the finest level.
        checkpointing: keep only what goes from block to block for the gradient: less memory, one more forward pass of
            time. The encoder has a keyword of its own.
        symmetry: the last tokens look at those of the mirror image (SACA) before they are decoded. Attention is over
            all pairs of tokens there.

    Raises:
        ValueError: a volume size that 32 does not divide, or too small for six levels; a patch size that is no power
            of two.
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
        size, coarsest = encoder.img_size, 2 ** (LEVELS - 1)
        if any(n % coarsest for n in size) or math.prod(size) == coarsest**3:
            raise ValueError(
                f"the U-Net takes volumes whose sizes {coarsest} divides, larger than {coarsest}^3 voxels, got {size}"
            )
        scale = encoder.patch_size.bit_length() - 1
        if 2**scale != encoder.patch_size:
            raise ValueError(f"the U-Net takes patches of 2, 4, 8, ... voxels, got {encoder.patch_size}")
        self.encoder = encoder
        self.out_channels, self.checkpointing = out_channels, checkpointing
        self.saca = SymmetryAwareBlock(encoder.embed_dim, encoder.num_heads) if symmetry else None
        depth = len(encoder.blocks)
        # The states after blocks 3, 5, 7, 9 and 12 of 12.
        self.taps = [max(round(depth * part / 12), 1) - 1 for part in (3, 5, 7, 9, 12)]
        width = [feature_size * 2**level for level in range(LEVELS)]
        block: dict[str, Any] = dict(spatial_dims=3, kernel_size=3, norm_name="instance_any_layout")
        self.image_block = UnetrBasicBlock(
            in_channels=encoder.in_channels, out_channels=width[0], stride=1, res_block=True, **block
        )
        self.skips = nn.ModuleList(_skip(encoder.embed_dim, width, scale, level, block) for level in range(1, LEVELS))
        self.ups = nn.ModuleList(
            UnetrUpBlock(
                in_channels=width[level + 1],
                out_channels=width[level],
                upsample_kernel_size=2,
                res_block=True,
                **block,
            )
            for level in reversed(range(LEVELS - 1))
        )
        self.heads = nn.ModuleList(
            UnetOutBlock(spatial_dims=3, in_channels=width[level], out_channels=out_channels) for level in range(HEADS)
        )
        for module in self.modules():  # MONAI's blocks make their convolutions themselves
            if type(module) is nn.Conv3d and module.kernel_size == module.stride == (1, 1, 1):
                module.__class__ = PointwiseConv

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image is looked at."""
        return self.saca is not None

    def forward(
        self, volume: Tensor, deep_supervision: bool = False, mirrored: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Segment a volume.

        Args:
            volume: `(B, C, D, H, W)`.
            deep_supervision: return the logits of all five heads.
            mirrored: with `symmetry`, what faces each voxel of the volume, of the same shape.

        Returns:
            Logits `(B, K, D, H, W)`, or a list of five from the finest to the coarsest, each at half the resolution
            of the one before.

        Raises:
            ValueError: a volume of another size than the encoder's, or without its mirror image.
        """
        states = self._states(volume, mirrored)
        skips = [_run(0, self.image_block, volume, checkpointing=self.checkpointing)]
        for level, (tap, skip) in enumerate(zip(self.taps, self.skips, strict=True), start=1):
            skips.append(_run(level, skip, self._as_map(states[tap]), checkpointing=self.checkpointing))
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
        """The encoder's hidden states, the last after a look at the mirror image's."""
        if self.saca is None:
            return self.encoder.hidden_states(volume)
        if mirrored is None:
            raise ValueError("this network compares a volume with its mirror image: give both")
        both = [state.chunk(2) for state in self.encoder.hidden_states(torch.cat([volume, mirrored]))]
        return [*(own for own, _ in both[:-1]), run_block(self.saca, *both[-1], checkpointing=self.checkpointing)]

    def _as_map(self, tokens: Tensor) -> Tensor:
        """`(B, L, E)` -> `(B, E, T, H, W)`, a view with the channels last."""
        return tokens.unflatten(1, self.encoder.grid).permute(0, 4, 1, 2, 3)


def _run(level: int, block: nn.Module, *inputs: Tensor, checkpointing: bool) -> Tensor:
    """A block's output: on a CPU with channels last, and at the two coarsest levels in float32 at least.

    oneDNN's other layout has blocks of 16 channels, and pads 24 to 32. Its bfloat16 convolutions read memory that was
    never written where a depth is 2 or a strided one ends at a width of 1: NaN, or worse (torch 2.13, AVX-512 and AMX).
    """
    on_cpu = inputs[0].device.type == "cpu"
    layout = torch.channels_last_3d if on_cpu else torch.contiguous_format
    inputs = tuple(features.contiguous(memory_format=layout) for features in inputs)
    if not (on_cpu and level >= LEVELS - 2 and torch.is_autocast_enabled("cpu")):
        return run_block(block, *inputs, checkpointing=checkpointing)
    with torch.autocast("cpu", enabled=False):
        return run_block(block, *(features.float() for features in inputs), checkpointing=checkpointing)


def _skip(embed_dim: int, width: list[int], scale: int, level: int, block: dict[str, Any]) -> nn.Module:
    """Token map at 1 / 2^scale -> features of a level, by transposed or strided convolutions."""
    if level < scale:
        return UnetrPrUpBlock(
            in_channels=embed_dim,
            out_channels=width[level],
            num_layer=scale - level - 1,
            stride=1,
            upsample_kernel_size=2,
            conv_block=True,
            res_block=True,
            **block,
        )
    if level == scale:
        return UnetrBasicBlock(in_channels=embed_dim, out_channels=width[level], stride=1, res_block=True, **block)
    widths = [embed_dim, *width[scale + 1 : level + 1]]
    return nn.Sequential(*(UnetResBlock(in_channels=a, out_channels=b, stride=2, **block) for a, b in pairwise(widths)))


def unet_base(
    out_channels: int,
    feature_size: int = 24,
    checkpointing: bool = False,
    symmetry: bool = False,
    **overrides: Any,
) -> SegmentationUNet:
    """The paper's segmentation network; `overrides` go to its encoder, `sw_vit_base`."""
    encoder = sw_vit.sw_vit_base(checkpointing=checkpointing, **overrides)
    return SegmentationUNet(encoder, out_channels, feature_size, checkpointing, symmetry)


def unet_small(
    out_channels: int,
    feature_size: int = 16,
    checkpointing: bool = False,
    symmetry: bool = False,
    **overrides: Any,
) -> SegmentationUNet:
    """The U-Net on `sw_vit_small`: for a workstation, or a CPU with patience."""
    encoder = sw_vit.sw_vit_small(checkpointing=checkpointing, **overrides)
    return SegmentationUNet(encoder, out_channels, feature_size, checkpointing, symmetry)


def unet_tiny(
    out_channels: int,
    feature_size: int = 8,
    checkpointing: bool = False,
    symmetry: bool = False,
    **overrides: Any,
) -> SegmentationUNet:
    """The U-Net on `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    encoder = sw_vit.sw_vit_tiny(checkpointing=checkpointing, **overrides)
    return SegmentationUNet(encoder, out_channels, feature_size, checkpointing, symmetry)
