"""Zero-shot asymmetry: how unlike its mirror image a scan is to a pretrained SA-Swin, and where.

Letters: image `C D H W`.
"""

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa.data.case import to_native
from asa.data.files import write_whole
from asa.data.volume import Volume, write_image
from asa.engine.checkpoint import read_model
from asa.engine.device import autocast, pick_device, pick_precision
from asa.engine.intake import Intake
from asa.engine.predict import PredictSettings
from asa.models.sa_swin import SASwin

TABLE = "asymmetry.csv"


@dataclass(frozen=True)
class AsymmetryRow:
    """What the table says of a scan.

    Args:
        id: of the scan.
        score: (1 - cos) / 2 of the two sides as the symmetry head sees them, from 0.
        mean, peak: of the map inside the head.
        x, y, z: place of the peak, or of its mirror, in mm of the scan's own space.
    """

    id: str
    score: float
    mean: float
    peak: float
    x: float
    y: float
    z: float


class AsymmetryScorer:
    """A pretrained SA-Swin that scores scans it was not trained for.

    Args:
        checkpoint: run folder, checkpoint folder or file of a pretraining with method=sa_swin.
        settings: device and precision; the whole volume is one window.
        strip: how raw scans are skull-stripped, as in `PrepareSettings`; None: as the training scans were.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or not of a SA-Swin.
    """

    def __init__(self, checkpoint: str | Path, settings: PredictSettings, *, strip: str | None = None) -> None:
        model, description = read_model(checkpoint)
        if not isinstance(model, SASwin):
            raise ValueError(f"{checkpoint}: not a run of asa-pretrain method=sa_swin")
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.model = model.to(self.device)
        self.intake = Intake(str(checkpoint), description["data"], strip)
        if not (self.intake.settings.midway or self.intake.settings.register):
            warnings.warn(
                f"{checkpoint}: its scans were prepared without prepare.midway=true: where the mid-sagittal plane is "
                "not the middle of the volume, asymmetry is a matter of position",
                stacklevel=2,
            )

    def compare(self, image: Tensor) -> tuple[float, Tensor]:
        """Score and map `(D, H, W)` of a prepared volume `(C, D, H, W)`; the map is 0 outside of the head."""
        with torch.inference_mode(), autocast(self.device, self.precision):
            score, found = self.model.asymmetry(image[None].to(self.device, torch.float32))
        inside = (image != 0).any(dim=0)
        return float(score), found[0].cpu() * (inside | inside.flip(-1))

    def score(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path) -> AsymmetryRow:
        """Score a prepared scan and write its map on the scan's own grid.

        Args:
            id: of the scan.
            image: `(C, D, H, W)`.
            chain: how it was prepared.
            like: the scan, for its geometry.
            out: the `.nii.gz` to write, float32.
        """
        volume = torch.from_numpy(np.array(image, dtype=np.float32))
        score, found = self.compare(volume)
        write_image(out, to_native(found[None].numpy(), chain, order=1)[0], like.affine)
        d, h, w = (int(place) for place in np.unravel_index(int(found.argmax()), found.shape))
        x, y, z, _ = np.array(chain["stored_affine"]) @ (w, h, d, 1)
        inside = found[found > 0]
        mean = float(inside.mean()) if len(inside) else 0.0
        return AsymmetryRow(id, score, mean, float(found.max()), float(x), float(y), float(z))

    def score_file(self, id: str, images: Mapping[str, str | Path | None], out: Path) -> AsymmetryRow:
        """`score` of a raw scan, prepared as the training scans were.

        Raises:
            FileNotFoundError, ValueError: see `Intake.prepared`.
        """
        case, like = self.intake.prepared(images)
        return self.score(id, case.image, case.chain, like, out)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass rows as CSV, floats with six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(vars(rows[0]))
    for row in rows:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in vars(row).values()])
    write_whole(path, text.getvalue().encode())
