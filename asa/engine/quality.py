"""How good restored images are: PSNR, SSIM and RMSE, with intervals over images."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from monai.metrics.regression import SSIMMetric
from torch import Tensor

from asa.data.files import write_json, write_whole
from asa.data.picture import list_pictures, read_picture
from asa.engine.statistics import LEVEL, RESAMPLES, SEED
from asa.engine.summary import aligned, nullable, statistic, statistic_cells
from asa.methods.restore import psnr

METRICS = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 4), "rmse": ("RMSE", 4)}  # heading and digits
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


def evaluate_pictures(
    predictions: str | Path,
    truth: str | Path,
    out: str | Path,
    *,
    window: Sequence[float] | None = None,
    allow_missing: bool = False,
) -> str:
    """Score restored images against clean ones; write cases.csv and summary.json.

    Args:
        predictions: folder of restored images, as `asa-predict` writes them: [0, 1] is the window.
        truth: folder of clean images with the same names.
        out: folder for the results.
        window: of the clean images, see `asa.data.picture.read_picture`.
        allow_missing: leave out clean images that were not restored.

    Returns:
        The table as text.

    Raises:
        FileNotFoundError, ValueError: images of different cases or sizes.
    """
    restored, clean, out = list_pictures(predictions), list_pictures(truth), Path(out)
    if unknown := sorted(restored.keys() - clean.keys()):
        raise ValueError(f"{truth}: no image {unknown[0]}, of which there is a prediction")
    if (missing := sorted(clean.keys() - restored.keys())) and not allow_missing:
        raise ValueError(
            f"{predictions}: no prediction of {missing[0]} and {len(missing) - 1} more: predict them, or "
            "allow_missing=true"
        )
    width = 1.0 if window is None else float(window[1]) - float(window[0])
    rows: dict[str, dict[str, float]] = {}
    for id in restored:
        prediction, target = read_picture(restored[id]), read_picture(clean[id], window)
        try:
            rows[id] = score_image(torch.from_numpy(prediction), torch.from_numpy(target), width)
        except ValueError as error:
            raise ValueError(f"{id}: {error}") from None
    return _write(out, rows, window, len(missing))


def _write(out: Path, rows: Mapping[str, Mapping[str, float]], window: Sequence[float] | None, missing: int) -> str:
    """Write the scores and their summary, and give the table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *METRICS])
    writer.writerows([id, *(f"{row[name]:.6f}" for name in METRICS)] for id, row in rows.items())
    write_whole(out / "cases.csv", text.getvalue().encode())
    found = {name: statistic([row[name] for row in rows.values()]) for name in METRICS}
    data_range: Any = "the files' whole range, as 0 to 1" if window is None else [float(end) for end in window]
    interval = {"of": "mean", "kind": "percentile bootstrap over cases, widened for small samples"}
    summary = {
        "data_range": data_range,
        "cases": len(rows),
        "without_prediction": missing,
        "interval": {**interval, "level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "results": {name: nullable(asdict(one)) for name, one in found.items()},
    }
    write_json(out / "summary.json", summary)
    table = [["", "mean", "95 % interval", "sd", "median", "n used"]]
    table += [[heading, *statistic_cells(found[name], digits)] for name, (heading, digits) in METRICS.items()]
    left_out = [f"no prediction (left out): {missing}"] if missing else []
    return "\n".join([f"data range: {data_range}", *aligned(table), *left_out])
