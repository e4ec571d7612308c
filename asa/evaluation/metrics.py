"""Overlap, volume, surface distance and lesions of two masks, bool `(x, y, z)` in the file's own axes.

A metric is NaN where an empty mask leaves it undefined; the policy (asa/evaluation/policies.py) says what counts then.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import permutations, product

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, find_objects, generate_binary_structure, label
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
    """Dice coefficient 2|a and b| / (|a| + |b|) of bool `(x, y, z)`, in [0, 1]; NaN if both masks are empty.

    A ValueError for masks that are not bool, not 3-D or not of one shape.
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
    """Distances in mm `(n,)` from each surface element of `a` to the surface of `b`, and back; [] if a mask is empty.

    `surface` gives the array of a mask that is not 0 where there is a surface element, whose values `(n,)` come along.
    """
    check_masks(a, b)
    size = check_spacing(spacing)
    if not a.any() or not b.any():
        return []
    box = bounding_box(a | b)
    elements = surface(a[box]), surface(b[box])
    places = [values != 0 for values in elements]
    return [(_nearest_distances(places[own], places[1 - own], size), elements[own][places[own]]) for own in (0, 1)]


def _nearest_distances(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distances in mm `(n,)` from the True voxels of `source`, in raster order, to the nearest one of `target`."""
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

    The surface of a mask is the centres of its voxels of which a neighbour is outside the mask or the image: the mask
    minus its erosion. HD95 is the 95th percentile (linear interpolation) of the distances from the surface of one mask
    to the nearest point of the other; the larger of the two directions, as in MONAI's
    `compute_hausdorff_distance(percentile=95)`. The `surface-distance` package has surface elements at voxel corners,
    weighted by area, and differs by up to about a voxel's diagonal: see `hd95_by_area`.

    Neighbours share a face, or (`IN_SLICE`) are the eight in a slice (x, y), as in the WMH challenge of 2017. Masks are
    bool `(x, y, z)`, with the voxel size in mm along these axes; NaN if one is empty. A ValueError as of `dice`, and
    for a spacing that is not three lengths.
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
    """Normalised surface Dice (NSD): the fraction of both surfaces' area within a tolerance in mm; else as `hd95`."""
    sides = _distances_and_areas(a, b, spacing)
    if not sides:
        return UNDEFINED
    close = sum(areas[distances <= tolerance].sum() for distances, areas in sides)
    return float(close / sum(areas.sum() for _, areas in sides))


def hd95_by_area(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """95th percentile Hausdorff distance in mm by area: 95 % of each surface lies within it; otherwise as `hd95`."""
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
    """A bit for each voxel inside, of the eight around each corner of the grid; 0 where there is no surface."""
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


# ---- lesions: WMH 2017 ----

CONNECTIVITY = generate_binary_structure(3, 3)  # of a lesion: across faces, edges and corners


def lesion_recall(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Fraction of the true lesions that the prediction overlaps; 1 if there are none. Arguments as for `dice`."""
    check_masks(prediction, truth)
    lesions, count = label(truth, CONNECTIVITY)
    return len(np.unique(lesions[prediction & truth])) / count if count else 1.0


def lesion_f1(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of lesion recall and lesion precision, the fraction of predicted lesions that overlap a true one.

    Recall is 1 without true lesions, precision is 1 without predicted ones. Arguments as for `dice`.
    """
    recall, precision = lesion_recall(prediction, truth), lesion_recall(truth, prediction)
    return 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0


# ---- lesions: BraTS 2023, adult glioma ----
#
# True lesions that meet after dilation are one lesion, and a predicted lesion that overlaps the dilated lesion belongs
# to it.
DILATIONS = 3
DILATION = generate_binary_structure(3, 2)  # across faces and edges
MIN_VOLUME_MM3 = 50.0  # true lesions of at most this volume are not scored
UNMATCHED_MM = 374.0  # HD95 of a lesion without a partner


def lesionwise_dice(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    """Mean over lesions of the Dice coefficient of a true lesion and the predicted lesions that belong to it.

    True lesions without a prediction and predicted lesions without a truth count as 0. True lesions of at most
    50 mm3 are excluded. If no lesion is left, the mean is 1. Arguments as for `hd95`.
    """
    return float(np.mean(_lesion_scores(prediction, truth, spacing, dice, worst=0.0) or 1.0))


def lesionwise_hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    """As `lesionwise_dice`, for HD95 by area in mm: 374 mm for a lesion without a partner, 0 if no lesion is left."""
    hd95 = partial(hd95_by_area, spacing=spacing)
    return float(np.mean(_lesion_scores(prediction, truth, spacing, hd95, worst=UNMATCHED_MM) or 0.0))


def _lesion_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Spacing,
    score: Callable[[np.ndarray, np.ndarray], float],
    worst: float,
) -> list[float]:
    """The score of each true lesion above the minimum volume, and the worst score for each unmatched predicted one."""
    check_masks(prediction, truth)
    lesions, _ = label(binary_dilation(truth, DILATION, DILATIONS), CONNECTIVITY)
    lesions[~truth] = 0
    predicted, count = label(prediction, CONNECTIVITY)
    voxel = float(np.prod(check_spacing(spacing)))
    unmatched, scores = set(range(1, count + 1)), []
    boxes = find_objects(predicted)
    for number, own in enumerate(find_objects(lesions), start=1):
        around = tuple(slice(max(side.start - DILATIONS, 0), side.stop + DILATIONS) for side in own)
        near = binary_dilation(lesions[around] == number, DILATION, DILATIONS)
        matched = np.setdiff1d(predicted[around][near], [0])
        unmatched -= set(matched.tolist())
        if np.count_nonzero(lesions[own] == number) * voxel > MIN_VOLUME_MM3:
            sides = zip(own, *(boxes[k - 1] for k in matched), strict=True)  # of the smallest box around all of them
            box = tuple(slice(min(part.start for part in side), max(part.stop for part in side)) for side in sides)
            pair = np.isin(predicted[box], matched), lesions[box] == number
            scores.append(score(*pair) if len(matched) else worst)
    return scores + [worst] * len(unmatched)
