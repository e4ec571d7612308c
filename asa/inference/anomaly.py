"""Anomaly maps of scans, as they are or in standard deviations above healthy scans, and their table.

Letters: image `C D H W`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from asa.data.io.nifti import Volume, identity_of
from asa.data.store import Store
from asa.errors import counted
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.inference.segmentation import Segmenter
from asa.inference.uncertainty import write_map
from asa.training.checkpoint import read_model

TABLE = "anomaly.csv"
COLUMNS = ("id", "score", "mean", "top", "peak", "x", "y", "z")  # of the table
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


class HealthyReference:
    """Voxelwise mean and standard deviation of the maps of healthy scans, whose brains are unusual somewhere, too.

    Args:
        scans: of which only sums are kept.
        size: `(D, H, W)` to which maps of other sizes are stretched. Of scans that were cropped to the brain these are
            brains of one size.

    Raises:
        ValueError: fewer than two scans.
    """

    def __init__(self, scans: Iterable[AnomalyMap], size: Sequence[int]) -> None:
        self.size = tuple(size)
        self.scans, self.sums = self._sums(scans)
        self._check(self.scans)

    def standardise(self, scan: AnomalyMap, own: Iterable[AnomalyMap] = ()) -> AnomalyMap:
        """The map in standard deviations above the healthy mean; 0 below the mean and outside every healthy head.

        `own` are those of the healthy scans that are of the scan's subject, which is not compared with itself.

        Raises:
            ValueError: fewer than two healthy scans of other subjects.
        """
        scans, sums = self._sums(own)
        self._check(self.scans - scans)
        count, total, squares = self.sums - sums if scans else self.sums
        covered, mean = count > 0, total / count.clamp(min=1)
        sd = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()  # rounding may leave it below 0
        # Few scans cover the rim of the head, where the standard deviation may be small by chance.
        unit = sd + sd[covered].median()
        above = ((stretched(scan.map, self.size) - mean) / unit).clamp(min=0).where(covered & (unit > 0), 0)
        return replace(scan, map=stretched(above, scan.map.shape).float() * scan.inside)

    def _sums(self, scans: Iterable[AnomalyMap]) -> tuple[int, Tensor]:
        """The number of scans; and per voxel that of heads that reach it, and the sums of maps and of their squares."""
        number, sums = 0, torch.zeros(3, *self.size, dtype=torch.float64)
        for scan in scans:
            inside = stretched(scan.inside.double(), self.size) >= 0.5
            values = stretched(scan.map.double(), self.size) * inside
            sums += torch.stack([inside.double(), values, values.square()])
            number += 1
        return number, sums

    @staticmethod
    def _check(scans: int) -> None:
        if scans < 2:
            raise ValueError(f"healthy: {counted(scans, 'scan')} of other subjects: give two or more, better dozens")


def stretched(map: Tensor, size: Sequence[int]) -> Tensor:
    """A map `(D, H, W)` resampled to another size, trilinearly; itself if it has that size."""
    if tuple(map.shape) == tuple(size):
        return map
    return interpolate(map[None, None], tuple(size), mode="trilinear")[0, 0]


def read_pretrained(
    checkpoint: str | Path,
    *,
    strip: str | None = None,
    plugins: Sequence[str] = (),
    channels: Collection[str] | None = None,
) -> tuple[nn.Module, ScanPreprocessor]:
    """A network of asa-pretrain, and the preprocessor of its new scans; raises as both.

    Args:
        checkpoint: run folder, checkpoint folder or file; or the encoder of the package, asa://NAME.
        strip, plugins: as for `Segmenter`.
        channels: of the scans, which say their modality where the training scans are of several.
    """
    model, description = read_model(checkpoint, plugins=plugins)
    return model, ScanPreprocessor(str(checkpoint), description["data"], strip, channels=channels)


class AnomalyScorer(ABC):
    """A network that maps anomalies in new scans. A subclass says how: `compute`.

    Args:
        preprocessor: of its scans.
    """

    table: ClassVar[str] = TABLE

    def __init__(self, preprocessor: ScanPreprocessor) -> None:
        self.preprocessor = preprocessor
        self.healthy: HealthyReference | None = None

    @abstractmethod
    def compute(self, image: Tensor) -> AnomalyMap:
        """The map of a prepared volume `(C, D, H, W)` float32, on the CPU."""

    def compare_with(self, healthy: str | Path) -> None:
        """Give maps in standard deviations above the mean of healthy scans, of a store, from now on.

        A scan of the store is compared with those of other subjects.

        Raises:
            ValueError: a store that was prepared in another way than the training scans, fewer than two scans, or scans
                of several sizes that are not boxes around brains.
        """
        self.store = store = Store(healthy)
        self.preprocessor.check_store(store, "prepare healthy scans as they were")
        self.listed = [(one["id"], one["subject"], set(one["identity"].values())) for one in store.records]
        size = np.array([record["shape"][1:] for record in store.records]).max(axis=0).tolist()
        for record in store.records:
            self.preprocessor.check_stored(record["chain"])
            self._check_size(record["shape"][1:], size)
        ids = tqdm([id for id, *_ in self.listed], desc="healthy", unit="scan")
        self.healthy = HealthyReference((self._of_stored(id) for id in ids), size)

    def _check_size(self, size: Sequence[int], reference: Sequence[int]) -> None:
        """Raise a ValueError for other sizes than that of healthy scans, unless volumes are boxes around brains."""
        settings = self.preprocessor.settings
        if tuple(size) != tuple(reference) and (settings.crop != "foreground" or settings.register):
            own, other = ("x".join(map(str, shape)) for shape in (size, reference))
            raise ValueError(
                f"healthy: scans of {own} and of {other} voxels, which are compared voxel by voxel: train a network on "
                "a store that asa-prepare made with prepare.crop=SIZE, and prepare healthy scans likewise"
            )

    def measure(self, image: Tensor, like: Volume | None = None) -> AnomalyMap:
        """The map of a prepared volume `(C, D, H, W)`, above that of healthy scans where these are given.

        `like` is the source scan: healthy scans of the subject with these voxels are left out.

        Raises:
            ValueError: of `HealthyReference.standardise`, another size than healthy scans where these are not boxes
                around brains, or a result that is not finite.
        """
        scan = self.compute(image)
        if self.healthy is not None:
            self._check_size(tuple(image.shape[1:]), self.healthy.size)
            digest = None if like is None else identity_of(like)
            subjects = {subject for _, subject, digests in self.listed if digest in digests}
            scan = self.healthy.standardise(
                scan, (self._of_stored(id) for id, one, _ in self.listed if one in subjects)
            )
        check_finite(scan.map, "the map")
        return scan

    def _of_stored(self, id: str) -> AnomalyMap:
        return self.compute(torch.from_numpy(np.array(self.store.image(id), dtype=np.float32)))

    def score_prepared(
        self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path
    ) -> dict[str, str]:
        """Score a prepared scan `(C, D, H, W)`, and write its map, float32, on the grid of the source scan.

        `out` is the `.nii.gz` to write, in a folder that exists.

        Returns:
            The scan's row of the table, numbers with six significant digits; without a score it has no such column.
            `peak` is the highest value, at x, y, z in mm of the scan's space. Of a map that compares the sides it may
            as well be at the mirror image.
        """
        scan = self.measure(torch.from_numpy(np.array(image, dtype=np.float32)), like)
        written = write_map(out, scan.map, chain, like)
        at = np.unravel_index(int(written.argmax()), written.shape)
        place = (like.affine @ (*at, 1)).tolist()[:3]
        numbers = zip(COLUMNS[1:], (scan.score, scan.mean, scan.top, float(written[at]), *place), strict=True)
        shown = {name: f"{value:.6g}" for name, value in numbers if name != "score" or not math.isnan(value)}
        return {"id": id, **shown}


class LabelScorer(AnomalyScorer):
    """Of segmentation networks the probability of any label, as of lesions that they have learnt."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__(segmenter.preprocessor)
        self.segmenter = segmenter

    def compute(self, image: Tensor) -> AnomalyMap:
        found, inside = self.segmenter.probabilities(image), (image != 0).any(dim=0)
        labelled = found.amax(dim=0) if self.segmenter.outputs.regions else found[1:].sum(dim=0)
        return AnomalyMap(labelled * inside, inside)
