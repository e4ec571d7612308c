"""From one voxel grid to another by an affine map, and back. Arrays are (D, H, W); maps go from new voxel to old."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Lengths = Sequence[float] | np.ndarray
FWHM_PER_SIGMA = 2.355  # full width at half maximum of a Gaussian in its standard deviations


def grid_map(
    pose: np.ndarray,
    new_shape: Sequence[int],
    new_spacing: Lengths,
    old_shape: Sequence[int],
    old_spacing: Lengths,
) -> np.ndarray:
    """The map from voxels to voxels of a map between points.

    Args:
        pose: (4, 4), point of the new grid to point of the old one, each (d, h, w) in mm from its grid's centre.
        new_shape, old_shape: voxels along D, H, W.
        new_spacing, old_spacing: voxel size in mm.

    Returns:
        (4, 4), new voxel (d, h, w) to old voxel.
    """
    to_points = np.diag([*new_spacing, 1.0])
    to_points[:3, 3] = -(np.array(new_shape) - 1) / 2 * np.array(new_spacing)
    to_voxels = np.diag([*(1 / np.array(old_spacing)), 1.0])
    to_voxels[:3, 3] = (np.array(old_shape) - 1) / 2
    return to_voxels @ pose @ to_points


def sample_affine(array: np.ndarray, matrix: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """Read an array (D, H, W) at the places of another grid.

    Where the map only scales, the array's edge is held, as half a voxel of the new grid may lie beyond it; elsewhere
    what lies beyond is 0.

    Args:
        array: float, or any type with order 0.
        matrix: (4, 4), new voxel to old.
        shape: of the new grid.
        order: 0 nearest voxel, 1 trilinear.
    """
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    if is_scaling(matrix):
        return ndimage.affine_transform(
            array, np.diagonal(linear), offset, tuple(shape), order=order, mode="nearest", prefilter=False
        )
    return ndimage.affine_transform(array, linear, offset, tuple(shape), order=order, mode="constant", prefilter=False)


def is_scaling(matrix: np.ndarray) -> bool:
    """Whether a map leaves the axes as they are."""
    linear = matrix[:3, :3]
    return bool(np.array_equal(linear, np.diag(np.diagonal(linear))))


def sample_image(
    image: np.ndarray, inside: np.ndarray, matrix: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Bring an image and its foreground to another grid: trilinear, smoothed first where the new grid is coarser.

    The image is divided by the foreground's own share, so that the background stays exactly 0 and does not darken the
    brain's rim.

    Args:
        image: (D, H, W) float32.
        inside: bool, its foreground.
        matrix: (4, 4), new voxel to old.
        shape: of the new grid.

    Returns:
        Image and foreground on the new grid.
    """
    steps = np.linalg.norm(matrix[:3, :3], axis=1)  # old voxels, along each old axis, per step of the new grid
    blur = np.sqrt(np.maximum(steps**2 - 1, 0)) / FWHM_PER_SIGMA
    blur = np.where(blur < 0.05, 0, blur)
    share = sample_affine(ndimage.gaussian_filter(inside.astype(np.float32), blur), matrix, shape, order=1)
    total = sample_affine(ndimage.gaussian_filter(image, blur), matrix, shape, order=1)
    foreground = share >= 0.5
    result = np.zeros(tuple(shape), np.float32)
    np.divide(total, share, out=result, where=foreground)
    return result, foreground


def sample_label(label: np.ndarray, matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Bring a label map to another grid: each label's mask linearly, the largest share wins.

    The border is smoother than with the nearest voxel's value. A label is looked at only near where it lies.

    Args:
        label: (D, H, W) of an integer type; 0 is what is beyond the array.
        matrix: (4, 4), new voxel to old.
        shape: of the new grid.
    """
    result = np.zeros(tuple(shape), label.dtype)
    best = sample_affine((label == 0).astype(np.float32), matrix, shape, order=1)
    compact, values = _compact(label)
    for value, old_box in zip(values, ndimage.find_objects(compact), strict=True):
        box = _reach(old_box, label.shape, matrix, shape)
        part = np.eye(4)
        part[:3, 3] = [side.start for side in box]
        size = [side.stop - side.start for side in box]
        share = sample_affine((label == value).astype(np.float32), matrix @ part, size, order=1)
        wins = share > best[box]
        result[box][wins] = value
        np.maximum(best[box], share, out=best[box])
    return result


def _compact(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map with values 1, 2, 3, ... for what is not 0, and the values that these stand for."""
    values, places = np.unique(label, return_inverse=True)
    if values[0] != 0:
        values, places = np.concatenate([[0], values]).astype(values.dtype), places + 1
    return places.reshape(label.shape).astype(np.int32), values[1:]


def _reach(
    box: tuple[slice, ...], old_shape: Sequence[int], matrix: np.ndarray, shape: Sequence[int]
) -> tuple[slice, ...]:
    """The part of the new grid that a box of the old one can reach, with a margin of interpolation."""
    held = 1e6 if is_scaling(matrix) else 1.0  # a held edge reaches as far as one looks
    ends = [
        (side.start - (1.0 if side.start else held), side.stop + (held if side.stop == size else 0.0))
        for side, size in zip(box, old_shape, strict=True)
    ]
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3)
    inverse = np.linalg.inv(matrix)
    moved = corners @ inverse[:3, :3].T + inverse[:3, 3]
    return tuple(
        slice(int(np.clip(np.floor(low) - 1, 0, size)), int(np.clip(np.ceil(high) + 2, 0, size)))
        for low, high, size in zip(moved.min(axis=0), moved.max(axis=0), shape, strict=True)
    )
