"""Policies: which metrics are computed on which regions, and the value of each metric where a mask is empty.

Nothing is left to a library's default: for every combination of empty masks a metric has a value, or NaN (undefined).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from asa.evaluation import metrics
from asa.evaluation.metrics import UNDEFINED, Spacing
from asa.evaluation.statistics import nullable

RESTORATION = "restoration"  # name of the policy for restored images
WHOLE = "image"  # its only region
ALL = "all"  # the only region of the policy for classes
EMPTY = {"both_empty": "both empty", "truth_empty": "only truth empty", "prediction_empty": "only prediction empty"}

Regions = dict[str, tuple[int, ...]]
Mask = np.ndarray


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """Metadata of a metric, for tables, figures and files. Unless told otherwise it is a score, of which 1 is best."""

    name: str  # column in cases.csv and key in summary.json
    title: str  # heading in tables and figures
    unit: str = ""
    meaning: str  # definition in one sentence
    digits: int = 3  # decimals in tables
    higher_is_better: bool = True
    possible: tuple[float, float] | None = None  # range of values; None: 0 to 1 for scores, 0 or more for errors

    @property
    def bounds(self) -> tuple[float, float]:
        """Range of possible values."""
        return self.possible or (0.0, 1.0 if self.higher_is_better else math.inf)

    @property
    def heading(self) -> str:
        """Title with its unit, e.g. `HD95 (mm)`."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def as_json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("name", "title", "unit", "meaning")}


@dataclass(frozen=True)
class PolicyInfo:
    """Name, as in `policy=`, description and metrics of a policy; cases are ranked by the first metric."""

    name: str
    description: str
    metrics: tuple[MetricInfo, ...]

    def truth_table(self) -> list[tuple[str, list[str]]]:
        """The value of each metric where a mask is empty, `[(case, [value of each metric])]`; none without masks."""
        return []

    def exceptions(self) -> list[str]:
        """Exceptions to the truth table, one sentence each."""
        return []

    def as_json(self) -> dict[str, Any]:
        metrics = [metric.as_json() for metric in self.metrics]
        return {"name": self.name, "description": self.description, "metrics": metrics}


@dataclass(frozen=True, kw_only=True)
class Metric(MetricInfo):
    """A metric of two masks, with its value if both masks are empty, or only one of them is; NaN means undefined."""

    compute: Callable[[Mask, Mask, Spacing], float]  # (prediction, truth, spacing) -> value
    both_empty: float = 1.0
    truth_empty: float = 0.0
    prediction_empty: float = 0.0
    exception: str = ""  # to these three values, in words; `compute` is then called for empty masks too

    def __call__(self, prediction: Mask, truth: Mask, spacing: Spacing) -> float:
        """Value for two bool masks `(x, y, z)` and a spacing in mm; NaN if undefined."""
        predicted, true = bool(prediction.any()), bool(truth.any())
        if self.exception or (predicted and true):
            return float(self.compute(prediction, truth, spacing))
        if predicted:
            return self.truth_empty
        return self.prediction_empty if true else self.both_empty

    def as_json(self) -> dict[str, Any]:
        values = nullable({key: getattr(self, key) for key in EMPTY})
        return super().as_json() | {"empty_masks_count_as": values, "exception": self.exception}

    def value_text(self, empty: str) -> str:
        """The value for one of `EMPTY`, with its unit."""
        value = getattr(self, empty)
        return "undefined" if math.isnan(value) else f"{value:g} {self.unit}".strip()


# ---- regions ----


def each_label(labels: Mapping[int, str]) -> Regions:
    """Every declared label as a region of its own: name -> its value."""
    return {name: (value,) for value, name in labels.items()}


def joined_labels(labels: Mapping[int, str], joined: Mapping[str, Sequence[int]]) -> Regions:
    """Regions that a cohort declares: name -> the declared label values that it joins; else a ValueError."""
    for name, values in joined.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"regions: {name} must be a list of label values, like [1, 4], got {values!r}")
        if undeclared := [value for value in values if value not in labels]:
            declared = ", ".join(f"{value} {label}" for value, label in labels.items())
            raise ValueError(
                f"regions: {name} joins {undeclared[0]!r}, which is not a declared label value; declared are {declared}"
            )
    return {name: tuple(values) for name, values in joined.items()}


def tumour_regions(labels: Mapping[int, str]) -> Regions:
    """WT, TC and ET of the BraTS label values: 1 necrosis, 2 oedema, and enhancing tumour 4 (2021) or 3 (2023)."""
    if set(labels) not in ({1, 2, 4}, {1, 2, 3}):
        raise ValueError(
            f"this policy scores WT, TC and ET of the label values 1 2 4 or 1 2 3, and declared are {sorted(labels)}: "
            "give regions={WT: [...], TC: [...], ET: [...]}"
        )
    enhancing = max(labels)
    return {"WT": (1, 2, enhancing), "TC": (1, enhancing), "ET": (enhancing,)}


@dataclass(frozen=True)
class Policy(PolicyInfo):
    """A policy for label maps."""

    metrics: tuple[Metric, ...]
    regions: Callable[[Mapping[int, str]], Regions] = each_label  # of declared labels: name -> values that it joins
    ignored: tuple[int, ...] = ()  # label values whose voxels are removed from the truth and the prediction

    def regions_of(self, labels: Mapping[int, str]) -> Regions:
        """The regions of declared labels, value -> name; a ValueError for none, a background 0, or two of a name."""
        if not labels or 0 in labels or len(set(labels.values())) < len(labels):
            raise ValueError(
                f"labels must name each foreground value once, and not the background 0; got {dict(labels)}"
            )
        return self.regions(labels)

    def of_cohort(self, regions: Mapping[str, Sequence[int]], ignored: Sequence[int]) -> "Policy":
        """This policy with a cohort's own regions ({} keeps the policy's) and further ignored label values."""
        own = partial(joined_labels, joined=dict(regions)) if regions else self.regions
        return replace(self, regions=own, ignored=tuple(dict.fromkeys((*self.ignored, *ignored))))

    def truth_table(self) -> list[tuple[str, list[str]]]:
        return [(title, [metric.value_text(key) for metric in self.metrics]) for key, title in EMPTY.items()]

    def exceptions(self) -> list[str]:
        titles: dict[str, list[str]] = {}
        for metric in self.metrics:
            if metric.exception:
                titles.setdefault(metric.exception, []).append(metric.title)
        return [f"{', '.join(names)}: {exception}" for exception, names in titles.items()]

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"ignored": list(self.ignored)}


# ---- metrics ----


def _no_spacing(function: Callable[[Mask, Mask], float], prediction: Mask, truth: Mask, spacing: Spacing) -> float:
    return function(prediction, truth)


DICE = Metric(
    name="dice",
    title="Dice",
    meaning="twice the voxels in common over the voxels of both masks; 1 is perfect.",
    compute=partial(_no_spacing, metrics.dice),
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
HD95_VOXELS = replace(
    HD95,
    name="hd95_voxels",
    unit="voxels",
    meaning="95th percentile of the distances in voxels from the surface voxels of one mask to the "
    "nearest of the other, both directions together (as medpy).",
    compute=partial(_no_spacing, partial(metrics.hd95_pooled, spacing=(1.0, 1.0, 1.0))),
    truth_empty=373.12866,
    prediction_empty=373.12866,
)
HD95_IN_PLANE = replace(
    HD95,
    meaning="95th percentile of the distances in mm from the outline of one mask in its slices to the "
    "nearest of the other's, in each direction, the larger of the two; 0 is perfect.",
    compute=partial(metrics.hd95, neighbours=metrics.IN_SLICE),
)
NSD = Metric(
    name="nsd_1mm",
    title="NSD at 1 mm",
    meaning="normalised surface Dice: the share of both surfaces, by area, that lies within 1 mm of the other; "
    "1 is perfect.",
    compute=partial(metrics.surface_dice, tolerance=1.0),
)
SENSITIVITY = Metric(
    name="sensitivity",
    title="Sensitivity",
    meaning="share of the true voxels that are predicted; 1 is perfect.",
    compute=partial(_no_spacing, metrics.sensitivity),
)
VOLUME_DIFFERENCE = Metric(
    name="volume_difference_percent",
    title="AVD",
    unit="%",
    meaning="absolute difference of the volumes in percent of the true one; 0 is perfect.",
    digits=1,
    higher_is_better=False,
    compute=partial(_no_spacing, metrics.volume_difference),
    both_empty=0.0,
    truth_empty=UNDEFINED,
    prediction_empty=100.0,
)
LESION_RECALL = Metric(
    name="lesion_recall",
    title="Lesion recall",
    meaning="share of the true lesions, connected in 3-D, that the prediction touches; 1 is perfect.",
    compute=partial(_no_spacing, metrics.lesion_recall),
    truth_empty=1.0,
)
LESION_F1 = Metric(
    name="lesion_f1",
    title="Lesion F1",
    meaning="harmonic mean of lesion recall and of the share of predicted lesions that touch a true one; 1 is perfect.",
    compute=partial(_no_spacing, metrics.lesion_f1),
)
_NO_LESION = "a truth without a lesion over 50 mm3 and without a false one counts as both empty"
LESION_DICE = replace(
    DICE,
    name="lesion_dice",
    title="Lesion Dice",
    meaning="mean over lesions of the Dice coefficient of a true lesion and the predicted ones that touch it; "
    "true lesions that meet when dilated by 3 voxels are one; those of at most 50 mm3 are left out; 1 is perfect.",
    compute=metrics.lesionwise_dice,
    exception=_NO_LESION,
)
LESION_HD95 = replace(
    HD95,
    name="lesion_hd95_mm",
    title="Lesion HD95",
    meaning="the same mean of the distance in mm within which 95 % of the area of each surface lies "
    "from the other, the larger of the two; 0 is perfect.",
    compute=metrics.lesionwise_hd95,
    truth_empty=metrics.UNMATCHED_MM,
    prediction_empty=metrics.UNMATCHED_MM,
    exception=_NO_LESION,
)

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
            metrics=(DICE, replace(HD95, truth_empty=373.13, prediction_empty=373.13), NSD, SENSITIVITY),
            regions=tumour_regions,
        ),
        Policy(
            name="brats23_lesion",
            description="WT, TC and ET lesion by lesion as BraTS 2023 scored adult glioma: a missed or a false lesion "
            "is 0 in Dice and 374 mm in HD95. Dice and sensitivity of the whole region stand beside.",
            metrics=(LESION_DICE, LESION_HD95, DICE, SENSITIVITY),
            regions=tumour_regions,
        ),
        Policy(
            name="wmh2017",
            description="The five measures of the WMH segmentation challenge of 2017; other pathology, label 2 of the "
            "truth, is ignored.",
            metrics=(DICE, HD95_IN_PLANE, VOLUME_DIFFERENCE, LESION_RECALL, LESION_F1),
            ignored=(2,),
        ),
        Policy(
            name="asa_paper",
            description="As the released scripts of the ASA paper compute them, for setting a number beside a printed "
            "one: HD95 in voxels, whatever their size, and 373.12866 where only one mask is empty.",
            metrics=(DICE, HD95_VOXELS),
        ),
        Policy(
            name="asa_paper_brats",
            description="WT, TC and ET by the metrics of asa_paper: HD95 in voxels, over both directions together.",
            metrics=(DICE, HD95_VOXELS),
            regions=tumour_regions,
        ),
    )
}

CLASSIFICATION = PolicyInfo(
    "classification",
    "Classes of whole scans. A scan's values are its shares in the AUC and in the balanced accuracy of all, so that "
    "the interval of an AUC is wide as DeLong's.",
    (
        MetricInfo(
            name="auc",
            title="AUC",
            meaning="area under the ROC curve; for more than two classes the mean of one-versus-rest.",
        ),
        MetricInfo(
            name="balanced_accuracy",
            title="Balanced accuracy",
            meaning="mean recall over the classes present.",
        ),
    ),
)


def get_policy(name: str) -> Policy:
    """The policy of that name; a ValueError that lists the policies if there is none."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy '{name}': choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]


def restoration_policy(window: Sequence[float] | None) -> PolicyInfo:
    """PSNR, SSIM and RMSE of restored images in a data range, (low, high) in their units; None: all, as 0 to 1."""
    width = 1.0 if window is None else float(window[1]) - float(window[0])
    unit = "as a share of the data range" if window is None else "in the images' units"
    psnr = MetricInfo(
        name="psnr",
        title="PSNR",
        unit="dB",
        meaning="peak signal-to-noise ratio, 10 log10(1 / mean squared error) over all pixels and channels, with the "
        "data range as 1; 100 at most.",
        digits=2,
        possible=(0.0, 100.0),
    )
    ssim = MetricInfo(
        name="ssim",
        title="SSIM",
        meaning="structural similarity (Wang et al., IEEE TIP 2004) with a Gaussian window of 11 pixels and sigma 1.5, "
        "the mean where it lies inside the image, and over channels; undefined for smaller images; 1 is perfect.",
        digits=4,
        possible=(-1.0, 1.0),
    )
    rmse = MetricInfo(
        name="rmse",
        title="RMSE",
        meaning=f"root of the mean squared error, {unit}; 0 is perfect.",
        digits=max(1, 4 - round(math.log10(width))),
        higher_is_better=False,
    )
    description = f"Restored images against clean ones, both cut off to the data range: {range_text(window)}."
    return PolicyInfo(RESTORATION, description, (psnr, ssim, rmse))


def range_text(window: Sequence[float] | None) -> str:
    """The data range in words."""
    whole = "the files' whole range, as 0 to 1"
    return whole if window is None else f"{float(window[0]):g} to {float(window[1]):g} in the images' units"
