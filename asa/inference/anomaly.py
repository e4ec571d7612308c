"""Anomaly maps of scans, as they are or in standard deviations above healthy scans, and their table.

Three networks map anomalies: of learnt labels, of asymmetry, and of what a network predicts of hidden parts.
Letters: image `C D H W`, L patches.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from asa.data.io.nifti import Volume, identity_of
from asa.data.store import Store
from asa.errors import counted
from asa.inference.label_maps import write_map
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.inference.segmentation import Segmenter, sliding_window
from asa.methods.pretrain import denormalised
from asa.methods.sa_swin import unit_noise
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.models.sa_swin import MAP_LEVEL, SASwin
from asa.ops.patches import patchify, select_tokens, unpatchify
from asa.ops.symmetry import flip
from asa.settings import PredictSettings
from asa.training.checkpoint import read_model
from asa.training.device import autocast, pick_device, pick_precision

TABLE, ASYMMETRY_TABLE = "anomaly.csv", "asymmetry.csv"
COLUMNS = ("id", "score", "mean", "top", "peak", "x", "y", "z")  # of the table
TOP = 0.01  # fraction of the head's voxels whose mean is the column `top`


@dataclass(frozen=True)
class AnomalyMap:
    """How unusual each voxel of a prepared scan is."""

    map: Tensor  # (D, H, W), 0 outside the head
    inside: Tensor  # bool (D, H, W): the head, of a map that compares the sides with its mirror image
    score: float = math.nan  # of the whole scan; NaN if there is none beside the map

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

    Of the scans only sums are kept; a ValueError for fewer than two. Maps are stretched to one size `(D, H, W)`: of
    scans that were cropped to the brain these are brains of one size.
    """

    def __init__(self, scans: Iterable[AnomalyMap], size: Sequence[int]) -> None:
        self.size = tuple(size)
        self.scans, self.sums = self._sums(scans)
        self._check(self.scans)

    def standardise(self, scan: AnomalyMap, own: Iterable[AnomalyMap] = ()) -> AnomalyMap:
        """The map in standard deviations above the healthy mean; 0 below the mean and outside every healthy head.

        `own` are those of the healthy scans that are of the scan's subject, which is not compared with itself; a
        ValueError for fewer than two of others.
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
    """A network of asa-pretrain (a run, a checkpoint, or asa://NAME), and the preprocessor of its new scans.

    Raises as `read_model` and `ScanPreprocessor`; `strip` and `plugins` are as of `Segmenter`. `channels` of the scans
    say their modality where the training scans are of several.
    """
    model, description = read_model(checkpoint, plugins=plugins)
    return model, ScanPreprocessor(str(checkpoint), description["data"], strip, channels=channels)


class AnomalyScorer(ABC):
    """A network that maps anomalies in new scans. A subclass says how: `compute`."""

    table: ClassVar[str] = TABLE

    def __init__(self, preprocessor: ScanPreprocessor) -> None:
        self.preprocessor = preprocessor
        self.healthy: HealthyReference | None = None

    @abstractmethod
    def compute(self, image: Tensor) -> AnomalyMap:
        """The map of a prepared volume `(C, D, H, W)` float32, on the CPU."""

    def compare_with(self, healthy: str | Path) -> None:
        """Give maps in standard deviations above the mean of healthy scans, of a store, from now on.

        A scan of the store is compared with those of other subjects. A ValueError for a store that was prepared in
        another way than the training scans, fewer than two scans, or several sizes that are not boxes around brains.
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

        `like` is the source scan: healthy scans of the subject with these voxels are left out. A ValueError as of
        `HealthyReference.standardise`, for a size that cannot be compared, or a result that is not finite.
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
        """Score a prepared scan `(C, D, H, W)`, and write its map, float32, on the grid of the source scan to `out`.

        Its row of the table has numbers with six significant digits, and no score where there is none. `peak` is the
        highest value, at x, y, z in mm of the scan's space. Where sides are compared it may be at the mirror image.
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


class AsymmetryScorer(AnomalyScorer):
    """A pretrained SA-Swin that scores the asymmetry of new scans without further training; a ValueError for another.

    `score` is (1 - cosine similarity) / 2 of the two sides in the symmetry head. The whole volume is one window.
    """

    table = ASYMMETRY_TABLE
    level = MAP_LEVEL  # of the features that are compared, as in `asa.models.sa_swin.SASwin.asymmetry`

    def __init__(self, model: nn.Module, preprocessor: ScanPreprocessor, settings: PredictSettings) -> None:
        super().__init__(preprocessor)
        if not hasattr(model, "asymmetry"):
            raise ValueError(
                f"{preprocessor.path}: no SA-Swin, whose maps are of asymmetry: leave map= out, or fine-tune it"
            )
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.model: Any = model.to(self.device)
        preprocessor.warn_unless_centred()

    def compute(self, image: Tensor) -> AnomalyMap:
        with torch.inference_mode(), autocast(self.device, self.precision):
            score, difference = self.model.asymmetry(image[None].to(self.device, torch.float32), level=self.level)
        for found in (score, difference):
            check_finite(found, "the network's output")
        inside = (image != 0).any(dim=0)
        inside = inside | flip(inside)
        return AnomalyMap(difference[0].cpu() * inside, inside, float(score))


# ---- what a network predicts of hidden parts ----

GROUPS = 4  # of patches or boxes, one of which is hidden at a time
FEWEST = 20  # part of a window's patches, one in so many, that has tissue; with less of it nothing is predicted
BOXES = 8  # along each axis of a window
BLUR = 6.0  # full width of the blur at half its maximum, mm


class PredictedPatches(nn.Module):
    """Each patch of a window as a masked autoencoder predicts it from the patches of the other groups.

    The patches with tissue are dealt into four groups, of which `masked` are masked at a time, 1 or 3. A `normalised`
    model predicts standardised patches, which get the mean and the variance of the patch itself: what is wrong with
    these is not in the error.
    """

    def __init__(self, model: MaskedAutoencoder, *, normalised: bool = False, masked: int = 1) -> None:
        super().__init__()
        self.model, self.encoder = model, model.encoder
        self.normalised, self.masked = normalised, masked

    def forward(self, windows: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> the same shape; air stays as it is."""
        return torch.cat([self._predicted(window) for window in windows.split(1)])

    def _predicted(self, window: Tensor) -> Tensor:
        patches = patchify(window, self.encoder.patch_size)
        tissue = (patches != 0).any(dim=2)  # (1, L)
        if (count := int(tissue.sum())) < max(GROUPS, patches.shape[1] / FEWEST):
            return window
        group = torch.full_like(tissue, -1, dtype=torch.long)
        group[tissue] = _dealt(count).to(group.device)
        total, times = torch.zeros_like(patches), torch.zeros_like(patches[..., :1])
        for chosen in range(GROUPS):
            mask = tissue & ((group == chosen) if self.masked == 1 else (group != chosen))
            found = self.model(window, visible=select_tokens(tissue & ~mask), decoded=select_tokens(mask))[0]
            total[mask] += denormalised(found, patches[mask]).to(total) if self.normalised else found.to(total)
            times[mask] += 1
        predicted = torch.where(times > 0, total / times.clamp(min=1), patches)
        return unpatchify(predicted, self.encoder.grid, self.encoder.patch_size)


class InpaintedBoxes(nn.Module):
    """Each voxel of a window as a SA-Swin inpaints it, in boxes of noise, from the others and the mirror image."""

    mirrored = True

    def __init__(self, model: SASwin) -> None:
        super().__init__()
        self.model, self.encoder = model, model.encoder

    def forward(self, windows: Tensor, mirrored: Tensor) -> Tensor:
        """`(B, C, D, H, W)` with the mirror images -> the same shape."""
        group = _dealt(BOXES**3).view(1, 1, *(BOXES,) * 3).float()
        group = interpolate(group, windows.shape[2:]).to(windows.device)  # of the nearest box
        noise = unit_noise(windows.shape[1:], torch.Generator().manual_seed(0)).to(windows)
        found = windows
        for chosen in range(GROUPS):
            hidden = group == chosen
            found = found.where(~hidden, self.model(windows.where(~hidden, noise), mirrored).volume.to(found))
        return found


def _dealt(count: int) -> Tensor:
    """The group of each of so many patches or boxes, of equal size but for one, in a drawn order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)) % GROUPS


class PredictionErrorScorer(AnomalyScorer):
    """How far a scan is from what a pretrained network predicts of it: `PredictedPatches`, `InpaintedBoxes`.

    The map is the absolute error, the mean over channels, blurred by 6 mm for voxels of the mean size in training.
    Model and preprocessor are those of `read_pretrained`; a ValueError for another method than asa, mae and sa_swin.
    """

    def __init__(self, model: nn.Module, preprocessor: ScanPreprocessor, settings: PredictSettings) -> None:
        super().__init__(preprocessor)
        if isinstance(model, MaskedAutoencoder):
            network: nn.Module = PredictedPatches(model, normalised=preprocessor.data.get("normalised", False))
        elif isinstance(model, SASwin):
            network = InpaintedBoxes(model)
        else:
            raise ValueError(
                f"{preprocessor.path}: its network predicts no hidden parts, as those of method=asa, mae and sa_swin "
                "do: fine-tune it, or pretrain one of these"
            )
        self.network, self.settings = network.to(pick_device(settings.device)), settings
        spacing = preprocessor.data.get("spacing", np.ones((2, 3)))  # an older checkpoint has none
        self.blur = BLUR / 2.355 / np.mean(spacing, axis=0)  # SD in voxels

    def compute(self, image: Tensor) -> AnomalyMap:
        predicted = sliding_window(self.network, image, self.settings).cpu()
        check_finite(predicted, "the network's output")
        inside = (image != 0).any(dim=0)
        error = ndimage.gaussian_filter((predicted - image).abs().mean(dim=0).numpy(), self.blur)
        return AnomalyMap(torch.from_numpy(error) * inside, inside)
