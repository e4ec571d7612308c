"""The page of an evaluation of restored images: tables, box plots, the worst and the median case.

Images are `(C, H, W)` in [0, 1], panels RGB uint8 `(height, width, 3)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from asa.evaluation.policies import range_text
from asa.reporting.evaluation import PANEL_WIDTH, SHOWN, case_scores, case_titles, summary_values, value_cells
from asa.reporting.figures import GAP, encode_png, heat, with_gaps
from asa.reporting.pages import data_uri, require_for_page, write_page
from asa.restoration.images import read_picture, read_restored
from asa.restoration.measures import RestorationSummary
from asa.restoration.method import psnr

BRIGHTEST = 99.5  # percentile of the drawn errors at which the colour scale ends


@dataclass(frozen=True)
class ImageFiles:
    """Files of one case; None for a missing degraded image."""

    case_id: str
    prediction: Path
    truth: Path
    degraded: Path | None = None


def write_restoration_report(path: Path, summary: RestorationSummary, cases: Sequence[ImageFiles]) -> None:
    """Write the page of an evaluation of restored images; the files of the shown cases are read again.

    Raises:
        ImportError: the `report` extra is not installed.
        ValueError: a degraded image does not match its clean image.
    """
    require_for_page(path)
    files = {case.case_id: case for case in cases}
    order = list(case_scores(summary))
    worst, median = order[:SHOWN], order[len(order) // 2]
    titles = case_titles(summary, {"Worst case": worst, "Median case": [median] * (median not in worst)})
    shown = {title: read_case(files[case_id], summary.window) for case_id, title in titles.items()}
    top = error_scale(list(shown.values()))
    width = 1.0 if summary.window is None else summary.window[1] - summary.window[0]
    write_page(
        path,
        "restoration.html.j2",
        **summary_values(summary),
        notes=[],
        data_range=range_text(summary.window),
        scale=f"{top * width:.2g}",
        unit="of the range" if summary.window is None else "in the images' units",
        shown=[_case_figure(title, images, top) for title, images in shown.items()],
        cases=[{"id": row.case_id, "values": value_cells(row, summary)} for row in summary.rows],
    )


def read_case(files: ImageFiles, window: Sequence[float] | None) -> dict[str, np.ndarray]:
    """A case's images by title; the degraded one is upscaled bilinearly to the size of the others."""
    truth, output = read_picture(files.truth, window), read_restored(files.prediction, window)
    images = {"Output": output, "Truth": truth}
    if files.degraded is None:
        return images
    degraded = read_picture(files.degraded, window)
    if len(degraded) != len(truth):
        raise ValueError(
            f"{files.degraded}: has {len(degraded)} channels, its clean image {len(truth)}: give the degraded image of "
            "this clean one"
        )
    upscaled = F.interpolate(torch.from_numpy(degraded)[None], truth.shape[1:], mode="bilinear")[0].numpy()
    return {"Input": upscaled, **images}


def error_map(images: dict[str, np.ndarray]) -> np.ndarray:
    """Absolute error of the output, averaged over channels: `(H, W)`."""
    return np.abs(images["Output"] - images["Truth"]).mean(axis=0)


def error_scale(cases: Sequence[dict[str, np.ndarray]]) -> float:
    """The error that is drawn white in all cases of a page: a high percentile of the case with the largest errors."""
    return max((float(np.percentile(error_map(images), BRIGHTEST)) for images in cases), default=0.0) or 1.0


def image_panel(images: dict[str, np.ndarray], top: float) -> np.ndarray:
    """A case's images and the error of the output, white at `top`, side by side and as wide as the page: RGB."""
    drawn = [*map(_rgb, images.values()), heat(error_map(images), (0.0, top))]
    width = (PANEL_WIDTH - GAP * (len(drawn) - 1)) // len(drawn)
    return with_gaps([_fitted(image, width) for image in drawn], axis=1)


def _case_figure(title: str, images: dict[str, np.ndarray], top: float) -> dict[str, Any]:
    """Template values of one case: its panel, and the PSNR of its input."""
    panel, input_psnr = image_panel(images, top), None
    if "Input" in images:
        input_psnr = f"{float(psnr(torch.from_numpy(images['Input'] - images['Truth'])[None])):.2f}"
    return {
        "title": title,
        "columns": [*images, "Error"],
        "panel": data_uri(encode_png(panel)),
        "width": panel.shape[1],
        "input_psnr": input_psnr,
    }


def _rgb(image: np.ndarray) -> np.ndarray:
    colour = np.broadcast_to(image, (3, *image.shape[1:]))
    return np.rint(255 * colour.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)


def _fitted(image: np.ndarray, width: int) -> np.ndarray:
    """An RGB image at most this wide: its pixels repeated, or averaged if it is wider."""
    times = width // image.shape[1]
    if times:
        return image.repeat(times, axis=0).repeat(times, axis=1)
    size = (max(round(image.shape[0] * width / image.shape[1]), 1), width)
    small = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), size, mode="area")[0]
    return small.round().byte().permute(1, 2, 0).numpy()
