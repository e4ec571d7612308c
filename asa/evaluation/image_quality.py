"""How good restored images are: PSNR, SSIM and RMSE, with intervals over images."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

import torch
from monai.metrics.regression import SSIMMetric
from torch import Tensor

from asa.evaluation.measures import WHOLE
from asa.evaluation.summary import Findings, aligned, statistic_cells
from asa.methods.restore import psnr

SSIM_WINDOW = 11  # pixels


def score_image(prediction: Tensor, target: Tensor, width: float = 1.0) -> dict[str, float]:
    """PSNR, SSIM and RMSE of a restored image, cut off to [0, 1] as its target is.

    Args:
        prediction, target: `(C, H, W)`; the data range is 1, the window's width.
        width: of the window in the image's units.

    Returns:
        "psnr" in dB over all pixels and channels; "ssim" (Wang et al., IEEE TIP 2004), Gaussian window of 11 pixels and
        sigma 1.5, the mean where the window lies inside, and over channels, NaN for a smaller image; "rmse" in the
        image's units.

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
class Quality(Findings):
    """What an evaluation of restored images found.

    Args:
        policy, rows, results, seed: see `Findings`; the only region is the whole image.
        window: (low, high) in the images' units, the data range; None: the files' whole range.
        truths: id -> checksum of the clean image.
        left_out: number of clean images without a restored one; they count nowhere.
    """

    window: tuple[float, float] | None
    truths: dict[str, str]
    left_out: int = 0

    def as_json(self) -> dict[str, Any]:
        """The findings for a JSON file, without the rows; undefined numbers are null."""
        return super().as_json() | {
            "data_range": None if self.window is None else list(self.window),
            "without_prediction": self.left_out,
        }


def scores_csv(quality: Quality) -> str:
    """One line an image; `truth` tells clean images apart."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [metric.name for metric in quality.policy.metrics]
    writer.writerow(["id", *names, "truth"])
    for row in quality.rows:
        writer.writerow([row.case_id, *(f"{row.values[name]:.6f}" for name in names), quality.truths[row.case_id]])
    return text.getvalue()


def quality_table(quality: Quality) -> str:
    """The findings as plain text for a terminal; no trailing newline."""
    table = [["", "mean", "95 % interval", "sd", "median", "n used"]]
    for metric in quality.policy.metrics:
        table.append([metric.heading, *statistic_cells(quality.results[WHOLE][metric.name], metric.digits)])
    left_out = [f"no prediction (left out): {quality.left_out}"] if quality.left_out else []
    return "\n".join([quality.policy.description, *aligned(table), *left_out])
