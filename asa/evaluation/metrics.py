"""Overlap, volume and surface distance of two masks. Masks are bool `(x, y, z)` in the file's own axes.

A metric is NaN where an empty mask leaves it undefined. The value that counts in that case is defined by the policy
(`asa/evaluation/policies.py`).
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import permutations, product

import numpy as np
from scipy.ndimage import binary_erosion, generate_binary_structure
from scipy.spatial import cKDTree

from asa.data.preprocessing.resampling import bounding_box

UNDEFINED = math.nan

FACES = generate_binary_structure(3, 1)  # a voxel's six neighbours
IN_SLICE = np.ones((3, 3, 1), dtype=bool)  # its eight neighbours in a slice (x, y)

Spacing = tuple[float, float, float] | np.ndarray


def check_masks(a: np.ndarray, b: np.ndarray) -> None:
    """Raise a ValueError for masks that are not bool, not 3-D or not of one shape."""
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {a.dtype} and {b.dtype}: compare a label map with its value first")
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"masks must be 3-D and of one shape, got {a.shape} and {b.shape}")


def check_spacing(spacing: Spacing) -> np.ndarray:
    """The voxel size as an array; a ValueError if it is not three positive lengths."""
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


# ---- surface distance ----


def surface_distances(
    a: np.ndarray, b: np.ndarray, spacing: Spacing, surface: Callable[[np.ndarray], np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distances in mm from each surface element of `a` to the surface of `b`, and back.

    `surface` gives the array of a mask that is not 0 where there is a surface element.

    Returns:
        For both directions, the distances `(n,)` and the elements' values in the array `(n,)`; [] if a mask is empty.
    """
    check_masks(a, b)
    size = check_spacing(spacing)
    if not a.any() or not b.any():
        return []
    box = bounding_box(a | b)
    elements = surface(a[box]), surface(b[box])
    places = [values != 0 for values in elements]
    return [(nearest_distances(places[own], places[1 - own], size), elements[own][places[own]]) for own in (0, 1)]


def nearest_distances(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distances in mm `(n,)` from the True voxels of `source`, in raster order, to the nearest one of `target`.

    Both are bool `(x, y, z)`, and the target is not empty.
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


# ---- surfaces of voxels ----


def hd95(a: np.ndarray, b: np.ndarray, spacing: Spacing, neighbours: np.ndarray = FACES) -> float:
    """95th percentile Hausdorff distance between the surfaces of two masks, in mm.

    The surface of a mask is the set of its voxels that have at least one of six face neighbours outside the mask
    (voxels beyond the image's edge are outside): the mask minus its erosion. Each surface voxel is a point at the
    voxel's centre. HD95 is the 95th percentile (linear interpolation) of the Euclidean distances from the surface
    points of one mask to the nearest surface point of the other; the larger value of the two directions. This is the
    definition of MONAI's `compute_hausdorff_distance(percentile=95, spacing=...)`. The `surface-distance` package
    places surface elements at voxel corners and weights them by area, and differs by up to about a voxel's diagonal:
    see `hd95_by_area`.

    Args:
        a, b: bool `(x, y, z)`.
        spacing: voxel size in mm along the three array axes.
        neighbours: of a voxel. `IN_SLICE`, eight within its slice (x, y), gives the outlines of lesions in each slice,
            the definition of the WMH segmentation challenge of 2017.

    Returns:
        Distance in mm; NaN if either mask is empty (the policy defines what counts then).

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape; a spacing that is not three lengths.
    """
    distances = _voxel_distances(a, b, spacing, neighbours)
    return max((float(np.percentile(one, 95)) for one in distances), default=UNDEFINED)


def hd95_pooled(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """As `hd95`, but one percentile over the distances of both directions together, as in medpy's `hd95`."""
    directions = _voxel_distances(a, b, spacing, FACES)
    return float(np.percentile(np.concatenate(directions), 95)) if directions else UNDEFINED


def _voxel_distances(a: np.ndarray, b: np.ndarray, spacing: Spacing, neighbours: np.ndarray) -> list[np.ndarray]:
    """Distances between the voxels of both masks that have a neighbour outside theirs; [] if a mask is empty."""
    sides = surface_distances(a, b, spacing, lambda mask: mask & ~binary_erosion(mask, neighbours))
    return [distances for distances, _ in sides]


# ---- surfaces with an area ----
#
# As the `surface-distance` package defines them: the surface of a mask runs between voxel centres. Each corner of the
# voxel grid is surrounded by eight voxels. Where some of them are inside the mask and some outside, the marching-cubes
# triangles between them form one surface element at that corner, with an area in mm2. (Nikolov et al., Clinically
# applicable segmentation of head and neck anatomy for radiotherapy, J Med Internet Res 2021;
# github.com/google-deepmind/surface-distance.)
#
# The 13 configurations of eight voxels, up to rotation, reflection and exchange of inside and outside. A key lists the
# voxels inside, where the voxel at (a, b, c) in {0, 1}^3 has the number 4a + 2b + c. The values are the normals of the
# triangles (signs do not matter); the length of a normal is the triangle's area for unit spacing.
EIGHTH, QUARTER, THREE_EIGHTHS = (0.125,) * 3, (0.25,) * 3, (0.375,) * 3
FACE = (0.5, 0.0, 0.0)
TRIANGLES: dict[tuple[int, ...], tuple[tuple[float, float, float], ...]] = {
    (7,): (EIGHTH,),
    (6, 7): ((0.25, 0.25, 0.0),) * 2,
    (5, 6): (EIGHTH,) * 2,
    (3, 4): (EIGHTH,) * 2,
    (5, 6, 7): (FACE, QUARTER, EIGHTH),
    (3, 5, 6): (EIGHTH,) * 3,
    (3, 4, 7): ((0.0, 0.25, 0.25),) * 2 + (EIGHTH,),
    (4, 5, 6, 7): (FACE,) * 2,
    (3, 5, 6, 7): (EIGHTH,) * 2 + (QUARTER,) * 2,
    (3, 4, 6, 7): (EIGHTH, THREE_EIGHTHS, (0.0, 0.25, 0.25), (0.25, 0.0, 0.25)),
    (3, 4, 5, 6): (FACE, EIGHTH, EIGHTH, QUARTER),
    (2, 3, 4, 5): ((0.25, 0.25, 0.0),) * 4,
    (1, 2, 4, 7): (EIGHTH,) * 4,
}


def surface_dice(a: np.ndarray, b: np.ndarray, spacing: Spacing, tolerance: float) -> float:
    """Normalised surface Dice (NSD): the fraction of both surfaces, by area, within a tolerance in mm of the other.

    Other arguments, NaN and errors are those of `hd95`.
    """
    sides = _distances_and_areas(a, b, spacing)
    if not sides:
        return UNDEFINED
    close = sum(areas[distances <= tolerance].sum() for distances, areas in sides)
    return float(close / sum(areas.sum() for _, areas in sides))


def hd95_by_area(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """95th percentile Hausdorff distance in mm by area: 95 % of each surface lies within this distance of the other.

    Arguments, NaN and errors are those of `surface_dice`.
    """
    percentiles = []
    for distances, areas in _distances_and_areas(a, b, spacing):
        order = np.lexsort((areas, distances))
        fraction = np.cumsum(areas[order]) / np.sum(areas[order])
        index = min(int(np.searchsorted(fraction, 0.95)), len(order) - 1)
        percentiles.append(float(distances[order[index]]))
    return max(percentiles, default=UNDEFINED)


def _distances_and_areas(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distance to the other surface and area of each surface element of `a`, and of `b`; [] if a mask is empty."""
    sides = surface_distances(a, b, spacing, _corner_codes)
    table = surface_element_areas(*check_spacing(spacing).tolist())
    return [(distances, table[codes]) for distances, codes in sides]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """A bit for each voxel inside, of the eight around each grid corner; one longer than the mask on each axis.

    0 where all are inside, as where none is: there is no surface.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([side + 1 for side in mask.shape], dtype=np.uint8)
    for number, voxel in enumerate(product((0, 1), repeat=3)):
        around = tuple(slice(k, side + 1 + k) for k, side in zip(voxel, mask.shape, strict=True))
        codes |= padded[around] << number
    return np.where(codes == 255, 0, codes)


@cache
def surface_element_areas(x: float, y: float, z: float) -> np.ndarray:
    """Area in mm2 of each corner code (bit 4a + 2b + c for voxel (a, b, c)) at a spacing in mm: `(256,)`."""
    areas = np.zeros(256)
    sides = np.array([y * z, x * z, x * y])
    voxels = np.array(list(product((0, 1), repeat=3)))
    for inside, normals in TRIANGLES.items():
        for axes in permutations(range(3)):
            area = sum(float(np.linalg.norm(np.array(normal)[list(axes)] * sides)) for normal in normals)
            for flipped in product((0, 1), repeat=3):
                turned = voxels[list(inside)][:, list(axes)] ^ np.array(flipped)
                code = sum(1 << int(number) for number in turned @ (4, 2, 1))
                areas[[code, 255 - code]] = area
    return areas
