"""A folder of restored images against the clean ones: files matched, scored, written down, and drawn on a page.

OUT/cases.csv      a row an image
OUT/summary.json   statistics over the images, and the data range
OUT/digests.json   SHA-256 of both, which a comparison compares
OUT/report.html    both for reading, with pictures of the worst and of the middle image (needs the `report` extra)

Images are `(C, H, W)` in [0, 1], panels RGB uint8 `(height, width, 3)`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.regression import SSIMMetric
from torch import Tensor
from torch.nn import functional as F

from asa.data.datasets.record import subject_of
from asa.data.io.files import write_digests, write_json, write_whole
from asa.data.io.tables import check_own, csv_text
from asa.errors import listed
from asa.evaluation.policies import WHOLE, range_text, restoration_policy
from asa.evaluation.summary import (
    STATISTICS,
    Row,
    Summary,
    aligned,
    check_summary,
    describe_regions,
    statistic_cells,
    subjects_note,
)
from asa.reporting.evaluation import PANEL_WIDTH, SHOWN, case_scores, case_titles, summary_values, value_cells
from asa.reporting.figures import GAP, encode_png, heat, with_gaps
from asa.reporting.pages import check_page, data_uri, require_for_page, write_page
from asa.restoration.images import checked_window, common_window, list_pictures, read_picture, read_restored
from asa.restoration.method import psnr

SSIM_WINDOW = 11  # pixels
BRIGHTEST = 99.5  # percentile of the drawn errors at which the colour scale ends


@dataclass(frozen=True)
class ImageFiles:
    """Files of one case; None for a missing degraded image."""

    case_id: str
    prediction: Path
    truth: Path
    degraded: Path | None = None


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


def evaluate_pictures(
    predictions: str | Path,
    truth: str | Path,
    out: str | Path,
    *,
    inputs: str | Path | None = None,
    window: Sequence[float] | None = None,
    allow_missing: bool = False,
    subject: str | None = None,
) -> str:
    """Score restored images against clean ones; write cases.csv, summary.json and report.html.

    Args:
        predictions: folder of restored images; of PNG, as `asa-predict` writes them, the whole range is the window.
        truth, inputs: folders of the clean images, and of the degraded ones to show beside, with the same names.
        window: of the clean and degraded images, see `asa.restoration.images.read_picture`; None: that of the
            predictions, which `asa-predict` writes into them.
        allow_missing: leave out clean images that were not restored.
        subject: regular expression searched in the id, whose group 1 is the subject; None: see `subject_of`.

    Returns the table as text. A ValueError for images of different cases or sizes; an ImportError without the `report`
    extra, after cases.csv and summary.json are written.
    """
    page = Path(out) / "report.html"
    check_page(page)
    check_own(page.with_name("cases.csv"), "asa-evaluate", {"id", "truth"})
    check_summary(page.parent, "data_range")
    cases, left_out = _match(predictions, truth, inputs, allow_missing)
    ends = _data_range(cases, window)
    rows, truths = [], {}
    for case in cases:
        prediction, target = read_restored(case.prediction, ends), read_picture(case.truth, ends)
        try:
            found = score_image(torch.from_numpy(prediction), torch.from_numpy(target), _width(ends))
        except ValueError as error:
            raise ValueError(f"{case.case_id}: {error}") from None
        rows.append(Row(case.case_id, WHOLE, found))
        truths[case.case_id] = hashlib.sha256(target.tobytes()).hexdigest()[:12]
    policy = restoration_policy(ends)
    subjects = {row.case_id: subject_of(row.case_id, subject) for row in rows}
    results = describe_regions(rows, [WHOLE], policy.metrics, subjects)
    quality = RestorationSummary(
        policy=policy, rows=rows, results=results, subjects=subjects, window=ends, truths=truths, left_out=left_out
    )
    page.unlink(missing_ok=True)  # should the new one fail, an old one must not stand beside new numbers
    write_whole(page.with_name("cases.csv"), _scores_csv(quality).encode())
    write_json(page.with_name("summary.json"), quality.as_json())
    write_digests(page.parent, ("cases.csv", "summary.json"))
    _write_report(page, quality, cases)
    return _table(quality)


def _match(
    predictions: str | Path, truth: str | Path, inputs: str | Path | None, allow_missing: bool
) -> tuple[list[ImageFiles], int]:
    """Files of each restored image, and the number of clean images that were not restored."""
    restored, clean = list_pictures(predictions), list_pictures(truth)
    degraded = {} if inputs is None else list_pictures(inputs)
    for folder, found in ((truth, clean), (inputs, degraded)):
        if folder is not None and (unknown := sorted(restored.keys() - found.keys())):
            raise ValueError(f"{folder}: no image {unknown[0]}, of which there is a prediction")
    if (missing := sorted(clean.keys() - restored.keys())) and not allow_missing:
        raise ValueError(f"{predictions}: no prediction of {listed(missing, 1)}: predict them, or allow_missing=true")
    return [ImageFiles(id, restored[id], clean[id], degraded.get(id)) for id in restored], len(missing)


def _data_range(cases: Sequence[ImageFiles], given: Sequence[float] | None) -> tuple[float, float] | None:
    """The window that 0 and 1 stand for in the predictions: the one they store, the one given, or that of the truth."""
    stored = common_window(case.prediction for case in cases)
    if given is None:
        return common_window(case.truth for case in cases) if stored is None else stored
    chosen = checked_window(given)
    if stored is not None and stored != chosen:
        raise ValueError(
            f"{cases[0].prediction}: 0 and 1 are {stored[0]:g} and {stored[1]:g} in it, and not {list(chosen)}: give "
            "this window or none"
        )
    return chosen


def _width(window: tuple[float, float] | None) -> float:
    return 1.0 if window is None else window[1] - window[0]


def score_image(prediction: Tensor, target: Tensor, width: float = 1.0) -> dict[str, float]:
    """PSNR, SSIM and RMSE of a restored image, which is clipped to [0, 1] first.

    Args:
        prediction, target: `(C, H, W)`, of one shape; the data range is 1.
        width: width of the data range in the image's units.

    Returns:
        "psnr" in dB over all pixels and channels; "ssim" (Wang et al., IEEE TIP 2004) with a Gaussian window of 11
        pixels and sigma 1.5, averaged over the positions where the window lies inside the image and over channels, NaN
        for smaller images; "rmse" in the image's units.
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


def _scores_csv(summary: RestorationSummary) -> str:
    """A CSV row per image; `truth` is the checksum of the clean image, `subject` is there if one has several."""
    names, several = [metric.name for metric in summary.policy.metrics], summary.several
    cells = [
        [row.case_id, *(f"{row.values[name]:.9g}" for name in names), summary.truths[row.case_id]]
        + ([summary.subjects[row.case_id]] if several else [])
        for row in summary.rows
    ]
    return csv_text(["id", *names, "truth", *(["subject"] if several else [])], cells)


def _table(summary: RestorationSummary) -> str:
    """The summary as plain text for a terminal; no trailing newline."""
    found = summary.results[WHOLE]
    rows = [[metric.heading, *statistic_cells(found[metric.name], metric.digits)] for metric in summary.policy.metrics]
    notes = [f"no prediction (left out): {summary.left_out}"] if summary.left_out else []
    notes += [subjects_note(len(summary.case_ids), summary.several)] if summary.several else []
    return "\n".join([summary.policy.description, *aligned([["", *STATISTICS], *rows]), *notes])


# ---- the page: tables, box plots, the worst and the median case ----


def _write_report(path: Path, summary: RestorationSummary, cases: Sequence[ImageFiles]) -> None:
    require_for_page(path)
    files = {case.case_id: case for case in cases}
    order = list(case_scores(summary))
    worst, median = order[:SHOWN], order[len(order) // 2]
    titles = case_titles(summary, {"Worst case": worst, "Median case": [median] * (median not in worst)})
    shown = {title: read_case(files[case_id], summary.window) for case_id, title in titles.items()}
    top = error_scale(list(shown.values()))
    write_page(
        path,
        "restoration.html.j2",
        **summary_values(summary),
        notes=[],
        data_range=range_text(summary.window),
        scale=f"{top * _width(summary.window):.2g}",
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
    return max(float(np.percentile(error_map(images), BRIGHTEST)) for images in cases) or 1.0


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
