"""Segmentation of whole volumes, back in the scan's own space.

Letters: image `C D H W`, K classes, or R regions, whose sigmoids stand where the softmax of classes does.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor
from tqdm import tqdm

from asa.data.io.nifti import Volume, write_label
from asa.data.preprocessing.pipeline import to_native
from asa.inference.label_maps import mirrored_classes, mirrored_regions, winning_labels
from asa.inference.preprocessing import Intake
from asa.methods.segment import SegmentationNetwork
from asa.ops.symmetry import flip
from asa.training.checkpoint import read_model
from asa.training.device import autocast, pick_device, pick_precision

# A label name that has a side.
SIDE = re.compile(r"(^|[^a-z])(left|right|lh|rh|l|r)([^a-z]|$)", re.IGNORECASE)


@dataclass
class PredictSettings:
    """How a volume is covered by windows."""

    overlap: float = 0.5
    "share of a window that the next one covers again"
    batch_size: int = 1
    "windows at a time"
    device: str = "auto"
    "auto (a GPU if there is one), cpu, cuda, ..."
    precision: str = "auto"
    "auto, fp32, bf16 or fp16"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"predict.overlap={self.overlap}: a share lies between 0 and below 1")
        if self.batch_size < 1:
            raise ValueError(f"predict.batch_size={self.batch_size}: give 1 or more")
        pick_precision(self.precision, pick_device(self.device))


def sliding_window(
    model: SegmentationNetwork,
    image: Tensor,
    settings: PredictSettings,
    *,
    tick: Callable[[int], Any] | None = None,
) -> Tensor:
    """Class logits of a volume of any size, from overlapping windows with Gaussian weights.

    Where the GPU has no room for the whole volume, the windows are computed there and put together on the CPU.

    Args:
        model: the network; its window is the encoder's volume size.
        image: `(C, D, H, W)`.
        settings: overlap, windows at a time, precision.
        tick: is called with the number of windows that were done.

    Returns:
        `(K, D, H, W)` float32, on the model's device or on the CPU.

    Raises:
        ValueError: the GPU has no room for one batch of windows.
    """
    try:
        return _stitched(model, image, settings, tick, next(model.parameters()).device)
    except torch.OutOfMemoryError:
        pass  # and out of this block, whose traceback holds on to the memory
    warnings.warn("out of GPU memory: windows are put together on the CPU, which is slower", stacklevel=2)
    try:
        return _stitched(model, image, settings, tick, torch.device("cpu"))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has no room for {settings.batch_size} windows of {model.encoder.img_size} voxels: "
            "lower predict.batch_size, or predict.device=cpu"
        ) from error


def _stitched(
    model: SegmentationNetwork,
    image: Tensor,
    settings: PredictSettings,
    tick: Callable[[int], Any] | None,
    place: torch.device,
) -> Tensor:
    """Logits `(K, D, H, W)` of a volume, its windows put together at `place`.

    For a network that looks at the mirror image, this lies beside the volume in further channels: a window of it is the
    box at the mirrored place, flipped.
    """
    device = next(model.parameters()).device
    mirrored = getattr(model, "mirrored", False)  # any network with an encoder's window may be asked
    image = torch.cat([image, flip(image)]) if mirrored else image

    def counted(windows: Tensor) -> Tensor:
        here, *across = windows.chunk(2, dim=1) if mirrored else (windows,)
        logits = model(here, mirrored=across[0]) if mirrored else model(here)
        assert isinstance(logits, Tensor)
        if tick is not None:
            tick(len(windows))
        return logits

    with torch.inference_mode(), autocast(device, pick_precision(settings.precision, device)):
        logits = sliding_window_inference(
            image[None].to(place, torch.float32),
            roi_size=model.encoder.img_size,
            sw_batch_size=settings.batch_size,
            predictor=counted,
            overlap=settings.overlap,
            mode="gaussian",
            sw_device=device,
            device=place,
        )
    assert isinstance(logits, Tensor)
    return logits[0].float()


def count_windows(size: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """Windows of `sliding_window` on a volume of `size` voxels (D, H, W)."""
    count = 1
    for length, edge in zip(size, window, strict=True):
        step = max(int(edge * (1 - overlap)), 1)
        count *= math.ceil(max(length - edge, 0) / step) + 1
    return count


class Segmenter:
    """A trained segmentation network, or several as an ensemble, with what they were trained on.

    The probabilities, of classes or of regions that may lie inside each other, are means over the networks and, with
    `mirror`, over the scan and its mirror image, whose result is mirrored back with the sides of lateral pairs
    exchanged.

    Args:
        checkpoints: run folder, checkpoint folder or file of `asa-finetune`, or several that agree in channels,
            labels and preparation.
        settings: how volumes are covered.
        mirror: average with the mirror image, left and right.
        strip: how raw scans are skull-stripped, as in `PrepareSettings`; None: as the training scans were.
        progress: show a bar of windows.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, one that segments nothing, or whose scans were stripped by a
            command; checkpoints that do not agree; `mirror` and a label or region with a side but no partner.
    """

    def __init__(
        self,
        checkpoints: str | Path | Sequence[str | Path],
        settings: PredictSettings,
        *,
        mirror: bool = False,
        strip: str | None = None,
        progress: bool = False,
    ) -> None:
        paths = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
        if not paths:
            raise ValueError("checkpoint=[]: give at least one")
        self.settings, self.mirror, self.progress = settings, mirror, progress
        self.models: list[SegmentationNetwork] = []
        described = []
        for path in paths:
            model, description = read_model(path)
            if "labels" not in description["data"]:
                raise ValueError(f"{path}: not a segmentation model: give a run of asa-finetune")
            assert isinstance(model, SegmentationNetwork)
            self.models.append(model.to(pick_device(settings.device)))
            described.append(description["data"])
        self.data: dict[str, Any] = described[0]
        for path, other in zip(paths[1:], described[1:], strict=True):
            _check_agreement(str(paths[0]), self.data, str(path), other)
        self.labels: dict[int, str] = {int(value): name for value, name in self.data["labels"].items()}
        self.regions: dict[str, list[int]] = dict(self.data.get("regions", []))
        self.mirrored_channels: list[int] = []
        if mirror:
            self._check_sides()
            pairs = self.data.get("lateral_pairs", [])
            self.mirrored_channels = (
                mirrored_regions(self.regions, self.labels, pairs)
                if self.regions
                else mirrored_classes(self.labels, pairs)
            )
        self.intake = Intake(str(paths[0]), self.data, strip)

    def segment_file(
        self, images: Mapping[str, str | Path | None], out: Path, *, probabilities: Path | None = None
    ) -> None:
        """Segment a raw scan as `asa-prepare` would have brought it in, and write the label map in its own space.

        Args:
            images: file of each channel.
            out: the `.nii.gz` to write.
            probabilities: folder for the probabilities of classes or regions; None writes none.

        Raises:
            FileNotFoundError, ValueError: unreadable files, channels that are missing or that the network does not
                know, or voxels unlike those of the training scans and no way to resample to them.
        """
        case, like = self.intake.prepared(images)
        self._write(case.image, case.chain, like, out, probabilities)

    def segment_prepared(
        self, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path, *, probabilities: Path | None = None
    ) -> None:
        """Segment a volume of a store that was prepared as the training scans, and write as `segment_file` does.

        Args:
            image: `(C, D, H, W)` as stored.
            chain: how it was prepared.
            like: the source scan, for its header.
            out: the `.nii.gz` to write.
            probabilities: folder for the probabilities of classes or regions; None writes none.

        Raises:
            ValueError: voxels unlike those of the training scans.
        """
        self.intake.check_stored(chain)
        self._write(np.asarray(image, dtype=np.float32), chain, like, out, probabilities)

    def probabilities(self, image: Tensor) -> Tensor:
        """Probabilities of a prepared volume: `(C, D, H, W)` -> `(K or R, D, H, W)` float32 on the CPU."""
        views = (False, True) if self.mirror else (False,)
        windows = sum(count_windows(image.shape[1:], m.encoder.img_size, self.settings.overlap) for m in self.models)
        total = torch.zeros(())
        with tqdm(total=windows * len(views), unit="window", leave=False, disable=not self.progress) as bar:
            for model in self.models:
                for mirrored in views:
                    view = image.flip(-1) if mirrored else image
                    logits = sliding_window(model, view, self.settings, tick=bar.update).cpu()
                    shares = shares_of(logits, self.regions)
                    total = total + (shares.flip(-1)[self.mirrored_channels] if mirrored else shares)
        return total / (len(self.models) * len(views))

    def _write(
        self, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path, probabilities: Path | None
    ) -> None:
        """The label map on the scan's own grid, and each probability if asked, in a file of its own."""
        shares = self.probabilities(torch.from_numpy(np.ascontiguousarray(image)))
        write_label(out, label_map(shares, chain, self.labels, self.regions, like, probabilities), like)

    def _check_sides(self) -> None:
        paired = {name for pair in self.data.get("lateral_pairs", []) for name in pair}
        for name in self.labels.values():
            if SIDE.search(name) and name not in paired:
                raise ValueError(
                    f"mirror=true: the label {name!r} has a side, and the checkpoint names no partner: "
                    "mirror=false, or fine-tune with data.lateral_pairs"
                )


def shares_of(logits: Tensor, regions: Mapping[str, Sequence[int]]) -> Tensor:
    """Probabilities `(K or R, D, H, W)`: a sigmoid for each region where there are regions, else a softmax."""
    return logits.sigmoid() if regions else logits.softmax(dim=0)


def label_map(
    shares: Tensor,
    chain: dict[str, Any],
    labels: Mapping[int, str],
    regions: Mapping[str, Sequence[int]],
    like: Volume,
    folder: Path | None = None,
) -> np.ndarray:
    """Label values on a scan's own grid, (x, y, z) as in its file.

    Args:
        shares: `(K or R, D, H, W)` on the CPU, of the prepared scan.
        chain: how it was prepared.
        labels: label value -> name.
        regions: name -> label values that it joins; {} where classes compete.
        like: the scan.
        folder: for each probability in a file of its own; None writes none.
    """
    native = (to_native(share[None], chain, order=1)[0] for share in (shares if regions else shares[1:]).numpy())
    return winning_labels(native, labels, regions, like, folder)


def _check_agreement(first: str, data: Mapping[str, Any], path: str, other: Mapping[str, Any]) -> None:
    """Raise a ValueError where two networks of an ensemble were trained on other things."""
    for key in ("channels", "labels", "regions", "prepare", "lateral_pairs"):
        before, now = data.get(key, []), other.get(key, [])  # the last and the regions may be absent
        if before != now:
            raise ValueError(f"{path}: an ensemble agrees in {key}: {now} here, {before} in {first}")
