"""Classification and regression: a class or a number of each whole volume, from a table.

Data: crops of a prepared store, and a table with the scans' classes, or a column of numbers. Loss: the method's
(weighted cross-entropy, or L1). Validation: loss, AUC, balanced accuracy and calibration, or mean absolute error, R2
and correlation, on the validation part; the test part is scored after training. A checkpoint holds the class names, or
the column with the training scans' mean and SD, and channels and preparation. Prediction: a table.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from asa.config import typed
from asa.data.io.files import write_json, write_whole
from asa.data.io.nifti import Volume
from asa.data.io.tables import PREDICTED, RESERVED, as_number, check_own, read_column
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.errors import counted
from asa.evaluation.scans import ClassScores, NumberScores, score_classes, score_numbers, weighted_cross_entropy
from asa.evaluation.tables import evaluate_classes, evaluate_numbers
from asa.inference.segmentation import PredictSettings
from asa.inference.whole_scans import (
    TABLE,
    ClassPredictor,
    NumberPredictor,
    numbers_csv,
    predict_classes,
    predict_numbers,
    predictions_csv,
)
from asa.tasks.base import Config
from asa.tasks.evaluation import tables_of
from asa.tasks.prediction import add_rows, only_checkpoint, predict_scans
from asa.tasks.volumes import Records, VolumeTask
from asa.training.checkpoint import load_model
from asa.training.device import pick_device
from asa.training.distributed import is_main
from asa.training.loop import Validate, Validation


class WholeScans(VolumeTask, ABC):
    """What both tasks share: a value of each whole volume, from a prepared store and a table.

    Args:
        config: of asa-finetune.
        table: the key of `data` that names the table.
    """

    command = "finetune"
    targets = ("target",)
    scores: tuple[str, ...]  # of the validation, beside the loss

    def __init__(self, config: Config, table: str) -> None:
        super().__init__(config, table)
        self.augment, self.all_parts = typed(AugmentSettings, config["augment"]), self.parts

    def set_values(self, values: Mapping[str, float], **model: Any) -> None:
        """Keep the scans that have a value, and enter what follows from the data into the model's configuration."""
        self.values = {id: {"target": value} for id, value in values.items()}
        self.parts = {name: [one for one in part if one["id"] in values] for name, part in self.all_parts.items()}
        self.set_model(**model)

    def dataset(self, method: Any) -> CropDataset:
        return self.crops(method, self.parts["train"], crop=self.data.placement, augment=self.augment)

    def crops(self, method: Any, part: Records, **options: Any) -> CropDataset:
        return super().crops(method, part, attached=self.values, **options)

    def metrics(self, make: Any) -> list[str]:
        return [*self.scores, "loss"]

    def validation(self, method: Any) -> Validate | None:
        if not self.parts["validation"]:
            return None

        def validate(step: int) -> Validation:
            return self.validated(method), {}

        return validate

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        if self.parts["test"]:
            trained = load_model(run, plugins=self.config["plugins"]).to(pick_device(self.train.device))
            self.test(run, method, trained)

    @abstractmethod
    def validated(self, method: Any) -> dict[str, float]:
        """The validation part's loss and scores."""

    @abstractmethod
    def test(self, run: Path, method: Any, model: nn.Module) -> None:
        """Score the test part, and write its predictions and scores."""

    def truth(self, part: str) -> np.ndarray:
        """The targets of a part, `(N,)`."""
        return np.array([self.values[record["id"]]["target"] for record in self.parts[part]])

    def subjects(self, part: str) -> list[str]:
        return [str(record["subject"]) for record in self.parts[part]]

    def rows(self, part: str, truth: Sequence[str]) -> list[tuple[str, str, str]]:
        """Id, subject and true value of the scans of a part, for a table of predictions."""
        ids = [str(record["id"]) for record in self.parts[part]]
        return list(zip(ids, self.subjects(part), truth, strict=True))


class Classification(WholeScans):
    """Classification from a prepared store and a table."""

    scores = ("auc", "balanced_accuracy", "ece")

    def __init__(self, config: Config) -> None:
        super().__init__(config, "classes")
        if self.data.classes is None:
            raise ValueError(
                "data.classes has to be given with method=classify: a table with subject (or id) and class"
            )
        class_of = read_column(self.data.classes, "class", self.store.records)
        self.names = sorted(set(class_of.values()))
        self.set_values({id: self.names.index(name) for id, name in class_of.items()}, classes=len(self.names))
        self.counts = Counter(int(value) for value in self.truth("train"))
        if config["method"].get("weights") == "balanced":
            config["method"]["weights"] = self._balanced_weights()

    def target_metadata(self) -> dict[str, Any]:
        return {"classes": self.names}

    def begin(self, run: Path) -> None:
        self.init.write(run)
        counts = ", ".join(f"{count} {self.names[k]}" for k, count in sorted(self.counts.items()))
        print(f"classifying {counted(len(self.parts['train']), 'scan')} ({counts}), in {run}")

    def validated(self, method: Any) -> dict[str, float]:
        scores, probabilities = self._score(method.model, method, "validation")
        metrics = {name: getattr(scores, name) for name in self.scores}
        weights = method.weights.cpu().numpy()
        return {**metrics, "loss": weighted_cross_entropy(probabilities, self.truth("validation"), weights)}

    def test(self, run: Path, method: Any, model: nn.Module) -> None:
        scores, probabilities = self._score(model, method, "test")
        if is_main():
            rows = self.rows("test", [self.names[int(value)] for value in self.truth("test")])
            write_whole(run / "predictions_test.csv", predictions_csv(self.names, rows, probabilities).encode())
            write_json(run / "scores_test.json", scores.as_json(self.names))
            print(f"test: {scores.text(self.names)}")

    @staticmethod
    def predict(config: Config) -> None:
        _predict(config, "a classification", ClassPredictor, ClassPredictor.probabilities)

    @staticmethod
    def evaluate(config: Config) -> None:
        scores, names = evaluate_classes(*tables_of(config, TABLE))
        print(scores.text(names))

    def _balanced_weights(self) -> list[float]:
        """Weights of the classes inverse to their number of training scans, with mean 1 over these."""
        total = len(self.parts["train"])
        if missing := [name for k, name in enumerate(self.names) if not self.counts[k]]:
            raise ValueError(f"data.classes: {missing[0]} has no scan in the training part of the split")
        return [total / (len(self.names) * self.counts[k]) for k in range(len(self.names))]

    def _score(self, model: nn.Module, method: Any, part: str) -> tuple[ClassScores, np.ndarray]:
        """Scores of a part of the split, and its probabilities `(N, K)`."""
        probabilities = predict_classes(model, self.crops(method, self.parts[part]))
        return score_classes(probabilities, self.truth(part), self.subjects(part)), probabilities


class Regression(WholeScans):
    """Regression of a column of numbers, like the age, from a prepared store and a table."""

    scores = ("mae", "mean_predictor_mae", "r2", "correlation")

    def __init__(self, config: Config) -> None:
        super().__init__(config, "table")
        self.column, values = self.read_values()
        train = [values[one["id"]] for one in self.all_parts["train"] if one["id"] in values]
        if len(set(train)) < 2:
            raise ValueError(
                f"{self.data.table or self.store.path}: the training scans have {len(set(train))} values of "
                f"{self.column}: a regression needs two or more"
            )
        self.mean, self.sd = float(np.mean(train)), float(np.std(train))
        self.set_values(values, mean=self.mean, sd=self.sd)

    def read_values(self) -> tuple[str, dict[str, float]]:
        """The name of the number, and that of each scan by id; a task of your own may read it elsewhere."""
        table, column = self.data.table, self.data.column
        if table is None or column is None:
            raise ValueError(
                "data.table and data.column have to be given with method=regress: a table with subject (or id), and "
                "its column of numbers, like age"
            )
        if column in RESERVED:
            raise ValueError(f"data.column={column}: predictions have a column of this name: rename yours")
        found = read_column(table, column, self.store.records)
        return column, {id: as_number(table, id, column, text) for id, text in found.items()}

    def target_metadata(self) -> dict[str, Any]:
        return {"number": {"column": self.column, "mean": self.mean, "sd": self.sd}}

    def begin(self, run: Path) -> None:
        self.init.write(run)
        without = [one["id"] for part in self.all_parts.values() for one in part if one["id"] not in self.values]
        if without:
            print(f"left out, without {self.column} in the table: {', '.join(sorted(without))}")
        print(
            f"regression of {self.column} ({self.mean:.4g}, SD {self.sd:.4g}) on "
            f"{counted(len(self.parts['train']), 'scan')}, in {run}"
        )

    def validated(self, method: Any) -> dict[str, float]:
        scores, _ = self._score(method.model, method, "validation")
        metrics = {name: getattr(scores, name) for name in self.scores}
        return {**metrics, "loss": scores.mae / self.sd}

    def test(self, run: Path, method: Any, model: nn.Module) -> None:
        scores, predicted = self._score(model, method, "test")
        if is_main():
            rows = self.rows("test", [repr(value) for value in self.truth("test").tolist()])
            table = numbers_csv(self.column, rows, predicted, self.mean)
            write_whole(run / "predictions_test.csv", table.encode())
            write_json(run / "scores_test.json", scores.as_json(self.column))
            print(f"test: {scores.text(self.column)}")

    @staticmethod
    def predict(config: Config) -> None:
        _predict(config, "a regression", NumberPredictor, NumberPredictor.number)

    @staticmethod
    def evaluate(config: Config) -> None:
        scores, column = evaluate_numbers(*tables_of(config, TABLE), config["column"])
        print(scores.text(column))

    def _score(self, model: nn.Module, method: Any, part: str) -> tuple[NumberScores, np.ndarray]:
        """Scores of a part of the split, and its predictions `(N,)`."""
        predicted = predict_numbers(model, self.crops(method, self.parts[part]))
        return score_numbers(predicted, self.truth(part), self.mean, self.subjects(part)), predicted


P = TypeVar("P", ClassPredictor, NumberPredictor)


def _predict(config: Config, result: str, make: type[P], read: Callable[[P, np.ndarray], Any]) -> None:
    """Predict scans with the checkpoint that is given; `read` takes the output for a prepared volume."""
    settings, checkpoint = typed(PredictSettings, config["predict"]), only_checkpoint(config, result)
    check_own(Path(str(config["out"])) / TABLE, "asa-predict", {"id", "subject", PREDICTED})
    network = make(checkpoint, settings, strip=config["strip"], plugins=config["plugins"])
    predict_scans(TablePredictor(network, partial(read, network), config), config)


class TablePredictor:
    """Collects the output for each scan, and adds it to `OUT/predictions.csv`.

    Args:
        network: of one of the tasks.
        predict: its prediction of a prepared volume `(C, D, H, W)`.
        config: of asa-predict.
    """

    def __init__(
        self, network: ClassPredictor | NumberPredictor, predict: Callable[[np.ndarray], Any], config: Config
    ) -> None:
        self.network, self.predict, self.preprocessor = network, predict, network.preprocessor
        self.table, self.source = Path(str(config["out"])) / TABLE, Path(str(config["input"]))
        self.rows: dict[str, dict[str, str]] = {}

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        self.rows[id] = {"id": id, "subject": "", **self.network.row(self.predict(image))}

    def finish(self) -> str:
        self.table.parent.mkdir(parents=True, exist_ok=True)
        add_rows(self.table, self.rows, source=self.source)
        return f"wrote {self.table}"
