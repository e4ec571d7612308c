"""Classes and numbers of whole volumes.

Letters: prepared volume `C D H W`, N scans, K classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from asa.data.io.tables import PREDICTED, TRAINING_MEAN, csv_text
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.inference.segmentation import window_size
from asa.settings import PredictSettings
from asa.training.checkpoint import read_model
from asa.training.device import on_device, pick_device
from asa.training.distributed import map_over_ranks

TABLE = "predictions.csv"
METHODS = {"classes": "classify", "number": "regress"}  # by what a checkpoint says of its task


def predict_volumes(model: nn.Module, dataset: CropDataset) -> np.ndarray:
    """Class probabilities `(N, K)`, or numbers `(N,)` of a regression network, of all records, without augmentation.

    Several processes divide the records, and each gets the whole result. The model is in evaluation mode, and the
    dataset has "mirror" for one that cross-attends to the mirror image.
    """
    device = next(model.parameters()).device

    def predict(index: int) -> Any:
        batch = on_device(collate([dataset[index, 0]]), device)
        found = model(batch["image"], batch.get("mirror"))
        return (found.float().softmax(dim=1) if found.dim() == 2 else found)[0].tolist()  # logits, or a number

    with torch.inference_mode():
        return np.array(map_over_ranks(range(len(dataset)), predict))


class VolumePredictor:
    """A trained classifier or regression network for new scans, each of which is one window.

    `target` is "classes" or "number": what the checkpoint has to say of its task. Other arguments as of `Segmenter`; a
    FileNotFoundError or ValueError for no checkpoint, or one of another task.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        target: str,
        settings: PredictSettings,
        *,
        strip: str | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        model, description = read_model(checkpoint, plugins=plugins)
        if target not in description["data"]:
            raise ValueError(f"{checkpoint}: not a run of asa-finetune method={METHODS[target]}")
        self.model = model.to(pick_device(settings.device))
        self.window = window_size(model)
        self.preprocessor = ScanPreprocessor(str(checkpoint), description["data"], strip)
        self.digest: str = description["sha256"]  # of the weights
        about, outputs = description["data"][target], len(model.get_parameter("head.bias"))
        self.classes: list[str] | None = None
        if target == "classes":
            if len(about) != outputs:
                raise ValueError(f"{checkpoint}: names {len(about)} classes, and its network has {outputs}")
            self.column, self.classes = "class", about
        else:
            if outputs != 1:
                raise ValueError(f"{checkpoint}: a regression has one output, and its network has {outputs}")
            self.column, self.mean = str(about["column"]), float(about["mean"])

    def row(self, image: np.ndarray) -> dict[str, str]:
        """The cells of a prepared volume `(C, D, H, W)` in the table of predictions, by column."""
        volume: Any = SimpleNamespace(image=lambda id: image)
        mirrored = getattr(self.model, "mirrored", False)
        found = predict_volumes(self.model, CropDataset(volume, [{"id": ""}], self.window, mirrored=mirrored))[0]
        check_finite(found, "the network's output")
        cells = number_cells(found, self.mean) if self.classes is None else class_cells(self.classes, found)
        return {self.column: "", **cells}


def predictions_csv(column: str, rows: Sequence[tuple[str, str, str]], cells: Sequence[Mapping[str, str]]) -> str:
    """A table (CSV): id, subject and true value ("" if unknown) of each scan, and the cells of what is predicted."""
    table = [[*row, *own.values()] for row, own in zip(rows, cells, strict=True)]
    return csv_text(["id", "subject", column, *cells[0]], table)


def class_cells(names: Sequence[str], probabilities: np.ndarray) -> dict[str, str]:
    """The most likely class of a scan, and the probability `(K,)` of every class."""
    likely = {PREDICTED: names[int(probabilities.argmax())]}
    return likely | {f"p_{name}": f"{value:.6f}" for name, value in zip(names, probabilities, strict=True)}


def number_cells(value: float, mean: float) -> dict[str, str]:
    """The predicted number of a scan, and the training scans' mean, to compare with."""
    return {PREDICTED: f"{value:.6g}", TRAINING_MEAN: f"{mean:.6g}"}
