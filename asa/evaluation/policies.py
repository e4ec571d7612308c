"""Policies: what is measured, on which regions, and what every case with an empty mask counts as.

No number depends on a library's default: a metric of a policy has a value, or is said to be undefined, whichever
mask is empty.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from asa.evaluation import lesions, metrics
from asa.evaluation import surface_distance as surfels
from asa.evaluation.measures import Measure, Scoring, nullable
from asa.evaluation.metrics import UNDEFINED, Spacing

Regions = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Metric(Measure):
    """One number for a pair of masks, with its value in every case in which a mask is empty.

    Args:
        compute: `(prediction, truth, spacing)` -> value, called only when neither mask is empty (but see `exception`).
        both_empty: value when both masks are empty; NaN is "undefined" (also below).
        truth_empty: value when only the truth is empty.
        prediction_empty: value when only the prediction is empty.
        exception: if there is one to these three values, in words; `compute` is then called for empty masks too.
    """

    compute: Callable[[np.ndarray, np.ndarray, Spacing], float]
    both_empty: float
    truth_empty: float
    prediction_empty: float
    exception: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value that there can be: scores end at 1, distances and errors nowhere."""
        return 0.0, 1.0 if self.higher_is_better else math.inf

    def __call__(self, prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
        """Value for two bool masks `(x, y, z)` and a spacing in mm; NaN where it is undefined."""
        predicted, true = bool(prediction.any()), bool(truth.any())
        if self.exception or (predicted and true):
            return float(self.compute(prediction, truth, spacing))
        if predicted:
            return self.truth_empty
        return self.prediction_empty if true else self.both_empty

    def as_json(self) -> dict[str, Any]:
        """The metric for a JSON file; undefined values are null."""
        values = {key: getattr(self, key) for key in ("both_empty", "truth_empty", "prediction_empty")}
        return super().as_json() | {"empty_masks_count_as": nullable(values), "exception": self.exception}


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
class Policy(Scoring):
    """What is measured, on which regions, and what an empty mask counts as.

    Args:
        name, description: see `Scoring`.
        metrics: the metrics of a pair of masks.
        regions: declared labels -> the regions, name -> label values whose union it is.
        ignored: label values of the truth whose voxels count neither for nor against a prediction.
    """

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

    def exceptions(self) -> list[str]:
        """What the truth table does not hold for, one sentence each."""
        texts: dict[str, list[str]] = {}
        for metric in self.metrics:
            if metric.exception:
                texts.setdefault(metric.exception, []).append(metric.title)
        return [f"{', '.join(titles)}: {text}" for text, titles in texts.items()]

    def as_json(self) -> dict[str, Any]:
        """The policy for a JSON file."""
        return super().as_json() | {"ignored": list(self.ignored)}


def tumour_regions(labels: Mapping[int, str]) -> Regions:
    """WT, TC and ET of the label values of BraTS: 1 necrosis, 2 oedema, and the enhancing tumour 4 (2021) or 3 (2023).

    Raises:
        ValueError: other label values.
    """
    if set(labels) not in ({1, 2, 4}, {1, 2, 3}):
        raise ValueError(
            f"this policy scores WT, TC and ET of the label values 1 2 4 or 1 2 3, and declared are {sorted(labels)}: "
            "give regions={WT: [...], TC: [...], ET: [...]}"
        )
    enhancing = max(labels)
    return {"WT": (1, 2, enhancing), "TC": (1, enhancing), "ET": (enhancing,)}


def _with_unit(value: float, unit: str) -> str:
    return "undefined" if math.isnan(value) else f"{value:g} {unit}".strip()


# ---- metrics ----


def _without_spacing(
    prediction: np.ndarray, truth: np.ndarray, spacing: Spacing, measure: Callable[[np.ndarray, np.ndarray], float]
) -> float:
    return measure(prediction, truth)


def _hd95_in_voxels(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    return metrics.hd95_pooled(prediction, truth, (1.0, 1.0, 1.0))


DICE = Metric(
    name="dice",
    title="Dice",
    unit="",
    meaning="twice the voxels in common over the voxels of both masks; 1 is perfect.",
    digits=3,
    higher_is_better=True,
    compute=partial(_without_spacing, measure=metrics.dice),
    both_empty=1.0,
    truth_empty=0.0,
    prediction_empty=0.0,
)
HD95 = Metric(
    name="hd95_mm",
    title="HD95",
    unit="mm",
    meaning="95th percentile of the distances in mm from the surface voxels of one mask to the "
    "nearest of the other, in each direction, the larger of the two; 0 is perfect.",
    digits=2,
    higher_is_better=False,
    compute=metrics.hd95,
    both_empty=0.0,
    truth_empty=UNDEFINED,
    prediction_empty=UNDEFINED,
)
NSD = Metric(
    name="nsd_1mm",
    title="NSD at 1 mm",
    unit="",
    meaning="normalised surface Dice: the share of both surfaces, by area, that lies within 1 mm of the other; "
    "1 is perfect.",
    digits=3,
    higher_is_better=True,
    compute=partial(surfels.surface_dice, tolerance=1.0),
    both_empty=1.0,
    truth_empty=0.0,
    prediction_empty=0.0,
)
SENSITIVITY = Metric(
    name="sensitivity",
    title="Sensitivity",
    unit="",
    meaning="share of the true voxels that are predicted; 1 is perfect.",
    digits=3,
    higher_is_better=True,
    compute=partial(_without_spacing, measure=metrics.sensitivity),
    both_empty=1.0,
    truth_empty=0.0,
    prediction_empty=0.0,
)
LESIONWISE = "true lesions that meet when dilated by 3 voxels are one; those of at most 50 mm3 are left out"
NONE_SCORED = "a truth without a lesion over 50 mm3 and without a false one counts as both empty"

# ---- policies ----

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            name="ibsr",
            description="Dice, HD95 and NSD of each declared label or region, on the truth's own grid and with its "
            "voxel size.",
            metrics=(DICE, HD95, NSD),
        ),
        Policy(
            name="brats21",
            description="WT, TC and ET as BraTS 2021 scored them: a region that only one of the two has is 0 in Dice "
            "and 373.13 mm, the diagonal of its images, in HD95. NSD is added.",
            metrics=(
                DICE,
                replace(HD95, truth_empty=373.13, prediction_empty=373.13),
                NSD,
                SENSITIVITY,
            ),
            regions=tumour_regions,
        ),
        Policy(
            name="brats23_lesion",
            description="WT, TC and ET lesion by lesion as BraTS 2023 scored adult glioma: a missed or a false lesion "
            "is 0 in Dice and 374 mm in HD95. Dice and sensitivity of the whole region stand beside.",
            metrics=(
                replace(
                    DICE,
                    name="lesion_dice",
                    title="Lesion Dice",
                    meaning="mean over lesions of the Dice coefficient of a true lesion and the predicted ones that "
                    f"touch it; {LESIONWISE}; 1 is perfect.",
                    compute=lesions.lesionwise_dice,
                    exception=NONE_SCORED,
                ),
                replace(
                    HD95,
                    name="lesion_hd95_mm",
                    title="Lesion HD95",
                    meaning="the same mean of the distance in mm within which 95 % of the area of each surface lies "
                    "from the other, the larger of the two; 0 is perfect.",
                    compute=lesions.lesionwise_hd95,
                    truth_empty=lesions.UNMATCHED_MM,
                    prediction_empty=lesions.UNMATCHED_MM,
                    exception=NONE_SCORED,
                ),
                DICE,
                SENSITIVITY,
            ),
            regions=tumour_regions,
        ),
        Policy(
            name="wmh2017",
            description="The five measures of the WMH segmentation challenge of 2017; other pathology, label 2 of the "
            "truth, is ignored.",
            metrics=(
                DICE,
                replace(
                    HD95,
                    meaning="95th percentile of the distances in mm from the outline of one mask in its slices to the "
                    "nearest of the other's, in each direction, the larger of the two; 0 is perfect.",
                    compute=metrics.hd95_in_plane,
                ),
                Metric(
                    name="volume_difference_percent",
                    title="AVD",
                    unit="%",
                    meaning="absolute difference of the volumes in percent of the true one; 0 is perfect.",
                    digits=1,
                    higher_is_better=False,
                    compute=partial(_without_spacing, measure=metrics.volume_difference),
                    both_empty=0.0,
                    truth_empty=UNDEFINED,
                    prediction_empty=100.0,
                ),
                Metric(
                    name="lesion_recall",
                    title="Lesion recall",
                    unit="",
                    meaning="share of the true lesions, connected in 3-D, that the prediction touches; 1 is perfect.",
                    digits=3,
                    higher_is_better=True,
                    compute=partial(_without_spacing, measure=lesions.lesion_recall),
                    both_empty=1.0,
                    truth_empty=1.0,
                    prediction_empty=0.0,
                ),
                Metric(
                    name="lesion_f1",
                    title="Lesion F1",
                    unit="",
                    meaning="harmonic mean of lesion recall and of the share of predicted lesions that touch a true "
                    "one; 1 is perfect.",
                    digits=3,
                    higher_is_better=True,
                    compute=partial(_without_spacing, measure=lesions.lesion_f1),
                    both_empty=1.0,
                    truth_empty=0.0,
                    prediction_empty=0.0,
                ),
            ),
            ignored=(2,),
        ),
        Policy(
            name="asa_paper",
            description="As the scripts that the ASA paper's code is built on (nnFormer's) compute them, for setting a "
            "number beside a printed one: HD95 in voxels, whatever their size, and 0, as if perfect, where a mask is "
            "empty.",
            metrics=(
                DICE,
                Metric(
                    name="hd95_voxels",
                    title="HD95",
                    unit="voxels",
                    meaning="95th percentile of the distances in voxels from the surface voxels of one mask to the "
                    "nearest of the other, both directions together (as medpy).",
                    digits=2,
                    higher_is_better=False,
                    compute=_hd95_in_voxels,
                    both_empty=0.0,
                    truth_empty=0.0,
                    prediction_empty=0.0,
                ),
            ),
        ),
    )
}


def get_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: an unknown name, listing the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy '{name}': choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]
