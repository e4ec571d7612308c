"""Classification of whole volumes.

Letters: prepared volume `C D H W`, N scans, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from asa.data.io.tables import csv_text
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.inference.preprocessing import ScanPreprocessor
from asa.inference.segmentation import PredictSettings, window_size
from asa.training.checkpoint import read_model
from asa.training.device import on_device, pick_device
from asa.training.distributed import map_over_ranks


def predict_classes(model: nn.Module, dataset: CropDataset) -> np.ndarray:
    """Class probabilities `(N, K)` of all records, from crops without augmentation.

    The records are divided over the processes, and each process gets the whole result.

    Args:
        model: a classifier in evaluation mode.
        dataset: with "mirror" for a network that cross-attends to the mirror image.
    """
    device = next(model.parameters()).device

    def predict(index: int) -> list[float]:
        batch = on_device(collate([dataset[index, 0]]), device)
        return model(batch["image"], batch.get("mirror")).float().softmax(dim=1)[0].tolist()

    with torch.inference_mode():
        return np.array(map_over_ranks(range(len(dataset)), predict))


class _OneVolume:
    """A prepared volume as the source of a `CropDataset`."""

    def __init__(self, volume: np.ndarray) -> None:
        self.volume = volume

    def image(self, record_id: str) -> np.ndarray:
        return self.volume

    def label(self, record_id: str) -> None:
        return None


class ClassPredictor:
    """A trained classifier for new scans.

    Args:
        checkpoint: run folder, checkpoint folder or file of `asa-finetune method=classify`.
        settings: the device; a scan is one window.
        strip: skull stripping of raw scans, as in `PrepareSettings`; None: that of the training scans.
        plugins: packages of your own that the checkpoint's network may come from.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or not of a classifier.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        settings: PredictSettings,
        *,
        strip: str | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        model, description = read_model(checkpoint, plugins=plugins)
        if "classes" not in description["data"]:
            raise ValueError(f"{checkpoint}: not a run of asa-finetune method=classify")
        self.model = model.to(pick_device(settings.device))
        self.window = window_size(model)
        self.preprocessor = ScanPreprocessor(str(checkpoint), description["data"], strip)
        self.classes: list[str] = description["data"]["classes"]
        if len(self.classes) != (outputs := len(model.get_parameter("head.bias"))):
            raise ValueError(f"{checkpoint}: names {len(self.classes)} classes, and its network has {outputs}")

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities `(K,)` of a prepared volume `(C, D, H, W)`."""
        mirrored = getattr(self.model, "mirrored", False)
        dataset = CropDataset(_OneVolume(image), [{"id": ""}], self.window, mirrored=mirrored)
        return predict_classes(self.model, dataset)[0]


TABLE = "predictions.csv"


def predictions_csv(names: Sequence[str], rows: Sequence[tuple[str, str, str]], probabilities: np.ndarray) -> str:
    """A table (CSV) of the most likely class of each scan, and the probability of every class.

    Args:
        names: of the classes.
        rows: id, subject and true class of each scan; "" if unknown.
        probabilities: `(N, K)`.
    """
    predicted = [names[int(values.argmax())] for values in probabilities]
    cells = [[f"{value:.6f}" for value in values] for values in probabilities]
    table = [[*row, name, *own] for row, name, own in zip(rows, predicted, cells, strict=True)]
    return csv_text(["id", "subject", "class", "predicted", *(f"p_{name}" for name in names)], table)
