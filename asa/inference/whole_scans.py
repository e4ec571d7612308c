"""Classes and numbers of whole volumes.

Letters: prepared volume `C D H W`, N scans, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asa.data.io.tables import PREDICTED, TRAINING_MEAN, csv_text
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.inference.segmentation import PredictSettings, window_size
from asa.training.checkpoint import read_model
from asa.training.device import on_device, pick_device
from asa.training.distributed import map_over_ranks

TABLE = "predictions.csv"


def predict_classes(model: nn.Module, dataset: CropDataset) -> np.ndarray:
    """Class probabilities `(N, K)` of all records, from crops without augmentation.

    The records are divided over the processes, and each process gets the whole result. The model is in evaluation mode,
    and the dataset has "mirror" for one that cross-attends to the mirror image.
    """
    return _outputs(model, dataset, lambda logits: logits.float().softmax(dim=1))


def predict_numbers(model: nn.Module, dataset: CropDataset) -> np.ndarray:
    """The numbers `(N,)` that a regression network predicts of all records, as `predict_classes`."""
    return _outputs(model, dataset, lambda numbers: numbers)


def _outputs(model: nn.Module, dataset: CropDataset, read: Callable[[Tensor], Tensor]) -> np.ndarray:
    """What `read` takes from the network's output for each record."""
    device = next(model.parameters()).device

    def predict(index: int) -> Any:
        batch = on_device(collate([dataset[index, 0]]), device)
        return read(model(batch["image"], batch.get("mirror")))[0].tolist()

    with torch.inference_mode():
        return np.array(map_over_ranks(range(len(dataset)), predict))


class _Network:
    """A trained network for new scans, and what its checkpoint says; arguments as of `Segmenter`. A scan is one window.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or of another task.
    """

    key: str  # of what the checkpoint says of the task
    method: str

    def __init__(
        self,
        checkpoint: str | Path,
        settings: PredictSettings,
        *,
        strip: str | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        model, description = read_model(checkpoint, plugins=plugins)
        if self.key not in description["data"]:
            raise ValueError(f"{checkpoint}: not a run of asa-finetune method={self.method}")
        self.model = model.to(pick_device(settings.device))
        self.window = window_size(model)
        self.preprocessor = ScanPreprocessor(str(checkpoint), description["data"], strip)
        self.about: Any = description["data"][self.key]
        self.outputs = len(model.get_parameter("head.bias"))

    def crop(self, image: np.ndarray) -> CropDataset:
        """The window of a prepared volume `(C, D, H, W)`."""
        volume: Any = SimpleNamespace(image=lambda id: image)
        return CropDataset(volume, [{"id": ""}], self.window, mirrored=getattr(self.model, "mirrored", False))


class ClassPredictor(_Network):
    """A trained classifier for new scans; arguments as of `_Network`."""

    key, method = "classes", "classify"

    def __init__(self, checkpoint: str | Path, settings: PredictSettings, **options: Any) -> None:
        super().__init__(checkpoint, settings, **options)
        self.classes: list[str] = self.about
        if len(self.classes) != self.outputs:
            raise ValueError(f"{checkpoint}: names {len(self.classes)} classes, and its network has {self.outputs}")

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities `(K,)` of a prepared volume `(C, D, H, W)`; a ValueError if they are not finite."""
        found = predict_classes(self.model, self.crop(image))[0]
        check_finite(found, "the network's output")
        return found

    def row(self, found: np.ndarray) -> dict[str, str]:
        """A scan's cells in the table of predictions, by column: see `predictions_csv`."""
        return {"class": "", **_class_cells(self.classes, found)}


class NumberPredictor(_Network):
    """A trained regression network for new scans; arguments as of `_Network`."""

    key, method = "number", "regress"

    def __init__(self, checkpoint: str | Path, settings: PredictSettings, **options: Any) -> None:
        super().__init__(checkpoint, settings, **options)
        if self.outputs != 1:
            raise ValueError(f"{checkpoint}: a regression has one output, and its network has {self.outputs}")
        self.column, self.mean = str(self.about["column"]), float(self.about["mean"])

    def number(self, image: np.ndarray) -> float:
        """The number of a prepared volume `(C, D, H, W)`, in the training table's units; a ValueError if not finite."""
        found = predict_numbers(self.model, self.crop(image))[0]
        check_finite(found, "the network's output")
        return float(found)

    def row(self, found: float) -> dict[str, str]:
        """A scan's cells in the table of predictions, by column: see `numbers_csv`."""
        return {self.column: "", **_number_cells(found, self.mean)}


def predictions_csv(names: Sequence[str], rows: Sequence[tuple[str, str, str]], probabilities: np.ndarray) -> str:
    """A table (CSV) of the most likely class of each scan, and the probability `(N, K)` of every class.

    `rows` are id, subject and true class of each scan; "" if unknown.
    """
    return _table("class", rows, [_class_cells(names, values) for values in probabilities])


def numbers_csv(column: str, rows: Sequence[tuple[str, str, str]], predicted: np.ndarray, mean: float) -> str:
    """A table (CSV) of a predicted number `(N,)` of each scan, and the training scans' mean, to compare with.

    `rows` are id, subject and true number of each scan; "" if unknown.
    """
    return _table(column, rows, [_number_cells(value, mean) for value in predicted])


def _class_cells(names: Sequence[str], values: np.ndarray) -> dict[str, str]:
    likely = {PREDICTED: names[int(values.argmax())]}
    return likely | {f"p_{name}": f"{value:.6f}" for name, value in zip(names, values, strict=True)}


def _number_cells(value: float, mean: float) -> dict[str, str]:
    return {PREDICTED: f"{value:.6g}", TRAINING_MEAN: f"{mean:.6g}"}


def _table(column: str, rows: Sequence[tuple[str, str, str]], found: Sequence[Mapping[str, str]]) -> str:
    table = [[*row, *cells.values()] for row, cells in zip(rows, found, strict=True)]
    return csv_text(["id", "subject", column, *found[0]], table)
