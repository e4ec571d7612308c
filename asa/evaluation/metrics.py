"""Overlap, volume and surface distance of two masks. Masks are bool `(x, y, z)` in the file's own axes.

A metric is NaN where an empty mask leaves it undefined. The value that counts in that case is defined by the policy
(`asa/evaluation/policies.py`).
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

UNDEFINED = math.nan

Spacing = tuple[float, float, float] | np.ndarray


def check_masks(a: np.ndarray, b: np.ndarray) -> None:
    """Check that two masks can be compared.

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
        a, b: bool `(x, y, z)`.

    Returns:
        A value in [0, 1]; NaN if both masks are empty (the policy defines what counts then).

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape.
    """
    check_masks(a, b)
    size = np.count_nonzero(a) + np.count_nonzero(b)
    return 2.0 * np.count_nonzero(a & b) / size if size else UNDEFINED


def sensitivity(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Fraction of the true voxels that are predicted, in [0, 1]; NaN if the truth is empty. Arguments as for `dice`."""
    check_masks(prediction, truth)
    size = np.count_nonzero(truth)
    return np.count_nonzero(prediction & truth) / size if size else UNDEFINED


def volume_difference(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Absolute volume difference in percent of the true volume; NaN if that is 0. Arguments as for `dice`."""
    check_masks(prediction, truth)
    size = np.count_nonzero(truth)
    return 100.0 * abs(np.count_nonzero(prediction) - size) / size if size else UNDEFINED


# ---- surface distance between voxel centres ----


def hd95(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """95th percentile Hausdorff distance between the surfaces of two masks, in mm.

    The surface of a mask is the set of its voxels that have at least one of six face neighbours outside the mask
    (voxels beyond the image's edge are outside): the mask minus its erosion. Each surface voxel is a point at the
    voxel's centre. HD95 is the 95th percentile (linear interpolation) of the Euclidean distances from the surface
    points of one mask to the nearest surface point of the other; the larger value of the two directions. This is the
    definition of MONAI's `compute_hausdorff_distance(percentile=95, spacing=...)`. The `surface-distance` package
    places surface elements at voxel corners and weights them by area, and differs by up to about a voxel's diagonal:
    see `surface_distance.hd95_by_area`.

    Args:
        a, b: bool `(x, y, z)`.
        spacing: voxel size in mm along the three array axes.

    Returns:
        Distance in mm; NaN if either mask is empty (the policy defines what counts then).

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape; a spacing that is not three lengths.
    """
    return max((float(np.percentile(one, 95)) for one in _both_directions(a, b, spacing)), default=UNDEFINED)


def hd95_pooled(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """As `hd95`, but one percentile over the distances of both directions together, as in medpy's `hd95`."""
    directions = _both_directions(a, b, spacing)
    return float(np.percentile(np.concatenate(directions), 95)) if directions else UNDEFINED


def hd95_in_plane(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """As `hd95`, but a surface voxel has one of eight neighbours within its slice (x, y) outside the mask.

    This is the definition of the WMH segmentation challenge of 2017: the outlines of the lesions in each slice.
    """
    return max((float(np.percentile(one, 95)) for one in _both_directions(a, b, spacing, _outline)), default=UNDEFINED)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that contains a non-empty mask, as three slices."""
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
    """Distances in mm from each surface voxel of `a` to the surface of `b`, and back; [] if a mask is empty."""
    check_masks(a, b)
    size = check_spacing(spacing)
    if not a.any() or not b.any():
        return []
    box = bounding_box(a | b)
    surface_a, surface_b = surface(a[box]), surface(b[box])
    return [nearest_distances(surface_a, surface_b, size), nearest_distances(surface_b, surface_a, size)]


def nearest_distances(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each True voxel of `source` to the nearest True voxel of `target`.

    Args:
        source, target: bool `(x, y, z)` of one shape; the target is not empty.
        spacing: of the grid, in mm.

    Returns:
        `(n,)`, in raster order of the True voxels of `source`.
    """
    # Where two segmentations agree, their surfaces coincide: most points need no search.
    points = np.argwhere(source)
    apart = ~target[source]
    distances = np.zeros(len(points))
    if apart.any():
        goals, starts = np.argwhere(target), points[apart]
        # For points on a grid, a tree split at the midpoint builds faster than at the median and searches as fast.
        tree = cKDTree(goals * spacing, leafsize=32, balanced_tree=False)
        steps = starts - goals[tree.query(starts * spacing)[1]]  # in whole voxels, so the distance is exact
        distances[apart] = np.sqrt((np.square(steps * spacing)).sum(axis=1))
    return distances
