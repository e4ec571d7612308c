"""Overlap, volume and surface distance of two masks. Masks are bool `(x, y, z)` in the file's own axes.

These are bare definitions: they are NaN where an empty mask leaves them undefined. What such a case counts as is
for a policy to say (`asa/evaluation/policies.py`).
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

UNDEFINED = math.nan

Spacing = tuple[float, float, float] | np.ndarray


def check_masks(a: np.ndarray, b: np.ndarray) -> None:
    """Refuse masks that cannot be compared.

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape.
    """
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {a.dtype} and {b.dtype}: compare a label map with its value first")
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"masks must be 3-D and of one shape, got {a.shape} and {b.shape}")


def check_spacing(spacing: Spacing) -> np.ndarray:
    """The voxel size as an array of three lengths.

    Raises:
        ValueError: not three positive lengths.
    """
    size = np.asarray(spacing, dtype=np.float64)
    if size.shape != (3,) or not np.all(np.isfinite(size) & (size > 0)):
        raise ValueError(f"spacing must be three positive lengths in mm, got {spacing}")
    return size


# ---- overlap and volume ----


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice coefficient 2|a and b| / (|a| + |b|).

    Args:
        a: bool `(x, y, z)`.
        b: bool `(x, y, z)`.

    Returns:
        A value in [0, 1]; NaN if both masks are empty (a policy decides what that counts as).

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape.
    """
    check_masks(a, b)
    size = np.count_nonzero(a) + np.count_nonzero(b)
    return 2.0 * np.count_nonzero(a & b) / size if size else UNDEFINED


def sensitivity(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true voxels that are predicted, in [0, 1]; NaN if the truth is empty. Arguments as for `dice`."""
    check_masks(prediction, truth)
    size = np.count_nonzero(truth)
    return np.count_nonzero(prediction & truth) / size if size else UNDEFINED


def volume_difference(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Absolute difference of the volumes in percent of the true one, NaN if that is empty. Arguments as for `dice`."""
    check_masks(prediction, truth)
    size = np.count_nonzero(truth)
    return 100.0 * abs(np.count_nonzero(prediction) - size) / size if size else UNDEFINED


# ---- surface distance between voxel centres ----


def hd95(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """95th percentile Hausdorff distance between the surfaces of two masks, in mm.

    The surface of a mask is the set of its voxels with at least one of their six face neighbours outside it
    (beyond the image's edge is outside), each a point at the voxel's centre: the mask minus its erosion. From
    each surface voxel of one mask the Euclidean distance to the nearest surface voxel of the other is taken;
    HD95 is the 95th percentile (linear interpolation) of these distances in each direction, the larger of the
    two. This is the definition of MONAI's `compute_hausdorff_distance(percentile=95, spacing=...)`. The
    `surface-distance` package puts surface elements on voxel corners and weights them by area, and so differs
    by up to about a voxel's diagonal; `surfels.hd95_by_area` is its definition.

    Args:
        a: bool `(x, y, z)`.
        b: bool `(x, y, z)`.
        spacing: voxel size in mm along the three array axes.

    Returns:
        Distance in mm; NaN if either mask is empty (a policy decides what that counts as).

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape; a spacing that is not three lengths.
    """
    found = _both_directions(a, b, spacing)
    return max(float(np.percentile(distances, 95)) for distances in found) if found else UNDEFINED


def hd95_pooled(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """As `hd95`, but the percentile of the distances of both directions together, as medpy's `hd95` takes it."""
    found = _both_directions(a, b, spacing)
    return float(np.percentile(np.concatenate(found), 95)) if found else UNDEFINED


def hd95_in_plane(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """As `hd95`, but a surface voxel has one of its eight neighbours within its slice (x, y) outside the mask.

    This is the definition of the WMH segmentation challenge of 2017: the outlines of lesions in slices.
    """
    found = _both_directions(a, b, spacing, _outline)
    return max(float(np.percentile(distances, 95)) for distances in found) if found else UNDEFINED


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds a non-empty mask, as three slices."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def _surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask with a face neighbour outside it, bool of the same shape."""
    padded = np.pad(mask, 1)
    core = (slice(1, -1),) * 3
    inside = mask.copy()
    for axis in range(3):
        for step in (slice(0, -2), slice(2, None)):
            inside &= padded[(*core[:axis], step, *core[axis + 1 :])]
    return mask & ~inside


def _outline(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask with one of eight neighbours within their slice outside it, bool of the same shape."""
    return mask & ~binary_erosion(mask, np.ones((3, 3, 1), dtype=bool))


def _both_directions(
    a: np.ndarray, b: np.ndarray, spacing: Spacing, surface: Callable[[np.ndarray], np.ndarray] = _surface
) -> list[np.ndarray]:
    """Distances in mm from each surface voxel of `a` to the surface of `b`, and back; nothing if a mask is empty."""
    check_masks(a, b)
    size = check_spacing(spacing)
    if not a.any() or not b.any():
        return []
    box = bounding_box(a | b)
    surface_a, surface_b = surface(a[box]), surface(b[box])
    return [nearest_distances(surface_a, surface_b, size), nearest_distances(surface_b, surface_a, size)]


def nearest_distances(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each point of `source` to the nearest of `target`; points are the true places of a bool grid.

    Args:
        source: bool `(x, y, z)`.
        target: bool `(x, y, z)` of the same shape, not empty.
        spacing: of the grid, in mm.

    Returns:
        A distance for each point of `source`, in raster order.
    """
    # Where two segmentations agree their surfaces coincide, so most points need no search.
    points = np.argwhere(source)
    apart = ~target[source]
    distances = np.zeros(len(points))
    if apart.any():
        goal, start = np.argwhere(target), points[apart]
        # Points on a grid: splitting cells at their middle builds faster than at the median and searches as fast.
        tree = cKDTree(goal * spacing, leafsize=32, balanced_tree=False)
        steps = start - goal[tree.query(start * spacing)[1]]  # whole voxels: the distance is exact to the last bit
        distances[apart] = np.sqrt((np.square(steps * spacing)).sum(axis=1))
    return distances
