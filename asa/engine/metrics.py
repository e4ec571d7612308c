"""Overlap and surface distance of two masks, and the policies that say what a number means.

A policy names the metrics, the regions they are computed on and the value of every case in which a mask is
empty, so that no number depends on a library's default. Masks are bool `(x, y, z)` in the file's own axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.spatial import cKDTree

UNDEFINED = math.nan

Spacing = tuple[float, float, float] | np.ndarray
Regions = dict[str, tuple[int, ...]]


def _check_masks(a: np.ndarray, b: np.ndarray) -> None:
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {a.dtype} and {b.dtype}: compare a label map with its value first")
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"masks must be 3-D and of one shape, got {a.shape} and {b.shape}")


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
    _check_masks(a, b)
    size = np.count_nonzero(a) + np.count_nonzero(b)
    return 2.0 * np.count_nonzero(a & b) / size if size else UNDEFINED


def hd95(a: np.ndarray, b: np.ndarray, spacing: Spacing) -> float:
    """95th percentile Hausdorff distance between the surfaces of two masks, in mm.

    The surface of a mask is the set of its voxels with at least one of their six face neighbours outside it
    (beyond the image's edge is outside), each a point at the voxel's centre: the mask minus its erosion. From
    each surface voxel of one mask the Euclidean distance to the nearest surface voxel of the other is taken;
    HD95 is the 95th percentile (linear interpolation) of these distances in each direction, the larger of the
    two. This is the definition of MONAI's `compute_hausdorff_distance(percentile=95, spacing=...)`. The
    `surface-distance` package puts surface elements on voxel corners and weights them by area, and so differs
    by up to about a voxel's diagonal.

    Args:
        a: bool `(x, y, z)`.
        b: bool `(x, y, z)`.
        spacing: voxel size in mm along the three array axes.

    Returns:
        Distance in mm; NaN if either mask is empty (a policy decides what that counts as).

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape; a spacing that is not three lengths.
    """
    _check_masks(a, b)
    size = np.asarray(spacing, dtype=np.float64)
    if size.shape != (3,) or not np.all(np.isfinite(size) & (size > 0)):
        raise ValueError(f"spacing must be three positive lengths in mm, got {spacing}")
    if not a.any() or not b.any():
        return UNDEFINED
    box = bounding_box(a | b)
    surface_a, surface_b = _surface(a[box]), _surface(b[box])
    return max(
        float(np.percentile(_distances(surface_a, surface_b, size), 95)),
        float(np.percentile(_distances(surface_b, surface_a, size), 95)),
    )


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


def _distances(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each surface voxel of `source` to the nearest of `target`, shared voxels last."""
    # Where two segmentations agree their surfaces coincide, so most voxels need no search.
    apart = np.argwhere(source & ~target) * spacing
    shared = np.zeros(np.count_nonzero(source & target))
    if not len(apart):
        return shared
    # Points on a grid: splitting cells at their middle builds faster than at the median and searches as fast.
    tree = cKDTree(np.argwhere(target) * spacing, leafsize=32, balanced_tree=False)
    return np.concatenate([tree.query(apart)[0], shared])


@dataclass(frozen=True)
class Metric:
    """One number for a pair of masks, with its value in every case in which a mask is empty.

    Args:
        name: column in cases.csv and key in summary.json.
        title: heading in tables and figures.
        unit: unit, empty if there is none.
        meaning: its definition in a sentence.
        digits: digits after the point in tables.
        higher_is_better: direction of the metric.
        compute: `(prediction, truth, spacing)` -> value, called only when neither mask is empty.
        both_empty: value when both masks are empty; NaN is "undefined" (also below).
        truth_empty: value when only the truth is empty.
        prediction_empty: value when only the prediction is empty.
    """

    name: str
    title: str
    unit: str
    meaning: str
    digits: int
    higher_is_better: bool
    compute: Callable[[np.ndarray, np.ndarray, Spacing], float]
    both_empty: float
    truth_empty: float
    prediction_empty: float

    @property
    def heading(self) -> str:
        """Title with its unit, e.g. `HD95 (mm)`."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def __call__(self, prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
        """Value for two bool masks `(x, y, z)` and a spacing in mm; NaN where it is undefined."""
        predicted, true = bool(prediction.any()), bool(truth.any())
        if predicted and true:
            return float(self.compute(prediction, truth, spacing))
        if predicted:
            return self.truth_empty
        return self.prediction_empty if true else self.both_empty


def each_label(labels: Mapping[int, str]) -> Regions:
    """Every declared label as a region of its own: name -> its values."""
    return {name: (value,) for value, name in labels.items()}


def joined_labels(labels: Mapping[int, str], joined: Mapping[str, Sequence[int]]) -> Regions:
    """Regions as a cohort defines them: name -> declared label values whose union it is.

    Raises:
        ValueError: a region without values, or with one that is not declared.
    """
    for name, values in joined.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"regions: {name} is a list of label values, like [1, 4], got {values!r}")
        if unknown := [value for value in values if value not in labels]:
            known = ", ".join(f"{value} {label}" for value, label in labels.items())
            raise ValueError(
                f"regions: {name} joins {unknown[0]!r}, which is not a declared label value; declared are {known}"
            )
    return {name: tuple(values) for name, values in joined.items()}


@dataclass(frozen=True)
class Policy:
    """What is measured, on which regions, and what an empty mask counts as.

    Args:
        name: how a user names it.
        description: one sentence for the tables.
        metrics: the metrics; cases are ranked by the first one.
        regions: declared labels -> the regions, name -> label values whose union it is.
        ignored: label values of the truth whose voxels count neither for nor against a prediction.
    """

    name: str
    description: str
    metrics: tuple[Metric, ...]
    regions: Callable[[Mapping[int, str]], Regions] = each_label
    ignored: tuple[int, ...] = ()

    def regions_of(self, labels: Mapping[int, str]) -> Regions:
        """The regions for a declaration of labels, name -> values.

        Raises:
            ValueError: a declaration that is empty, names the background 0, or uses a name twice.
        """
        if not labels or 0 in labels or len(set(labels.values())) < len(labels):
            raise ValueError(f"labels name each foreground value once, and not the background 0; got {dict(labels)}")
        return self.regions(labels)

    def of_cohort(self, regions: Mapping[str, Sequence[int]], ignored: Sequence[int]) -> "Policy":
        """This policy on a cohort's own regions, if it has any, and without the voxels that it ignores.

        Args:
            regions: name -> label values whose union it is; empty leaves the policy's own.
            ignored: label values of the truth.
        """
        own = partial(joined_labels, joined=dict(regions)) if regions else self.regions
        return replace(self, regions=own, ignored=tuple(dict.fromkeys((*self.ignored, *ignored))))

    def truth_table(self) -> list[tuple[str, list[str]]]:
        """The value of each metric in each empty case: `[(case, [value of each metric])]`, for printing."""
        cases = [
            ("both empty", "both_empty"),
            ("only truth empty", "truth_empty"),
            ("only prediction empty", "prediction_empty"),
        ]
        return [
            (title, [_with_unit(getattr(metric, field), metric.unit) for metric in self.metrics])
            for title, field in cases
        ]


def _dice_of_pair(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    return dice(prediction, truth)


def _with_unit(value: float, unit: str) -> str:
    return "undefined" if math.isnan(value) else f"{value:g} {unit}".strip()


POLICIES: dict[str, Policy] = {
    "ibsr": Policy(
        name="ibsr",
        description="Dice and HD95 of each declared label or region, on the truth's own grid and with its voxel size.",
        metrics=(
            Metric(
                name="dice",
                title="Dice",
                unit="",
                meaning="twice the voxels in common over the voxels of both masks; 1 is perfect.",
                digits=3,
                higher_is_better=True,
                compute=_dice_of_pair,
                both_empty=1.0,
                truth_empty=0.0,
                prediction_empty=0.0,
            ),
            Metric(
                name="hd95_mm",
                title="HD95",
                unit="mm",
                meaning="95th percentile of the distances in mm from the surface voxels of one mask to the "
                "nearest of the other, in each direction, the larger of the two; 0 is perfect.",
                digits=2,
                higher_is_better=False,
                compute=hd95,
                both_empty=0.0,
                truth_empty=UNDEFINED,
                prediction_empty=UNDEFINED,
            ),
        ),
    ),
}


def get_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: an unknown name, listing the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy '{name}': choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]
