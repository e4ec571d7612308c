"""Classification and regression: a class or a number of each whole volume, from a table.

Data: crops of a prepared store, and a table with the scans' classes, or a column of numbers. Loss: the method's
(weighted cross-entropy, or L1). Validation: loss, AUC, balanced accuracy and calibration, or mean absolute error, R2
and correlation, on the validation part; the test part is scored after training. A checkpoint holds the class names, or
the column with the training scans' mean and SD, and channels and preparation. Prediction: a table.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from asa.config import typed
from asa.data.io.files import write_json, write_whole
from asa.data.io.nifti import Volume
from asa.data.io.tables import NETWORK, PREDICTED, RESERVED, as_number, check_own, read_column, short
from asa.data.store import Store
from asa.errors import counted, listed
from asa.evaluation.scans import ClassScores, NumberScores, score_classes, score_numbers, weighted_cross_entropy
from asa.evaluation.tables import evaluate_classes, evaluate_numbers
from asa.inference.whole_scans import (
    TABLE,
    VolumePredictor,
    class_cells,
    number_cells,
    predict_volumes,
    predictions_csv,
)
from asa.settings import Config, PredictSettings
from asa.tasks.evaluation import tables_of
from asa.tasks.prediction import add_rows, only_checkpoint, predict_scans
from asa.tasks.volumes import VolumeTask
from asa.training.checkpoint import load_model
from asa.training.device import pick_device
from asa.training.distributed import is_main
from asa.training.loop import Validate, Validation


class WholeScans(VolumeTask, ABC):
    """What both tasks share: a value of each whole volume, from a prepared store and a table that `data` names."""

    command = "finetune"
    targets = ("target",)
    scores: tuple[str, ...]  # of the validation, beside the loss
    target_names: Any  # of the classes in their order, or the name of the number

    def usable(self, store: Store) -> Collection[str]:
        self.store = store
        self.target_names, values = self.read_values()
        self.attached = {id: {"target": value} for id, value in values.items()}
        return values

    @abstractmethod
    def read_values(self) -> tuple[Any, dict[str, float]]:
        """`target_names`, and the value of each scan by id; a task of your own may read it elsewhere."""

    def begin(self, run: Path) -> None:
        self.init.write(run)
        if without := sorted(one["id"] for one in self.store.records if one["id"] not in self.attached):
            value = self.target_names if isinstance(self.target_names, str) else "a class"
            print(f"left out, without {value} in the table: {listed(without)}")

    def metrics(self, make: Any) -> list[str]:
        return [*self.scores, "loss"]

    def validation(self, method: Any) -> Validate | None:
        if not self.parts["validation"]:
            return None

        def validate(step: int) -> Validation:
            scores, predicted = self.score(method.model, method, "validation")
            found = {name: getattr(scores, name) for name in self.scores}
            return {**found, "loss": self.loss(method, scores, predicted)}, {}

        return validate

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        if not self.parts["test"]:
            return
        model = load_model(run, plugins=self.config["plugins"]).to(pick_device(self.train.device))
        scores, predicted = self.score(model, method, "test")
        if is_main():
            write_whole(run / "predictions_test.csv", self.table(predicted).encode())
            write_json(run / "scores_test.json", scores.as_json(self.target_names))
            print(f"test: {scores.text(self.target_names)}")

    @abstractmethod
    def score(self, model: nn.Module, method: Any, part: str) -> tuple[Any, np.ndarray]:
        """Scores of a part of the split, and its predictions: probabilities `(N, K)`, or numbers `(N,)`."""

    @abstractmethod
    def loss(self, method: Any, scores: Any, predicted: np.ndarray) -> float:
        """The validation part's loss."""

    @abstractmethod
    def table(self, predicted: np.ndarray) -> str:
        """The test part's predictions as CSV."""

    def truth(self, part: str) -> np.ndarray:
        """The targets `(N,)` of a part."""
        return np.array([self.attached[record["id"]]["target"] for record in self.parts[part]])

    def subjects(self, part: str) -> list[str]:
        return [str(record["subject"]) for record in self.parts[part]]

    def test_rows(self, text: Callable[[float], str]) -> list[tuple[str, str, str]]:
        """Id, subject and true value, as text, of the test part's scans, for a table of predictions."""
        ids = [str(record["id"]) for record in self.parts["test"]]
        return list(zip(ids, self.subjects("test"), map(text, self.truth("test").tolist()), strict=True))


class Classification(WholeScans):
    """Classification from a prepared store and a table."""

    scores = ("auc", "balanced_accuracy", "ece")

    def __init__(self, config: Config) -> None:
        super().__init__(config, "classes")
        self.set_model(classes=len(self.target_names))
        self.counts = Counter(int(value) for value in self.truth("train"))
        if config["method"].get("weights") == "balanced":
            config["method"]["weights"] = self._balanced_weights()

    def read_values(self) -> tuple[list[str], dict[str, float]]:
        if self.data.classes is None:
            raise ValueError("data.classes has to be given with method=classify: a table of subject (or id) and class")
        class_of = read_column(self.data.classes, "class", self.store.records)
        names = sorted(set(class_of.values()))
        return names, {id: names.index(name) for id, name in class_of.items()}

    def target_metadata(self) -> dict[str, Any]:
        return {"classes": self.target_names}

    def begin(self, run: Path) -> None:
        super().begin(run)
        counts = ", ".join(f"{count} {self.target_names[k]}" for k, count in sorted(self.counts.items()))
        print(f"classifying {counted(len(self.parts['train']), 'scan')} ({counts}), in {run}")

    def score(self, model: nn.Module, method: Any, part: str) -> tuple[ClassScores, np.ndarray]:
        probabilities = predict_volumes(model, self.crops(method, self.parts[part]))
        return score_classes(probabilities, self.truth(part), self.subjects(part)), probabilities

    def loss(self, method: Any, scores: ClassScores, predicted: np.ndarray) -> float:
        return weighted_cross_entropy(predicted, self.truth("validation"), method.weights.cpu().numpy())

    def table(self, predicted: np.ndarray) -> str:
        rows = self.test_rows(lambda value: str(self.target_names[int(value)]))
        return predictions_csv("class", rows, [class_cells(self.target_names, one) for one in predicted])

    @staticmethod
    def predict(config: Config) -> None:
        predict_scans(TablePredictor("classes", "a classification", config), config)

    @staticmethod
    def evaluate(config: Config) -> None:
        scores, names, notes = evaluate_classes(*tables_of(config, TABLE))
        print(scores.text(names), *notes, f"wrote summary.json and scans.csv to {config['out']}", sep="\n")

    def _balanced_weights(self) -> list[float]:
        """Weights of the classes inverse to their number of training scans, with mean 1 over these."""
        total = len(self.parts["train"])
        if missing := [name for k, name in enumerate(self.target_names) if not self.counts[k]]:
            raise ValueError(f"data.classes: {missing[0]} has no scan in the training part of the split")
        return [total / (len(self.target_names) * self.counts[k]) for k in range(len(self.target_names))]


class Regression(WholeScans):
    """Regression of a column of numbers, like the age, from a prepared store and a table."""

    scores = ("mae", "mean_predictor_mae", "r2", "correlation")

    def __init__(self, config: Config) -> None:
        super().__init__(config, "table")
        train = self.truth("train").tolist()
        if len(set(train)) < 2:
            found = f"the training scans have {len(set(train))} values of {self.target_names}"
            raise ValueError(f"{self.data.table or self.store.path}: {found}: a regression needs two or more")
        self.mean, self.sd = float(np.mean(train)), float(np.std(train))
        self.set_model(mean=self.mean, sd=self.sd)

    def read_values(self) -> tuple[str, dict[str, float]]:
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
        return {"number": {"column": self.target_names, "mean": self.mean, "sd": self.sd}}

    def begin(self, run: Path) -> None:
        super().begin(run)
        scans = counted(len(self.parts["train"]), "scan")
        print(f"regression of {self.target_names} ({self.mean:.4g}, SD {self.sd:.4g}) on {scans}, in {run}")

    def score(self, model: nn.Module, method: Any, part: str) -> tuple[NumberScores, np.ndarray]:
        predicted = predict_volumes(model, self.crops(method, self.parts[part]))
        return score_numbers(predicted, self.truth(part), self.mean, self.subjects(part)), predicted

    def loss(self, method: Any, scores: NumberScores, predicted: np.ndarray) -> float:
        return scores.mae / self.sd

    def table(self, predicted: np.ndarray) -> str:
        rows = self.test_rows(repr)
        return predictions_csv(self.target_names, rows, [number_cells(one, self.mean) for one in predicted])

    @staticmethod
    def predict(config: Config) -> None:
        predict_scans(TablePredictor("number", "a regression", config), config)

    @staticmethod
    def evaluate(config: Config) -> None:
        scores, column, notes = evaluate_numbers(*tables_of(config, TABLE), config["column"])
        print(scores.text(column), *notes, f"wrote summary.json to {config['out']}", sep="\n")


class TablePredictor:
    """Adds what a network predicts for each prepared volume `(C, D, H, W)` to `OUT/predictions.csv`."""

    def __init__(self, target: str, result: str, config: Config) -> None:
        self.table, self.source = Path(str(config["out"])) / TABLE, Path(str(config["input"]))
        checkpoint = only_checkpoint(config, result)
        check_own(self.table, "asa-predict", {"id", "subject", PREDICTED})
        settings = typed(PredictSettings, config["predict"])
        self.network = VolumePredictor(checkpoint, target, settings, strip=config["strip"], plugins=config["plugins"])
        self.preprocessor = self.network.preprocessor

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> dict[str, str]:
        return {"id": id, "subject": "", **self.network.row(image), NETWORK: short(self.network.digest)}

    def finish(self, found: Mapping[str, dict[str, str]]) -> str:
        self.table.parent.mkdir(parents=True, exist_ok=True)
        add_rows(self.table, found, source=self.source)
        return f"wrote {self.table}"
