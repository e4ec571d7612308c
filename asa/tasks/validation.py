"""What a run shows of its progress on scans it does not train on: numbers and pictures for the log."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from asa.data.loading.crops import CropDataset, VolumeSource
from asa.data.loading.loader import collate
from asa.data.restoration.pairs import PairDataset
from asa.evaluation.image_quality import score_image
from asa.evaluation.metrics import dice
from asa.inference.restoration import restore_image
from asa.inference.segmentation import PredictSettings, sliding_window
from asa.methods.base import Pretraining
from asa.methods.restore import Restoration
from asa.methods.segment import Segmentation
from asa.ops.labels import IGNORED
from asa.reporting.figures import central_slices, overlay_panel, reconstruction_panel
from asa.training.device import on_device
from asa.training.distributed import spread

Shown = tuple[dict[str, float], dict[str, np.ndarray]]


def validate_pretraining(method: Pretraining, dataset: CropDataset) -> Shown:
    """A method's numbers over all records, always under the same draws, and its pictures of the first.

    Several processes share the records; each gets the whole result, and the main one the pictures.

    Args:
        method: the method, in evaluation mode.
        dataset: crops without augmentation.

    Returns:
        What the method returns, as means, and its panels.
    """
    assert isinstance(method, nn.Module)
    device = next(method.parameters()).device
    pictures: dict[str, np.ndarray] = {}

    def errors(index: int) -> dict[str, float]:
        batch = on_device(collate([dataset[index, 0]]), device)
        if not pictures:
            pictures.update(pictures_of(method, batch))
        return {name: float(value) for name, value in method(batch).items()}

    rows = spread(range(len(dataset)), errors)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, pictures


def pictures_of(method: Pretraining, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """A method's pictures of a batch's first sample, RGB uint8."""
    return {
        name: reconstruction_panel(*(volume[0, 0].float().cpu().numpy() for volume in volumes.values()))
        for name, volumes in method.pictures(batch).items()
    }


def validate_segmentation(
    method: Segmentation,
    source: VolumeSource,
    ids: Sequence[str],
    parts: Mapping[str, Sequence[int]],
    settings: PredictSettings,
) -> Shown:
    """Dice of whole prepared volumes over the voxels that count, and an overlay of the first with its truth.

    Several processes share the scans; each gets the whole result, and the main one the overlay.

    Args:
        method: the method, in evaluation mode.
        source: the store.
        ids: labelled scans.
        parts: name -> class indices that are scored as one: labels, or regions.
        settings: how volumes are covered.

    Returns:
        "dice_NAME" of each part (1 for a scan where neither map holds it) and "dice", their mean; and a panel of
        image, truth and prediction in three planes, through the middle of what is labelled.
    """
    pictures: dict[str, np.ndarray] = {}

    def scores(id: str) -> list[float]:
        image, truth = source.image(id), source.label(id)
        assert truth is not None
        volume = torch.from_numpy(np.array(image, dtype=np.float32))
        prediction = method.label_map(sliding_window(method.model, volume, settings)).cpu().numpy()
        counted = truth[0] != IGNORED
        truth, prediction = truth[0] * counted, prediction * counted
        if not pictures:
            at = central_slices(truth > 0) if truth.any() else None
            pictures["image, truth, prediction"] = overlay_panel(volume[0].numpy(), [truth, prediction], at=at)
        found = [dice(np.isin(prediction, values), np.isin(truth, values)) for values in parts.values()]
        return [1.0 if math.isnan(score) else score for score in found]  # in neither map: right

    columns = zip(*spread(ids, scores), strict=True)
    numbers = {f"dice_{name}": float(np.mean(column)) for name, column in zip(parts, columns, strict=True)}
    return {"dice": float(np.mean(list(numbers.values()))), **numbers}, pictures


def validate_restoration(method: Restoration, dataset: PairDataset, settings: PredictSettings) -> Shown:
    """PSNR and SSIM of whole images, those of the input upscaled bilinearly beside them, and a picture of the first.

    Several processes share the images; each gets the whole result, and the main one the picture.

    Args:
        method: the method, in evaluation mode.
        dataset: the pairs.
        settings: precision.

    Returns:
        "psnr", "ssim", "input_psnr", "input_ssim"; and a panel of input, prediction and target.
    """
    pictures: dict[str, np.ndarray] = {}

    def scores(index: int) -> dict[str, float]:
        views = dataset.whole(index)
        target = views["target"]
        plain = F.interpolate(views["image"][None], target.shape[1:], mode="bilinear")[0]
        restored = restore_image(method.model, views["image"], views["regions"], settings)
        if not pictures:
            panel = torch.cat([plain, restored.clamp(0, 1), target], dim=2).expand(3, -1, -1)
            pictures["input, prediction, target"] = (255 * panel).byte().permute(1, 2, 0).numpy()
        found, before = (score_image(image, target) for image in (restored, plain))
        return {name: found[name] for name in ("psnr", "ssim")} | {
            f"input_{name}": before[name] for name in ("psnr", "ssim")
        }

    rows = spread(range(len(dataset)), scores)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}, pictures
