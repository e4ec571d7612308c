"""What a run shows of its progress on scans it does not train on: numbers and pictures for the log."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from asa.data.loader import CropDataset, VolumeSource, collate
from asa.data.store import IGNORED
from asa.engine.distributed import spread
from asa.engine.figures import overlay_panel, reconstruction_panel
from asa.engine.metrics import dice
from asa.engine.predict import PredictSettings, sliding_window
from asa.engine.train import on_device
from asa.methods.base import Pretraining
from asa.methods.segment import Segmentation

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
    labels: Sequence[str],
    settings: PredictSettings,
) -> Shown:
    """Dice of whole prepared volumes over the voxels that count, and an overlay of the first.

    Several processes share the scans; each gets the whole result, and the main one the overlay.

    Args:
        method: the method, in evaluation mode.
        source: the store.
        ids: labelled scans.
        labels: names of the classes 1, 2, ...
        settings: how volumes are covered.

    Returns:
        "dice_NAME" of each class (1 for a scan where neither map holds it) and "dice", their mean; and a panel of
        image, truth and prediction.
    """
    pictures: dict[str, np.ndarray] = {}

    def scores(id: str) -> list[float]:
        image, truth = source.image(id), source.label(id)
        assert truth is not None
        volume = torch.from_numpy(np.array(image, dtype=np.float32))
        prediction = sliding_window(method.model, volume, settings).argmax(dim=0).cpu().numpy()
        counted = truth[0] != IGNORED
        truth, prediction = truth[0] * counted, prediction * counted
        if not pictures:
            panel = overlay_panel(volume[0].numpy(), [truth, prediction])
            pictures["image, truth, prediction"] = panel
        found = [dice(prediction == index, truth == index) for index in range(1, len(labels) + 1)]
        return [1.0 if math.isnan(score) else score for score in found]  # in neither map: right

    columns = zip(*spread(ids, scores), strict=True)
    numbers = {f"dice_{name}": float(np.mean(column)) for name, column in zip(labels, columns, strict=True)}
    return {"dice": float(np.mean(list(numbers.values()))), **numbers}, pictures
