"""The left-right mirror of volumes, of places in them, and how unlike two mirrored things are.

Letters: volumes `... D H W`, W left to right, so the mid-sagittal plane cuts the last axis in half.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def flip(volume: Tensor) -> Tensor:
    """The mirror image, left for right: `(..., D, H, W)` -> the same shape. Its own inverse."""
    return volume.flip(-1)


def mirrored_start(start: Sequence[int], size: Sequence[int], width: int) -> list[int]:
    """First voxel of the box at the mirrored place: w becomes W - w - size, the other axes stay.

    The box read there and flipped has the counterpart of voxel i of the box at `start` as its voxel i. Places outside
    the volume are mirrored as well.

    Args:
        start: first voxel of the box (D, H, W).
        size: the box (D, H, W).
        width: W of the volume.
    """
    return [*start[:-1], width - start[-1] - size[-1]]


def rotate_about_left_right(volume: Tensor, quarters: int) -> Tensor:
    """Rotate by quarters of a turn about the left-right axis, the only axis whose rotations commute with the flip.

    Args:
        volume: `(..., D, H, W)`.
        quarters: of a turn; an odd number exchanges D and H.
    """
    return volume.rot90(quarters, dims=(-3, -2))


def asymmetry(one: Tensor, other: Tensor, dim: int = -1) -> Tensor:
    """(1 - cos) / 2 between vectors along an axis, in float32: 0 alike, 1/2 orthogonal, 1 opposite.

    Computed as a quarter of the squared distance of the unit vectors: exactly 0 for equal ones, and not rounded away
    for nearly equal ones.

    Args:
        one, other: of the same shape.
        dim: the axis of the vectors.
    """
    one, other = F.normalize(one.float(), dim=dim), F.normalize(other.float(), dim=dim)
    return (one - other).square().sum(dim=dim) / 4


def pad_to_multiple(volume: Tensor, multiple: int) -> Tensor:
    """Zeros at the far ends so that `multiple` divides each size: `(..., D, H, W)`.

    A volume and its mirror image padded alike still have voxel i facing its counterpart.
    """
    sizes = volume.shape[-3:]
    ends = [part for size in reversed(sizes) for part in (0, -size % multiple)]
    return F.pad(volume, ends) if any(ends) else volume
