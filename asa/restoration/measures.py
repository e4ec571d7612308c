"""Quality of restored images: PSNR, SSIM and RMSE, and their summary over images."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from monai.metrics.regression import SSIMMetric
from torch import Tensor

from asa.data.io.tables import csv_text
from asa.evaluation.policies import WHOLE
from asa.evaluation.summary import STATISTICS, Summary, aligned, statistic_cells, subjects_note
from asa.restoration.method import psnr

SSIM_WINDOW = 11  # pixels


def score_image(prediction: Tensor, target: Tensor, width: float = 1.0) -> dict[str, float]:
    """PSNR, SSIM and RMSE of a restored image, which is clipped to [0, 1] first.

    Args:
        prediction, target: `(C, H, W)`; the data range is 1.
        width: width of the data range in the image's units.

    Returns:
        "psnr" in dB over all pixels and channels; "ssim" (Wang et al., IEEE TIP 2004) with a Gaussian window of 11
        pixels and sigma 1.5, averaged over the positions where the window lies inside the image and over channels, NaN
        for smaller images; "rmse" in the image's units.

    Raises:
        ValueError: images of different shapes.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"the restored image is {tuple(prediction.shape)}, its target {tuple(target.shape)}")
    prediction = prediction.float().clamp(0, 1)
    error = (prediction - target)[None]
    ssim = math.nan
    if min(target.shape[1:]) >= SSIM_WINDOW:
        metric = SSIMMetric(spatial_dims=2, data_range=1.0, win_size=SSIM_WINDOW)
        ssim = float(torch.as_tensor(metric(prediction[None], target[None])))
    return {"psnr": float(psnr(error)), "ssim": ssim, "rmse": width * float(error.square().mean().sqrt())}


@dataclass(frozen=True, kw_only=True)
class RestorationSummary(Summary):
    """Results of an evaluation of restored images; the only region is the whole image."""

    window: tuple[float, float] | None  # the data range in the images' units; None: the files' whole range
    truths: dict[str, str]  # id -> checksum of the clean image
    left_out: int  # number of clean images without a restored one; they are not counted

    def as_json(self) -> dict[str, Any]:
        """The results for a JSON file, without the rows; undefined numbers are null."""
        return super().as_json() | {
            "data_range": None if self.window is None else list(self.window),
            "without_prediction": self.left_out,
        }


def scores_csv(summary: RestorationSummary) -> str:
    """A CSV row per image; `truth` is the checksum of the clean image, `subject` is there if one has several."""
    names = [metric.name for metric in summary.policy.metrics]
    rows = [[row.case_id, *(f"{row.values[name]:.9g}" for name in names)] for row in summary.rows]
    own = [[summary.subjects[row.case_id]] if summary.several else [] for row in summary.rows]
    cells = [[*row, summary.truths[row[0]], *subject] for row, subject in zip(rows, own, strict=True)]
    return csv_text(["id", *names, "truth", *(["subject"] if summary.several else [])], cells)


def restoration_table(summary: RestorationSummary) -> str:
    """The summary as plain text for a terminal; no trailing newline."""
    found = summary.results[WHOLE]
    rows = [[metric.heading, *statistic_cells(found[metric.name], metric.digits)] for metric in summary.policy.metrics]
    left_out = [f"no prediction (left out): {summary.left_out}"] if summary.left_out else []
    left_out += [subjects_note(len(summary.case_ids), summary.several)] if summary.several else []
    return "\n".join([summary.policy.description, *aligned([["", *STATISTICS], *rows]), *left_out])
