"""Maps of what is unusual in a scan, as they are or in standard deviations above healthy scans, and their table.

Letters: image `C D H W`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from asa.data.io.nifti import Volume, identity_of
from asa.data.store import Store
from asa.errors import counted
from asa.inference.preprocessing import ScanPreprocessor
from asa.inference.segmentation import Segmenter
from asa.inference.uncertainty import write_map

TABLE = "anomaly.csv"
TOP = 0.01  # fraction of the head's voxels whose mean is the column `top`


@dataclass(frozen=True)
class AnomalyMap:
    """How unusual each voxel of a prepared scan is.

    Args:
        map: `(D, H, W)`, 0 outside the head.
        inside: bool `(D, H, W)`: the head, of a map that compares the sides with its mirror image.
        score: of the whole scan; NaN if there is none beside the map.
    """

    map: Tensor
    inside: Tensor
    score: float = math.nan

    @property
    def mean(self) -> float:
        """Mean of the map inside the head."""
        return float(self.map[self.inside].mean()) if self.inside.any() else 0.0

    @property
    def top(self) -> float:
        """Mean of the highest hundredth of the map inside the head."""
        values = self.map[self.inside]
        return float(values.topk(math.ceil(TOP * len(values))).values.mean()) if len(values) else 0.0


@dataclass(frozen=True)
class AnomalyRow:
    """A scan's row in the table, see `AnomalyMap`; `peak` is the highest value, at x, y, z in mm of the scan's space.

    Of a map that compares the sides the peak may as well be at the mirror image.
    """

    id: str
    score: float
    mean: float
    top: float
    peak: float
    x: float
    y: float
    z: float

    @property
    def cells(self) -> dict[str, str]:
        """The cells by column, numbers with six significant digits; without a score it has no column."""
        known = {name: value for name, value in vars(self).items() if value == value}
        return {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in known.items()}


class HealthyReference:
    """Voxelwise mean and standard deviation of the maps of healthy scans, whose brains are unusual somewhere, too.

    Scans of other sizes are stretched to a common one, the largest along each axis. Of scans that were cropped to the
    brain these are brains of one size.

    Raises:
        ValueError: fewer than two scans.
    """

    def __init__(self, scans: Sequence[AnomalyMap]) -> None:
        self.scans = self._enough(len(scans))
        self.size = torch.tensor([scan.map.shape for scan in scans]).amax(dim=0).tolist()
        self.sums = self._sums(scans)

    def standardise(self, scan: AnomalyMap, own: Sequence[AnomalyMap] = ()) -> AnomalyMap:
        """The map in standard deviations above the healthy mean; 0 below the mean and outside every healthy head.

        `own` are those of the healthy scans that are of the scan's subject, which is not compared with itself.

        Raises:
            ValueError: fewer than two healthy scans of other subjects.
        """
        self._enough(self.scans - len(own))
        count, total, squares = self.sums - self._sums(own) if own else self.sums
        covered, mean = count > 0, total / count.clamp(min=1)
        sd = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()  # rounding may leave it below 0
        # Few scans cover the rim of the head, where the standard deviation may be small by chance.
        above = ((stretched(scan.map, self.size) - mean) / (sd + sd[covered].median())).clamp(min=0) * covered
        return replace(scan, map=stretched(above, scan.map.shape).float() * scan.inside)

    def _sums(self, scans: Sequence[AnomalyMap]) -> Tensor:
        """Per voxel the number of heads that reach it, the sum of their maps and that of squares: `(3, D, H, W)`."""
        sums = torch.zeros(3, *self.size, dtype=torch.float64)
        for scan in scans:
            inside = stretched(scan.inside.double(), self.size) >= 0.5
            values = stretched(scan.map.double(), self.size) * inside
            sums += torch.stack([inside.double(), values, values.square()])
        return sums

    @staticmethod
    def _enough(scans: int) -> int:
        if scans < 2:
            raise ValueError(f"healthy: {counted(scans, 'scan')} of other subjects: give two or more, better dozens")
        return scans


def stretched(map: Tensor, size: Sequence[int]) -> Tensor:
    """A map `(D, H, W)` resampled to another size, trilinearly; itself if it has that size."""
    if tuple(map.shape) == tuple(size):
        return map
    return interpolate(map[None, None], tuple(size), mode="trilinear")[0, 0]


class AnomalyScorer(ABC):
    """A network that maps what is unusual in new scans. A subclass says how: `compute`.

    Args:
        preprocessor: of its scans.
        healthy: store of healthy scans, prepared as the training scans: maps are then in standard deviations above
            their mean. A scan of the store is compared with those of other subjects.

    Raises:
        ValueError: healthy scans that were prepared in another way, or fewer than two.
    """

    table: ClassVar[str] = TABLE

    def __init__(self, preprocessor: ScanPreprocessor, healthy: str | Path | None = None) -> None:
        self.preprocessor = preprocessor
        self.healthy: HealthyReference | None = None
        if healthy is not None:
            self.store = store = Store(healthy)
            self.preprocessor.check_store(store, "prepare healthy scans as they were")
            self.known = [(one["id"], one["subject"], set(one["identity"].values())) for one in store.records]
            ids = tqdm([id for id, *_ in self.known], desc="healthy", unit="scan")
            self.healthy = HealthyReference([self._of_stored(id) for id in ids])

    @abstractmethod
    def compute(self, image: Tensor) -> AnomalyMap:
        """The map of a prepared volume `(C, D, H, W)` float32, on the CPU."""

    def measure(self, image: Tensor, like: Volume | None = None) -> AnomalyMap:
        """The map of a prepared volume `(C, D, H, W)`, above that of healthy scans where these are given.

        `like` is the source scan: healthy scans of the subject with these voxels are left out.

        Raises:
            ValueError: of `HealthyReference.standardise`, or a result that is not finite.
        """
        scan = self.compute(image)
        if self.healthy is None:
            return scan
        digest = None if like is None else identity_of(like)
        subjects = {subject for _, subject, digests in self.known if digest in digests}
        return self.healthy.standardise(scan, [self._of_stored(id) for id, one, _ in self.known if one in subjects])

    def _of_stored(self, id: str) -> AnomalyMap:
        return self.compute(torch.from_numpy(np.array(self.store.image(id), dtype=np.float32)))

    def score_prepared(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path) -> AnomalyRow:
        """Score a prepared scan `(C, D, H, W)`, and write its map, float32, on the grid of the source scan.

        `out` is the `.nii.gz` to write, in a folder that exists.
        """
        scan = self.measure(torch.from_numpy(np.array(image, dtype=np.float32)), like)
        write_map(out, scan.map, chain, like)
        d, h, w = (int(index) for index in np.unravel_index(int(scan.map.argmax()), scan.map.shape))
        x, y, z, _ = np.array(chain["stored_affine"]) @ (w, h, d, 1)
        peak = float(scan.map.max())
        return AnomalyRow(id, scan.score, scan.mean, scan.top, peak, float(x), float(y), float(z))


class LabelScorer(AnomalyScorer):
    """Of segmentation networks the probability of any label, as of lesions that they have learnt."""

    def __init__(self, segmenter: Segmenter, healthy: str | Path | None = None) -> None:
        self.segmenter = segmenter
        super().__init__(segmenter.preprocessor, healthy)

    def compute(self, image: Tensor) -> AnomalyMap:
        found, inside = self.segmenter.probabilities(image), (image != 0).any(dim=0)
        labelled = found.amax(dim=0) if self.segmenter.outputs.regions else 1 - found[0]
        return AnomalyMap(labelled * inside, inside)
