"""Zero-shot asymmetry: how much, and where, a pretrained SA-Swin finds a scan to differ from its mirror image.

Letters: image `C D H W`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa.data.io.nifti import Volume, identity_of
from asa.data.store import Store
from asa.errors import counted
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.inference.segmentation import PredictSettings
from asa.inference.uncertainty import write_map
from asa.models.sa_swin import MAP_LEVEL
from asa.ops.symmetry import flip
from asa.training.checkpoint import read_model
from asa.training.device import autocast, pick_device, pick_precision

TABLE = "asymmetry.csv"
TOP = 0.01  # fraction of the head's voxels whose mean is the column `top`
ONE_SIZE = (
    "pretrain a network on a store that asa-prepare made with prepare.crop=SIZE, and prepare healthy scans likewise"
)


@dataclass(frozen=True)
class AsymmetryRow:
    """A scan's row in the table: see `Asymmetry`.

    `peak` is the highest value of the map, at x, y, z in mm of the scan's own space, or at its mirror image.
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
class Asymmetry:
    """Asymmetry of a prepared scan.

    Args:
        score: (1 - cosine similarity) / 2 of the two sides in the symmetry head.
        map: `(D, H, W)`, 0 outside the head.
        inside: bool `(D, H, W)`: the head and its mirror image.
    """

    score: float
    map: Tensor
    inside: Tensor

    @property
    def mean(self) -> float:
        """Mean of the map inside the head."""
        return float(self.map[self.inside].mean()) if self.inside.any() else 0.0

    @property
    def top(self) -> float:
        """Mean of the highest hundredth of the map inside the head."""
        values = self.map[self.inside]
        return float(values.topk(math.ceil(TOP * len(values))).values.mean()) if len(values) else 0.0


class HealthyReference:
    """Voxelwise mean and standard deviation of the asymmetry maps of healthy scans, which are not symmetric either.

    Raises:
        ValueError: fewer than two scans, or scans of different sizes.
    """

    def __init__(self, scans: Sequence[Asymmetry]) -> None:
        self.scans = self._enough(len(scans))
        sizes = {tuple(scan.map.shape) for scan in scans}
        if len(sizes) > 1:
            raise ValueError(f"healthy: its scans are compared voxel by voxel and have {len(sizes)} sizes: {ONE_SIZE}")
        (self.size,) = sizes
        self.sums = _sums(scans)

    def standardise(self, scan: Asymmetry, own: Sequence[Asymmetry] = ()) -> Asymmetry:
        """The map in standard deviations above the healthy mean; 0 below the mean and outside every healthy head.

        `own` are those of the healthy scans that are of the scan's subject, which is not compared with itself.

        Raises:
            ValueError: a scan of another size, or fewer than two healthy scans of other subjects.
        """
        if tuple(scan.map.shape) != self.size:
            size, reference = ("x".join(map(str, shape)) for shape in (scan.map.shape, self.size))
            raise ValueError(f"a prepared scan of {size} voxels, and healthy scans of {reference}: {ONE_SIZE}")
        self._enough(self.scans - len(own))
        count, total, squares = self.sums - _sums(own) if own else self.sums
        covered, mean = count > 0, total / count.clamp(min=1)
        sd = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()  # rounding may leave it below 0
        # Few scans cover the rim of the head, where the standard deviation may be small by chance.
        above = ((scan.map - mean) / (sd + sd[covered].median())).clamp(min=0)
        return replace(scan, map=above.float() * (covered & scan.inside))

    @staticmethod
    def _enough(scans: int) -> int:
        if scans < 2:
            raise ValueError(f"healthy: {counted(scans, 'scan')} of other subjects: give two or more, better dozens")
        return scans


def _sums(scans: Sequence[Asymmetry]) -> Tensor:
    """Per voxel the number of heads that reach it, and the sums of their maps and of the squares: `(3, D, H, W)`."""
    sums = torch.zeros(3, *scans[0].map.shape, dtype=torch.float64)
    for scan in scans:
        values = scan.map.double() * scan.inside
        sums += torch.stack([scan.inside.double(), values, values.square()])
    return sums


class AsymmetryScorer:
    """A pretrained SA-Swin that scores the asymmetry of new scans without further training.

    Args:
        checkpoint: run folder, checkpoint folder or file of a pretraining with method=sa_swin.
        settings: device and precision; the whole volume is one window.
        strip, plugins: as for `Segmenter`.
        channels: of the scans, which say their modality where the training scans are of several.
        healthy: store of healthy scans, prepared as the training scans: maps are then in standard deviations above
            their mean. A scan of the store is compared with those of other subjects.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or not of a SA-Swin; healthy scans that do not match it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        settings: PredictSettings,
        *,
        strip: str | None = None,
        healthy: str | Path | None = None,
        plugins: Sequence[str] = (),
        channels: Collection[str] | None = None,
    ) -> None:
        model, description = read_model(checkpoint, plugins=plugins)
        if not hasattr(model, "asymmetry"):
            raise ValueError(f"{checkpoint}: neither a run of asa-finetune nor one of asa-pretrain method=sa_swin")
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.model: Any = model.to(self.device)
        self.preprocessor = ScanPreprocessor(str(checkpoint), description["data"], strip, channels=channels)
        self.preprocessor.warn_unless_centred()
        self.healthy: HealthyReference | None = None
        if healthy is not None:
            self.store = store = Store(healthy)
            self.preprocessor.check_store(store, "prepare healthy scans as they were")
            self.known = [(one["id"], one["subject"], set(one["identity"].values())) for one in store.records]
            self.healthy = HealthyReference([self._measure_stored(id) for id, *_ in self.known])

    def measure(self, image: Tensor, level: int = MAP_LEVEL, like: Volume | None = None) -> Asymmetry:
        """Asymmetry of a prepared volume `(C, D, H, W)`, above that of healthy scans where these are given.

        Args:
            level: as in `asa.models.sa_swin.SASwin.asymmetry`.
            like: the source scan: healthy scans of the subject with these voxels are left out.

        Raises:
            ValueError: of `HealthyReference.standardise`, or a result that is not finite.
        """
        scan = self._measure(image, level)
        if self.healthy is None:
            return scan
        digest = None if like is None else identity_of(like)
        subjects = {subject for _, subject, digests in self.known if digest in digests}
        own = [self._measure_stored(id) for id, subject, _ in self.known if subject in subjects]
        return self.healthy.standardise(scan, own)

    def _measure_stored(self, id: str) -> Asymmetry:
        return self._measure(torch.from_numpy(np.array(self.store.image(id), dtype=np.float32)))

    def _measure(self, image: Tensor, level: int = MAP_LEVEL) -> Asymmetry:
        with torch.inference_mode(), autocast(self.device, self.precision):
            score, difference = self.model.asymmetry(image[None].to(self.device, torch.float32), level=level)
        check_finite(score, "the network's output")
        check_finite(difference, "the network's output")
        inside = (image != 0).any(dim=0)
        inside = inside | flip(inside)
        return Asymmetry(float(score), difference[0].cpu() * inside, inside)

    def score_prepared(
        self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path
    ) -> AsymmetryRow:
        """Score a prepared scan `(C, D, H, W)`, and write its map, float32, on the grid of the source scan.

        `out` is the `.nii.gz` to write, in a folder that exists.
        """
        scan = self.measure(torch.from_numpy(np.array(image, dtype=np.float32)), like=like)
        write_map(out, scan.map, chain, like)
        d, h, w = (int(index) for index in np.unravel_index(int(scan.map.argmax()), scan.map.shape))
        x, y, z, _ = np.array(chain["stored_affine"]) @ (w, h, d, 1)
        peak = float(scan.map.max())
        return AsymmetryRow(id, scan.score, scan.mean, scan.top, peak, float(x), float(y), float(z))


def cells_of(row: AsymmetryRow) -> dict[str, str]:
    """The cells of a row by column, numbers with six significant digits."""
    return {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in vars(row).items()}
