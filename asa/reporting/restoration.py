"""The page on an evaluation of restored images: that of label maps, with pictures of the worst and the middle image.

Pictures are `(C, H, W)` in [0, 1], drawn ones RGB uint8 `(height, width, 3)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from asa.data.io.files import write_whole
from asa.data.io.images2d import read_picture
from asa.evaluation.image_quality import Quality
from asa.evaluation.measures import range_text
from asa.methods.restore import psnr
from asa.reporting.evaluation import (
    PANEL_WIDTH,
    SHOWN,
    data_uri,
    page_values,
    render,
    require_extra,
    scores,
    titled,
    value_cells,
)
from asa.reporting.figures import GAP, encode_png, heat

BRIGHTEST = 99.5  # percentile of the drawn errors that the scale ends at


@dataclass(frozen=True)
class PictureFiles:
    """Where the images of one case are; without the degraded one it is None."""

    case_id: str
    prediction: Path
    truth: Path
    degraded: Path | None = None


def write_quality_report(path: Path, quality: Quality, cases: Sequence[PictureFiles]) -> None:
    """Write the page: one HTML file without links or scripts.

    Args:
        path: the file, made whole or not at all.
        quality: what was found.
        cases: files of every case; those of the cases that are shown are read again.

    Raises:
        ImportError: the `report` extra is not installed.
        ValueError: a degraded image does not fit.
    """
    require_extra(path)
    files = {case.case_id: case for case in cases}
    chosen = [(title, read_case(files[id], quality.window)) for title, id in titled(quality, _chosen(quality))]
    top = error_scale([pictures for _, pictures in chosen])
    width = 1.0 if quality.window is None else quality.window[1] - quality.window[0]
    page = render(
        "restoration.html.j2",
        **page_values(quality),
        notes=[],
        data_range=range_text(quality.window),
        scale=f"{top * width:.2g}",
        unit="of the range" if quality.window is None else "in the images' units",
        shown=[_case_figure(title, pictures, top) for title, pictures in chosen],
        cases=[{"id": row.case_id, "values": value_cells(row, quality)} for row in quality.rows],
    )
    write_whole(path, page.encode())


def _chosen(quality: Quality) -> list[tuple[str, int, str]]:
    """Title, rank and id of the cases to show: the worst ones, and the one in the middle if it is none of them."""
    order = list(scores(quality))
    ranked = [("Worst case", k, id) for k, id in enumerate(order[:SHOWN], start=1)]
    middle = order[len(order) // 2]
    return ranked + [("Median case", 1, middle)] * (middle not in order[:SHOWN])


def read_case(files: PictureFiles, window: Sequence[float] | None) -> dict[str, np.ndarray]:
    """A case's pictures by their title; the degraded one upscaled to the others' size, bilinearly.

    Raises:
        ValueError: a degraded image with other channels.
    """
    truth, output = read_picture(files.truth, window), read_picture(files.prediction)
    pictures = {"Output": output, "Truth": truth}
    if files.degraded is None:
        return pictures
    degraded = read_picture(files.degraded, window)
    if len(degraded) != len(truth):
        raise ValueError(f"{files.degraded}: has {len(degraded)} channels, its clean image {len(truth)}: give its own")
    plain = F.interpolate(torch.from_numpy(degraded)[None], truth.shape[1:], mode="bilinear")[0].numpy()
    return {"Input": plain, **pictures}


def error_map(pictures: dict[str, np.ndarray]) -> np.ndarray:
    """Absolute error of the output, the mean over channels: `(H, W)`."""
    return np.abs(pictures["Output"] - pictures["Truth"]).mean(axis=0)


def error_scale(cases: Sequence[dict[str, np.ndarray]]) -> float:
    """The error that is drawn white in all cases of a page: where nearly all errors of the worst of them lie below."""
    return max((float(np.percentile(error_map(pictures), BRIGHTEST)) for pictures in cases), default=0.0) or 1.0


def picture_panel(pictures: dict[str, np.ndarray], top: float) -> np.ndarray:
    """A case's pictures and the error of the output side by side, as wide as the page: RGB `(height, width, 3)`.

    Args:
        pictures: title -> picture, "Output" and "Truth" among them.
        top: the error that is drawn white.
    """
    drawn = [*map(_gray, pictures.values()), heat(error_map(pictures), (0.0, top))]
    width = (PANEL_WIDTH - GAP * (len(drawn) - 1)) // len(drawn)
    tiles = [_fitted(picture, width) for picture in drawn]
    gap = np.zeros((len(tiles[0]), GAP, 3), dtype=np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], axis=1)


def _case_figure(title: str, pictures: dict[str, np.ndarray], top: float) -> dict[str, Any]:
    """Everything the page says about one case: its panel and what it shows."""
    panel, before = picture_panel(pictures, top), None
    if "Input" in pictures:
        error = torch.from_numpy(pictures["Input"] - pictures["Truth"])[None]
        before = f"{float(psnr(error)):.2f}"
    return {
        "title": title,
        "columns": [*pictures, "Error"],
        "panel": data_uri(encode_png(panel)),
        "width": panel.shape[1],
        "before": before,
    }


def _gray(picture: np.ndarray) -> np.ndarray:
    colour = np.broadcast_to(picture, (3, *picture.shape[1:]))
    return np.rint(255 * colour.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)


def _fitted(picture: np.ndarray, width: int) -> np.ndarray:
    """A drawn picture as wide as this or a little less: whole pixels repeated, or averaged where it is wider."""
    times = width // picture.shape[1]
    if times:
        return picture.repeat(times, axis=0).repeat(times, axis=1)
    size = (max(round(picture.shape[0] * width / picture.shape[1]), 1), width)
    small = F.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), size, mode="area")[0]
    return small.round().byte().permute(1, 2, 0).numpy()
