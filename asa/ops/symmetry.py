"""Mirroring of volumes and positions, left to right unless another axis is named, and the asymmetry of features.

Letters: volumes `... D H W`, W left to right, so that the mid-sagittal plane cuts the last axis in half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

AXES = {"D": -3, "H": -2, "W": -1}


def flip(volume: Tensor, axes: str = "W") -> Tensor:
    """The mirror image, `(..., D, H, W)` -> the same shape; by default left-right, else along axes like "DW"."""
    return volume.flip([AXES[axis] for axis in axes])


def mirrored_start(start: Sequence[int], size: Sequence[int], width: int) -> list[int]:
    """First voxel of the mirrored box (D, H, W): w becomes W - w - size, the other axes are unchanged.

    Voxel i of the flipped mirrored box is the counterpart of voxel i of the box at `start`. Boxes that extend beyond
    the volume are mirrored as well.
    """
    return [*start[:-1], width - start[-1] - size[-1]]


def rotate_about_left_right(volume: Tensor, quarters: int) -> Tensor:
    """Rotate `(..., D, H, W)` by quarter turns about the left-right axis; an odd number of them exchanges D and H.

    No rotation about another axis commutes with the flip.
    """
    return volume.rot90(quarters, dims=(-3, -2))


def asymmetry(one: Tensor, other: Tensor, dim: int = -1) -> Tensor:
    """(1 - cos) / 2 between vectors along an axis, in float32: 0 for equal, 1/2 for orthogonal, 1 for opposite ones.

    Computed as a quarter of the squared distance of the unit vectors, which is exactly 0 for equal vectors and keeps
    its precision for nearly equal ones.
    """
    one, other = F.normalize(one.float(), dim=dim), F.normalize(other.float(), dim=dim)
    return (one - other).square().sum(dim=dim) / 4


def pad_to_multiple(volume: Tensor, multiple: int) -> Tensor:
    """Zero-pad the end of each axis to a multiple: `(..., D, H, W)`.

    If a volume and its mirror image are padded, voxel i of one is still the counterpart of voxel i of the other.
    """
    sizes = volume.shape[-3:]
    ends = [part for size in reversed(sizes) for part in (0, -size % multiple)]
    return F.pad(volume, ends) if any(ends) else volume


def mirror_patches(volume: Tensor, patch_size: int) -> Tensor:
    """Mirror each patch of the right half of `(B, C, D, H, W)` in its place, so that mirrored structures look alike.

    Patches of the middle column, if there is one, stay as they are. W is a multiple of the patch size. Its own inverse.
    """
    columns = volume.unflatten(-1, (-1, patch_size))  # B C D H W/s s
    count = columns.shape[-2]
    left, right = columns.split([count - count // 2, count // 2], dim=-2)  # slices would take longer backwards
    return torch.cat([left, right.flip(-1)], dim=-2).flatten(-2)
