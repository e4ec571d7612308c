"""Affine resampling between voxel grids. Arrays are (D, H, W); maps go from new voxel to old voxel."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

Lengths = Sequence[float] | np.ndarray  # along D, H, W: sizes of voxels in mm
FWHM_PER_SIGMA = 2.355  # full width at half maximum of a Gaussian with unit standard deviation


def translation(offset: Lengths) -> np.ndarray:
    """The map (4, 4) that adds an offset (3,) to points."""
    matrix = np.eye(4)
    matrix[:3, 3] = offset
    return matrix


def reversed_axes(matrix: np.ndarray) -> np.ndarray:
    """A map (4, 4) of points (d, h, w) as a map of points (x, y, z), or the other way round."""
    return matrix[np.ix_([2, 1, 0, 3], [2, 1, 0, 3])]


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all True voxels of a mask (D, H, W), of which there is at least one."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask (D, H, W); empty if the mask is."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return mask & (parts == sizes.argmax())


def moved_corners(ends: Sequence[tuple[float, float]], matrix: np.ndarray) -> np.ndarray:
    """The corners of a box under a map (4, 4): (8, 3), from the box's two ends along each axis."""
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3)
    return corners @ matrix[:3, :3].T + matrix[:3, 3]


def grid_map(
    pose: np.ndarray, new_shape: Sequence[int], new_spacing: Lengths, old_shape: Sequence[int], old_spacing: Lengths
) -> np.ndarray:
    """The map (4, 4) of new voxels (d, h, w) to old ones that corresponds to a map between points.

    The pose (4, 4) maps points of the new grid to points of the old one, each (d, h, w) in mm from the grid's centre.
    """
    to_points = np.diag([*new_spacing, 1.0])
    to_points[:3, 3] = -(np.array(new_shape) - 1) / 2 * np.array(new_spacing)
    to_voxels = np.diag([*(1 / np.array(old_spacing)), 1.0])
    to_voxels[:3, 3] = (np.array(old_shape) - 1) / 2
    return to_voxels @ pose @ to_points


def sample_affine(array: np.ndarray, matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Sample a float array (D, H, W) at the voxels of another grid, trilinearly; the matrix maps new voxels to old.

    Beyond the array its edge is repeated if the map only scales (half a voxel of the new grid may lie there); otherwise
    values are 0.
    """
    linear, offset, mode = matrix[:3, :3], matrix[:3, 3], "constant"
    if _is_scaling(matrix):
        linear, mode = np.diagonal(linear), "nearest"
    return affine_transform(array, linear, offset, tuple(shape), order=1, mode=mode, prefilter=False)


def affine_transform(array: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
    """SciPy's, without the warning that it had before 1.16 for every matrix that only scales."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The behavior of affine_transform", UserWarning)
        return ndimage.affine_transform(array, *arguments, **options)


def _is_scaling(matrix: np.ndarray) -> bool:
    """Whether a map only scales and shifts each axis."""
    linear = matrix[:3, :3]
    return bool(np.array_equal(linear, np.diag(np.diagonal(linear))))


def sample_image(
    image: np.ndarray, inside: np.ndarray, matrix: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Resample an image (D, H, W) float32 and its foreground (bool), smoothed first where the new grid is coarser.

    The image is divided by the resampled foreground, so that the background stays exactly 0 and does not darken the
    edge of the brain. Matrix and shape are as of `sample_affine`.
    """
    steps = np.linalg.norm(matrix[:3, :3], axis=1)  # old voxels, along each old axis, per step of the new grid
    blur = np.sqrt(np.maximum(steps**2 - 1, 0)) / FWHM_PER_SIGMA
    blur = np.where(blur < 0.05, 0, blur)
    fraction = sample_affine(ndimage.gaussian_filter(inside.astype(np.float32), blur), matrix, shape)
    total = sample_affine(ndimage.gaussian_filter(image, blur), matrix, shape)
    foreground = fraction >= 0.5
    result = np.zeros(tuple(shape), np.float32)
    np.divide(total, fraction, out=result, where=foreground)
    return result, foreground


def sample_label(label: np.ndarray, matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resample a label map (D, H, W) of integers: each label's mask is resampled linearly, and the largest value wins.

    Borders are smoother than with nearest neighbour. Voxels beyond the array are 0. Each label is resampled only in the
    box that it can reach. Matrix and shape are as of `sample_affine`.
    """
    result = np.zeros(tuple(shape), label.dtype)
    best = sample_affine((label == 0).astype(np.float32), matrix, shape)
    for value in np.unique(label[label != 0]):
        box, fraction = sample_where_not_zero((label == value).astype(np.float32), matrix, shape)
        result[box][fraction > best[box]] = value
        np.maximum(best[box], fraction, out=best[box])
    return result


def sample_where_not_zero(
    array: np.ndarray, matrix: np.ndarray, shape: Sequence[int]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """`sample_affine` of an array that is not all 0, in the box of the new grid that its other values can reach.

    The box and the values in it; beyond, all are 0.
    """
    edge = 1e6 if _is_scaling(matrix) else 1.0  # a repeated edge reaches to the end of the new grid
    ends = [
        (side.start - (1.0 if side.start else edge), side.stop + (edge if side.stop == size else 0.0))
        for side, size in zip(bounding_box(array != 0), array.shape, strict=True)
    ]
    moved = moved_corners(ends, np.linalg.inv(matrix))
    start = np.clip(np.floor(moved.min(axis=0)) - 1, 0, shape).astype(int)  # with a margin for interpolation
    stop = np.clip(np.ceil(moved.max(axis=0)) + 2, 0, shape).astype(int)
    box = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
    return box, sample_affine(array, matrix @ translation(start), stop - start)
