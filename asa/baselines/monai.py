"""UNETR and Swin UNETR, from MONAI."""

from collections.abc import Sequence
from typing import Any

from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unetr import UNETR
from torch import device, get_default_device, nn

from asa.baselines.base import Comparator, Window
from asa.errors import require
from asa.ops.patches import grid_size, triple


def unetr_base(
    out_channels: int,
    img_size: int | Sequence[int] = 96,
    in_channels: int = 1,
    feature_size: int = 16,
    hidden_size: int = 768,
    num_heads: int = 12,
) -> Comparator:
    """UNETR (Hatamizadeh et al., WACV 2022) with its published sizes: a ViT-B, patches of 16^3 voxels.

    92.78 million parameters for one channel, 14 classes and 96^3 voxels, as some papers print for it; others
    print 92.49 (ratio 1.003).
    """
    require("einops", "swin", "MONAI's UNETR")
    size = triple(img_size)
    grid_size(size, 16)  # checks the size
    network = UNETR(
        in_channels, out_channels, size, feature_size, hidden_size, mlp_dim=4 * hidden_size, num_heads=num_heads
    )
    for block in network.vit.blocks:
        # MONAI makes these for other networks and never calls them here. A parameter without a gradient stops DDP.
        block.norm_cross_attn = block.cross_attn = nn.Identity()
    return Comparator(network, Window(size, in_channels), out_channels)


def unetr_small(out_channels: int, **overrides: Any) -> Comparator:
    """UNETR with half the published widths: for a single workstation GPU."""
    return unetr_base(out_channels, **{**dict(feature_size=8, hidden_size=384, num_heads=6), **overrides})


def unetr_tiny(out_channels: int, **overrides: Any) -> Comparator:
    """UNETR with narrow layers: for tests and demonstrations on a CPU."""
    return unetr_base(out_channels, **{**dict(feature_size=4, hidden_size=48, num_heads=3), **overrides})


def swin_unetr_base(
    out_channels: int, img_size: int | Sequence[int] = 96, in_channels: int = 1, feature_size: int = 48
) -> Comparator:
    """Swin UNETR (Hatamizadeh et al., BrainLes 2021; Tang et al., CVPR 2022) with its published width of 48."""
    require("einops", "swin", "MONAI's Swin UNETR")
    size = triple(img_size)
    grid_size(size, 32, several=True)  # checks the size
    with device("cpu"):  # MONAI reads values of a tensor that it makes, which a meta tensor does not have
        network = SwinUNETR(in_channels, out_channels, feature_size=feature_size)
    return Comparator(network.to(get_default_device()), Window(size, in_channels), out_channels)


def swin_unetr_small(out_channels: int, **overrides: Any) -> Comparator:
    """Swin UNETR with a width of 24: for a single workstation GPU."""
    return swin_unetr_base(out_channels, **{**dict(feature_size=24), **overrides})


def swin_unetr_tiny(out_channels: int, **overrides: Any) -> Comparator:
    """Swin UNETR with a width of 12: for tests and demonstrations on a CPU."""
    return swin_unetr_base(out_channels, **{**dict(feature_size=12), **overrides})
