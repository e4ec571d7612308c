"""Segmentation of whole volumes, back in the scan's own space.

Letters: image `C D H W`, K classes.
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

from asa.data.case import to_native
from asa.data.volume import Volume, write_image, write_label
from asa.engine.checkpoint import read_model
from asa.engine.intake import Intake
from asa.engine.train import autocast, pick_device, pick_precision
from asa.models.sa_swin_unet import SASwinUNet
from asa.models.unet import SegmentationUNet
from asa.ops.symmetry import flip

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
    model: SegmentationUNet | SASwinUNet,
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
    model: SegmentationUNet | SASwinUNet,
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

    The class probabilities are means over the networks and, with `mirror`, over the scan and its mirror image, whose
    result is mirrored back with the sides of lateral pairs exchanged.

    Args:
        checkpoints: run folder, checkpoint folder or file of `asa-finetune`, or several that agree in channels,
            labels and preparation.
        settings: how volumes are covered.
        mirror: average with the mirror image, left and right.
        strip: how raw scans are skull-stripped, as in `PrepareSettings`; None: as the training scans were.
        progress: show a bar of windows.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, one that segments nothing, or whose scans were stripped by a
            command; checkpoints that do not agree; `mirror` and a label with a side but no partner.
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
        self.models: list[SegmentationUNet | SASwinUNet] = []
        described = []
        for path in paths:
            model, description = read_model(path)
            if "labels" not in description["data"]:
                raise ValueError(f"{path}: not a segmentation model: give a run of asa-finetune")
            assert isinstance(model, SegmentationUNet | SASwinUNet)
            self.models.append(model.to(pick_device(settings.device)))
            described.append(description["data"])
        self.data: dict[str, Any] = described[0]
        for path, other in zip(paths[1:], described[1:], strict=True):
            _check_agreement(str(paths[0]), self.data, str(path), other)
        self.labels: dict[int, str] = {int(value): name for value, name in self.data["labels"].items()}
        self.mirrored_classes = _mirrored_classes(self.labels, self.data.get("lateral_pairs", []))
        if mirror:
            self._check_sides()
        self.intake = Intake(str(paths[0]), self.data, strip)

    def segment_file(
        self, images: Mapping[str, str | Path | None], out: Path, *, probabilities: Path | None = None
    ) -> None:
        """Segment a raw scan as `asa-prepare` would have brought it in, and write the label map in its own space.

        Args:
            images: file of each channel.
            out: the `.nii.gz` to write.
            probabilities: folder for the class probabilities; None writes none.

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
            probabilities: folder for the class probabilities; None writes none.

        Raises:
            ValueError: voxels unlike those of the training scans.
        """
        self.intake.check_stored(chain)
        self._write(np.asarray(image, dtype=np.float32), chain, like, out, probabilities)

    def probabilities(self, image: Tensor) -> Tensor:
        """Class probabilities of a prepared volume: `(C, D, H, W)` -> `(K, D, H, W)` float32 on the CPU."""
        views = (False, True) if self.mirror else (False,)
        windows = sum(count_windows(image.shape[1:], m.encoder.img_size, self.settings.overlap) for m in self.models)
        total = torch.zeros(())
        with tqdm(total=windows * len(views), unit="window", leave=False, disable=not self.progress) as bar:
            for model in self.models:
                for mirrored in views:
                    view = image.flip(-1) if mirrored else image
                    shares = sliding_window(model, view, self.settings, tick=bar.update).cpu().softmax(dim=0)
                    total = total + (shares.flip(-1)[self.mirrored_classes] if mirrored else shares)
        return total / (len(self.models) * len(views))

    def _write(
        self, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path, probabilities: Path | None
    ) -> None:
        """The label map, the class of the largest probability at each voxel of the scan, and each class if asked.

        What no class claims is background, so the probabilities sum to 1 everywhere. One class is held at a time.
        """
        shares = self.probabilities(torch.from_numpy(np.ascontiguousarray(image))).numpy()
        files = _class_files(["background", *(self.labels[value] for value in sorted(self.labels))])
        rest = np.ones(like.data.shape, np.float32)
        best, winner = np.zeros_like(rest), np.zeros(like.data.shape, np.uint8)
        for index in range(1, len(shares)):
            native = to_native(shares[index : index + 1], chain, order=1)[0]
            rest -= native
            better = native > best
            best[better], winner[better] = native[better], index
            if probabilities is not None:
                write_image(probabilities / files[index], native, like.affine)
        rest = rest.clip(min=0)
        winner[rest >= best] = 0
        if probabilities is not None:
            write_image(probabilities / files[0], rest, like.affine)
        write_label(out, np.array([0, *sorted(self.labels)])[winner], like)

    def _check_sides(self) -> None:
        paired = {name for pair in self.data.get("lateral_pairs", []) for name in pair}
        for name in self.labels.values():
            if SIDE.search(name) and name not in paired:
                raise ValueError(
                    f"mirror=true: the label {name!r} has a side, and the checkpoint names no partner: "
                    "mirror=false, or fine-tune with data.lateral_pairs"
                )


def _check_agreement(first: str, data: Mapping[str, Any], path: str, other: Mapping[str, Any]) -> None:
    """Raise a ValueError where two networks of an ensemble were trained on other things."""
    for key, default in (("channels", None), ("labels", None), ("prepare", None), ("lateral_pairs", [])):
        before, now = data.get(key, default), other.get(key, default)
        if before != now:
            raise ValueError(f"{path}: an ensemble agrees in {key}: {now} here, {before} in {first}")


def _mirrored_classes(labels: Mapping[int, str], pairs: Sequence[Sequence[str]]) -> list[int]:
    """For each class, background first, the one whose place it takes in a mirror."""
    index = {labels[value]: place for place, value in enumerate(sorted(labels), start=1)}
    classes = list(range(len(labels) + 1))
    for left, right in pairs:
        classes[index[left]], classes[index[right]] = index[right], index[left]
    return classes


def _class_files(names: Sequence[str]) -> list[str]:
    """A file name for each class."""
    files = [re.sub(r"[^\w.-]+", "_", name) + ".nii.gz" for name in names]
    for index, file in enumerate(files):
        if file in files[:index]:
            raise ValueError(f"the classes {names[files.index(file)]!r} and {names[index]!r} would share {file}")
    return files
