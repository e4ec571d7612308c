"""Zero-shot asymmetry: how unlike its mirror image a scan is to a pretrained SA-Swin, and where.

Letters: image `C D H W`.
"""

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa.data.io.files import write_whole
from asa.data.io.nifti import Volume, write_image
from asa.data.preprocessing.pipeline import to_native
from asa.data.store import Store
from asa.inference.preprocessing import Intake
from asa.inference.segmentation import PredictSettings
from asa.models.sa_swin import SASwin
from asa.ops.symmetry import flip
from asa.training.checkpoint import read_model
from asa.training.device import autocast, pick_device, pick_precision

TABLE = "asymmetry.csv"
TOP = 0.01  # share of the head whose mean is the column `top`


@dataclass(frozen=True)
class AsymmetryRow:
    """What the table says of a scan.

    Args:
        id: of the scan.
        score: (1 - cos) / 2 of the two sides as the symmetry head sees them, from 0.
        mean: of the map inside the head.
        top: mean of the highest hundredth of it there.
        peak: its highest value there.
        x, y, z: place of the peak, or of its mirror, in mm of the scan's own space.
    """

    id: str
    score: float
    mean: float
    top: float
    peak: float
    x: float
    y: float
    z: float


@dataclass(frozen=True)
class Found:
    """What was found in a prepared scan.

    Args:
        score: (1 - cos) / 2 of the two sides as the symmetry head sees them.
        map: `(D, H, W)`, 0 outside of the head.
        inside: bool `(D, H, W)`: the head and its mirror image.
    """

    score: float
    map: Tensor
    inside: Tensor

    @property
    def mean(self) -> float:
        """Of the map inside the head."""
        return float(self.map[self.inside].mean()) if self.inside.any() else 0.0

    @property
    def top(self) -> float:
        """Mean of the highest hundredth of the map inside the head."""
        values = self.map[self.inside]
        return float(values.topk(math.ceil(TOP * len(values))).values.mean()) if len(values) else 0.0


class HealthyScans:
    """What the asymmetry map shows in healthy scans, place by place: healthy brains are not symmetric.

    Args:
        found: of two healthy scans or more, on one grid.

    Raises:
        ValueError: fewer scans, or of different sizes.
    """

    def __init__(self, found: Sequence[Found]) -> None:
        if len(found) < 2:
            raise ValueError(f"healthy: {len(found)} scans have no spread: give two or more, better dozens")
        sizes = {tuple(one.map.shape) for one in found}
        if len(sizes) > 1:
            raise ValueError(
                f"healthy: places are compared, and its scans have {len(sizes)} sizes: use prepare.crop=SIZE"
            )
        (self.size,) = sizes
        maps, inside = (torch.stack(part) for part in zip(*((one.map, one.inside) for one in found), strict=True))
        count = inside.sum(dim=0)
        self.known = count > 0
        self.mean = (maps * inside).sum(dim=0) / count.clamp(min=1)
        spread = (((maps - self.mean).square() * inside).sum(dim=0) / count.clamp(min=1)).sqrt()
        # Few scans cover the rim, and their spread there is small by chance.
        self.spread = spread + spread[self.known].median()

    def beyond(self, found: Found) -> Found:
        """The map in spreads above the mean of the healthy: 0 where it is not above, or where none of them has a head.

        Raises:
            ValueError: a scan of another size.
        """
        if tuple(found.map.shape) != self.size:
            size, known = ("x".join(map(str, shape)) for shape in (found.map.shape, self.size))
            raise ValueError(f"a prepared scan of {size} voxels, and healthy scans of {known}: use prepare.crop=SIZE")
        above = ((found.map - self.mean) / self.spread).clamp(min=0)
        return replace(found, map=above * (self.known & found.inside))


class AsymmetryScorer:
    """A pretrained SA-Swin that scores scans it was not trained for.

    Args:
        checkpoint: run folder, checkpoint folder or file of a pretraining with method=sa_swin.
        settings: device and precision; the whole volume is one window.
        strip: how raw scans are skull-stripped, as in `PrepareSettings`; None: as the training scans were.
        healthy: store of healthy scans, prepared as the training scans: maps are then in spreads above their mean.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or not of a SA-Swin; healthy scans that do not fit it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        settings: PredictSettings,
        *,
        strip: str | None = None,
        healthy: str | Path | None = None,
    ) -> None:
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

        self.healthy: HealthyScans | None = None
        if healthy is not None:
            store = Store(healthy)
            if store.channels != self.intake.channels or store.settings != self.intake.data["prepare"]:
                raise ValueError(
                    f"{store.path}: prepared in another way than the scans that {checkpoint} was trained on"
                )
            volumes = (np.array(store.image(record["id"]), dtype=np.float32) for record in store.records)
            self.healthy = HealthyScans([self.compare(torch.from_numpy(volume)) for volume in volumes])

    def compare(self, image: Tensor) -> Found:
        """Score and map of a prepared volume `(C, D, H, W)`.

        Raises:
            ValueError: a size other than that of the healthy scans.
        """
        with torch.inference_mode(), autocast(self.device, self.precision):
            score, unlike = self.model.asymmetry(image[None].to(self.device, torch.float32))
        inside = (image != 0).any(dim=0)
        inside = inside | flip(inside)
        found = Found(float(score), unlike[0].cpu() * inside, inside)
        return found if self.healthy is None else self.healthy.beyond(found)

    def score(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path) -> AsymmetryRow:
        """Score a prepared scan and write its map on the scan's own grid.

        Args:
            id: of the scan.
            image: `(C, D, H, W)`.
            chain: how it was prepared.
            like: the scan, for its geometry.
            out: the `.nii.gz` to write, float32.
        """
        found = self.compare(torch.from_numpy(np.array(image, dtype=np.float32)))
        write_image(out, to_native(found.map[None].numpy(), chain, order=1)[0], like.affine)
        d, h, w = (int(place) for place in np.unravel_index(int(found.map.argmax()), found.map.shape))
        x, y, z, _ = np.array(chain["stored_affine"]) @ (w, h, d, 1)
        peak = float(found.map.max())
        return AsymmetryRow(id, found.score, found.mean, found.top, peak, float(x), float(y), float(z))

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
