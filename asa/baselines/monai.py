"""UNETR and Swin UNETR, from MONAI."""

from collections.abc import Sequence

from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unetr import UNETR
from torch import device, get_default_device, nn

from asa.baselines.base import Comparator, Window
from asa.errors import require
from asa.ops.patches import grid_size, triple


def unetr_base(out_channels: int, img_size: int | Sequence[int] = 96, in_channels: int = 1) -> Comparator:
    """UNETR (Hatamizadeh et al., WACV 2022) with its published sizes: a ViT-B, patches of 16^3 voxels.

    92.78 million parameters for one channel, 14 classes and 96^3 voxels, as some papers print for it; others
    print 92.49 (ratio 1.003).
    """
    return _unetr(out_channels, img_size, in_channels, 16, 768, 12)


def unetr_small(out_channels: int, img_size: int | Sequence[int] = 96, in_channels: int = 1) -> Comparator:
    """UNETR with half the published widths: for a single workstation GPU."""
    return _unetr(out_channels, img_size, in_channels, 8, 384, 6)


def unetr_tiny(out_channels: int, img_size: int | Sequence[int] = 96, in_channels: int = 1) -> Comparator:
    """UNETR with narrow layers: for tests and demonstrations on a CPU."""
    return _unetr(out_channels, img_size, in_channels, 4, 48, 3)


def swin_unetr_base(out_channels: int, img_size: int | Sequence[int] = 96, in_channels: int = 1) -> Comparator:
    """Swin UNETR (Hatamizadeh et al., BrainLes 2021; Tang et al., CVPR 2022) with its published width of 48."""
    return _swin_unetr(out_channels, img_size, in_channels, 48)


def swin_unetr_small(out_channels: int, img_size: int | Sequence[int] = 96, in_channels: int = 1) -> Comparator:
    """Swin UNETR with a width of 24: for a single workstation GPU."""
    return _swin_unetr(out_channels, img_size, in_channels, 24)


def swin_unetr_tiny(out_channels: int, img_size: int | Sequence[int] = 96, in_channels: int = 1) -> Comparator:
    """Swin UNETR with a width of 12: for tests and demonstrations on a CPU."""
    return _swin_unetr(out_channels, img_size, in_channels, 12)


def _unetr(
    out_channels: int, img_size: int | Sequence[int], in_channels: int, feature_size: int, width: int, heads: int
) -> Comparator:
    require("einops", "swin", "MONAI's UNETR")
    size = triple(img_size)
    grid_size(size, 16)  # checks the size
    network = UNETR(
        in_channels,
        out_channels,
        size,
        feature_size=feature_size,
        hidden_size=width,
        mlp_dim=4 * width,
        num_heads=heads,
    )
    for block in network.vit.blocks:
        # MONAI makes these for other networks and never calls them here. A parameter without a gradient stops DDP.
        block.norm_cross_attn = block.cross_attn = nn.Identity()
    return Comparator(network, Window(size, in_channels), out_channels)


def _swin_unetr(out_channels: int, img_size: int | Sequence[int], in_channels: int, feature_size: int) -> Comparator:
    require("einops", "swin", "MONAI's Swin UNETR")
    size = triple(img_size)
    grid_size(size, 32, several=True)  # checks the size
    with device("cpu"):  # MONAI reads values of a tensor that it makes, which a meta tensor does not have
        network = SwinUNETR(in_channels, out_channels, feature_size=feature_size)
    return Comparator(network.to(get_default_device()), Window(size, in_channels), out_channels)
