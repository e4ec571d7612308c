"""Segmentation of whole volumes, back in the scan's own space.

Letters: image `C D H W`, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from asa.data.case import prepare_case, to_native
from asa.data.stages import PrepareSettings
from asa.data.volume import Volume, read_image, write_label
from asa.engine.checkpoint import read_model
from asa.engine.train import autocast, pick_device, pick_precision
from asa.models.unet import SegmentationUNet


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


def sliding_window(model: SegmentationUNet, image: Tensor, settings: PredictSettings) -> Tensor:
    """Class logits of a volume of any size, from overlapping windows with Gaussian weights.

    Args:
        model: the network; its window is the encoder's volume size.
        image: `(C, D, H, W)`.
        settings: overlap, windows at a time, precision.

    Returns:
        `(K, D, H, W)` float32 on the model's device.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), autocast(device, pick_precision(settings.precision, device)):
        logits = sliding_window_inference(
            image[None].to(device, torch.float32),
            roi_size=model.encoder.img_size,
            sw_batch_size=settings.batch_size,
            predictor=model,
            overlap=settings.overlap,
            mode="gaussian",
        )
    assert isinstance(logits, Tensor)
    return logits[0].float()


class Segmenter:
    """A trained segmentation network together with what it was trained on.

    Args:
        checkpoint: run folder, checkpoint folder or file of `asa-finetune`.
        settings: how volumes are covered.
        strip: how raw scans are skull-stripped, as in `PrepareSettings`; None: as the training scans were.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or one that segments nothing, or whose scans were stripped by a
            command.
    """

    def __init__(self, checkpoint: str | Path, settings: PredictSettings, *, strip: str | None = None) -> None:
        model, self.description = read_model(checkpoint)
        data = self.description["data"]
        if "labels" not in data:
            raise ValueError(f"{checkpoint}: not a segmentation model: give a run of asa-finetune")
        assert isinstance(model, SegmentationUNet)
        self.model = model.to(pick_device(settings.device))
        self.settings = settings
        self.channels: list[str] = data["channels"]
        self.labels: dict[int, str] = {int(value): name for value, name in data["labels"].items()}
        prepare = PrepareSettings(**data["prepare"])
        if strip is None and "{mask}" in prepare.strip:  # a checkpoint often comes from somebody else
            raise ValueError(
                f"{checkpoint}: its scans were stripped by a command, and a checkpoint may not start one "
                f"({prepare.strip}): give strip= the command, or none for scans that are stripped"
            )
        self.prepare_settings = prepare if strip is None else replace(prepare, strip=strip)

    def segment_file(self, images: Mapping[str, str | Path], out: Path) -> None:
        """Segment a raw scan as `asa-prepare` would have brought it in, and write the label map in its own space.

        Args:
            images: file of each channel.
            out: the `.nii.gz` to write.

        Raises:
            FileNotFoundError, ValueError: unreadable files, or channels that the network does not know.
        """
        if sorted(images) != sorted(self.channels):
            raise ValueError(f"this model takes the channels {', '.join(self.channels)}, got {', '.join(images)}")
        volumes = {channel: read_image(images[channel]) for channel in self.channels}
        case = prepare_case(volumes, None, {}, self.prepare_settings)
        write_label(out, self._native_labels(case.image, case.chain), volumes[self.channels[0]])

    def segment_prepared(self, image: np.ndarray, chain: dict[str, Any], like: Volume, out: Path) -> None:
        """Segment a volume of the store, and write the label map in the source scan's space.

        Args:
            image: `(C, D, H, W)` as stored.
            chain: how it was prepared.
            like: the source scan, for its header.
            out: the `.nii.gz` to write.
        """
        write_label(out, self._native_labels(np.asarray(image, dtype=np.float32), chain), like)

    def _native_labels(self, image: np.ndarray, chain: dict[str, Any]) -> np.ndarray:
        """Declared label values (x, y, z) on the scan's own grid."""
        logits = sliding_window(self.model, torch.from_numpy(np.ascontiguousarray(image)), self.settings)
        classes = logits.argmax(dim=0, keepdim=True).to(torch.uint8).cpu().numpy()  # 1 D H W
        return np.array([0, *sorted(self.labels)])[to_native(classes, chain, order=0)[0]]
