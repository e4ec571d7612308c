"""Surface distances with surface elements weighted by their area, as the `surface-distance` package defines them.

The surface of a mask runs between voxel centres. Each corner of the voxel grid is surrounded by eight voxels. Where
some of them are inside the mask and some outside, the marching-cubes triangles between them form one surface element
at that corner, with an area in mm2. (Nikolov et al., Clinically applicable segmentation of head and neck anatomy for
radiotherapy, J Med Internet Res 2021; github.com/google-deepmind/surface-distance.)
"""

from functools import cache
from itertools import permutations, product

import numpy as np

from asa.evaluation.metrics import UNDEFINED, Spacing, bounding_box, check_masks, check_spacing, nearest_distances

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
    """Normalised surface Dice (NSD): the fraction of both surfaces, by area, within a tolerance of the other.

    Args:
        a, b: bool `(x, y, z)`.
        spacing: voxel size in mm along the three array axes.
        tolerance: in mm.

    Returns:
        A value in [0, 1]; NaN if either mask is empty (the policy defines what counts then).

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape; a spacing that is not three lengths.
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
    check_masks(a, b)
    size = check_spacing(spacing)
    if not a.any() or not b.any():
        return []
    box = bounding_box(a | b)
    codes = [_corner_codes(a[box]), _corner_codes(b[box])]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    table = surface_element_areas(*size.tolist())
    return [
        (nearest_distances(surfaces[own], surfaces[1 - own], size), table[codes[own][surfaces[own]]]) for own in (0, 1)
    ]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """A bit for each voxel inside, of the eight around each grid corner; one longer than the mask on each axis."""
    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([side + 1 for side in mask.shape], dtype=np.uint8)
    for number, voxel in enumerate(product((0, 1), repeat=3)):
        around = tuple(slice(k, side + 1 + k) for k, side in zip(voxel, mask.shape, strict=True))
        codes |= padded[around] << number
    return codes


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
