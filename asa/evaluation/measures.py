"""What tables and pages say of a number, whatever it is computed from; and the numbers of restored images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESTORATION = "restoration"  # the policy's name
WHOLE = "image"  # its only region


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a number is called, printed and read.

    Args:
        name: column in cases.csv and key in summary.json.
        title: heading in tables and figures.
        unit: unit, empty if there is none.
        meaning: its definition in a sentence.
        digits: digits after the point in tables.
        higher_is_better: direction.
    """

    name: str
    title: str
    unit: str
    meaning: str
    digits: int
    higher_is_better: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value that there can be: scores end at 1, errors at 0, decibels nowhere."""
        if self.higher_is_better:
            return -math.inf, math.inf if self.unit else 1.0
        return 0.0, math.inf

    @property
    def heading(self) -> str:
        """Title with its unit, e.g. `HD95 (mm)`."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def as_json(self) -> dict[str, Any]:
        """The measure for a JSON file."""
        return {key: getattr(self, key) for key in ("name", "title", "unit", "meaning")}


@dataclass(frozen=True)
class Scoring:
    """What is measured.

    Args:
        name: how a user names it.
        description: one sentence for the tables.
        metrics: the numbers; cases are ranked by the first one.
    """

    name: str
    description: str
    metrics: tuple[Measure, ...]

    def truth_table(self) -> list[tuple[str, list[str]]]:
        """The value of each metric where a mask is empty, `[(case, [value of each metric])]`; none without masks."""
        return []

    def exceptions(self) -> list[str]:
        """What the truth table does not hold for, one sentence each."""
        return []

    def as_json(self) -> dict[str, Any]:
        """The scoring for a JSON file."""
        return {
            "name": self.name,
            "description": self.description,
            "metrics": [metric.as_json() for metric in self.metrics],
        }


def restoration(window: Sequence[float] | None) -> Scoring:
    """PSNR, SSIM and RMSE of restored images.

    Args:
        window: (low, high) in the images' units, the data range; None: the files' whole range, as 0 to 1.
    """
    width = 1.0 if window is None else float(window[1]) - float(window[0])
    unit = "as a share of the data range" if window is None else "in the images' units"
    psnr = Measure(
        name="psnr",
        title="PSNR",
        unit="dB",
        meaning="peak signal-to-noise ratio, 10 log10(1 / mean squared error) over all pixels and channels, with the "
        "data range as 1; 100 at most.",
        digits=2,
        higher_is_better=True,
    )
    ssim = Measure(
        name="ssim",
        title="SSIM",
        unit="",
        meaning="structural similarity (Wang et al., IEEE TIP 2004) with a Gaussian window of 11 pixels and sigma 1.5, "
        "the mean where it lies inside the image, and over channels; undefined for smaller images; 1 is perfect.",
        digits=4,
        higher_is_better=True,
    )
    rmse = Measure(
        name="rmse",
        title="RMSE",
        unit="",
        meaning=f"root of the mean squared error, {unit}; 0 is perfect.",
        digits=max(1, 4 - round(math.log10(width))),
        higher_is_better=False,
    )
    description = f"Restored images against clean ones, both cut off to the data range: {range_text(window)}."
    return Scoring(RESTORATION, description, (psnr, ssim, rmse))


def range_text(window: Sequence[float] | None) -> str:
    """The data range in words."""
    if window is None:
        return "the files' whole range, as 0 to 1"
    return f"{float(window[0]):g} to {float(window[1]):g} in the images' units"


def nullable(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which has no NaN."""
    return {key: None if math.isnan(value) else value for key, value in numbers.items()}
