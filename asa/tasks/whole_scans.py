"""Classification and regression: a class or a number of each whole volume, from a table.

Data: crops of a prepared store, and a table with the scans' classes, or a column of numbers. Loss: the method's
(weighted cross-entropy, or L1). Validation: loss, AUC, balanced accuracy and calibration, or mean absolute error, R2
and correlation, on the validation part; the test part is scored after training. A checkpoint holds the class names, or
the column with the training scans' mean and SD, and channels and preparation. Prediction: a table.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from asa.config import typed
from asa.data.io.files import write_json, write_whole
from asa.data.io.nifti import Volume
from asa.data.io.tables import RESERVED, as_number, read_column
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.evaluation.scans import ClassScores, NumberScores, score_classes, score_numbers
from asa.evaluation.tables import evaluate_classes, evaluate_numbers
from asa.inference.preprocessing import training_scan_metadata
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
from asa.methods.base import Batch
from asa.tasks.base import Config
from asa.tasks.evaluation import tables_of
from asa.tasks.prediction import Channels, only_checkpoint, predict_scans, refuse_healthy
from asa.tasks.volumes import Initialisation, Records, absolute, open_store, set_model, warn_of_padding
from asa.training.checkpoint import load_model
from asa.training.device import pick_device
from asa.training.distributed import is_main
from asa.training.loop import Validate, Validation
from asa.training.plan import volume_batch


class WholeScans(ABC):
    """What both tasks share: a value of each whole volume, from a prepared store and a table.

    Args:
        config: of asa-finetune.
        table: the key of `data` that names the table.
    """

    command = "finetune"
    units = ("volumes", "scans")
    cross_validates = False
    targets: dict[str, dict[str, float]]  # record id -> "target"
    parts: dict[str, Records]  # the scans that have a target

    def __init__(self, config: Config, table: str) -> None:
        self.config, self.augment = config, typed(AugmentSettings, config["augment"])
        absolute(config["data"], table)
        self.store, self.split, self.all_parts = open_store(config["data"], Path(str(config["out"])))
        self.init = Initialisation(config, self.store, self.split)

    def set_targets(self, values: Mapping[str, float], **model: Any) -> None:
        """Keep the scans that have a value, and enter what follows from the data into the model's configuration."""
        self.targets = {id: {"target": value} for id, value in values.items()}
        self.parts = {name: [one for one in part if one["id"] in values] for name, part in self.all_parts.items()}
        set_model(self.config, in_channels=len(self.store.channels), **model)
        warn_of_padding(self.config, self.parts["train"])

    def example(self, method: Any, count: int) -> Batch:
        return volume_batch(method, count, target=True)

    def load_init(self, method: Any) -> None:
        self.init.load_and_print(method.model)

    def explain_init(self, method: Any) -> str:
        raise ValueError("transfer=explain is for segmentation: leave it out with method=classify or regress")

    def dataset(self, method: Any) -> CropDataset:
        return self.crops(method, "train", crop=self.config["data"]["placement"], augment=self.augment)

    def validation(self, method: Any) -> Validate | None:
        if not self.parts["validation"]:
            return None

        def validate(step: int) -> Validation:
            return self.validated(method), {}

        return validate

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        if self.parts["test"]:
            trained = load_model(run, plugins=self.config["plugins"]).to(pick_device(self.config["train"]["device"]))
            self.test(run, method, trained)

    def metadata(self) -> dict[str, Any]:
        return {
            "channels": self.store.channels,
            **self.described_target(),
            "prepare": self.store.settings,
            **training_scan_metadata([], self.parts["train"]),
            **self.init.digests(self.parts["train"]),
        }

    @abstractmethod
    def described_target(self) -> dict[str, Any]:
        """What a checkpoint holds of the table."""

    @abstractmethod
    def validated(self, method: Any) -> dict[str, float]:
        """The validation part's loss and scores."""

    @abstractmethod
    def test(self, run: Path, method: Any, model: nn.Module) -> None:
        """Score the test part, and write its predictions and scores."""

    def crops(self, method: Any, part: str, **options: Any) -> CropDataset:
        size, seed = method.model.encoder.img_size, self.config["train"]["seed"]
        return CropDataset(
            self.store,
            self.parts[part],
            size,
            mirrored=method.mirrored,
            attached=self.targets,
            seed=seed,
            **options,
        )

    def truth(self, part: str) -> np.ndarray:
        """The targets of a part, `(N,)`."""
        return np.array([self.targets[record["id"]]["target"] for record in self.parts[part]])

    def subjects(self, part: str) -> list[str]:
        return [str(record["subject"]) for record in self.parts[part]]


class Classification(WholeScans):
    """Classification from a prepared store and a table."""

    def __init__(self, config: Config) -> None:
        if config["data"]["classes"] is None:
            raise ValueError(
                "data.classes has to be given with method=classify: a table with subject (or id) and class"
            )
        super().__init__(config, "classes")
        class_of = read_column(config["data"]["classes"], "class", self.store.records)
        self.names = sorted(set(class_of.values()))
        self.set_targets({id: self.names.index(name) for id, name in class_of.items()}, classes=len(self.names))
        self.counts = Counter(int(value) for value in self.truth("train"))
        if config["method"].get("weights") == "balanced":
            config["method"]["weights"] = self._balanced_weights()

    def described_target(self) -> dict[str, Any]:
        return {"classes": self.names}

    def begin(self, run: Path) -> None:
        self.init.write(run)
        counts = ", ".join(f"{count} {self.names[k]}" for k, count in sorted(self.counts.items()))
        print(f"classifying {len(self.parts['train'])} scans ({counts}), in {run}")

    def validated(self, method: Any) -> dict[str, float]:
        scores, probabilities = self._score(method.model, method, "validation")
        metrics = {name: getattr(scores, name) for name in ("auc", "balanced_accuracy", "ece")}
        return {**metrics, "loss": self._loss(method, probabilities)}

    def test(self, run: Path, method: Any, model: nn.Module) -> None:
        scores, probabilities = self._score(model, method, "test")
        if is_main():
            self._write_test(run, scores, probabilities)

    @staticmethod
    def predict(config: Config) -> None:
        refuse_healthy(config)
        checkpoint = only_checkpoint(config, "a classification")
        network = ClassPredictor(checkpoint, typed(PredictSettings, config["predict"]), **_raw(config))
        predict_scans(TablePredictor(network, network.probabilities, Path(str(config["out"]))), config)

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
        probabilities = predict_classes(model, self.crops(method, part))
        return score_classes(probabilities, self.truth(part), self.subjects(part)), probabilities

    def _loss(self, method: Any, probabilities: np.ndarray) -> float:
        """The method's loss of the validation part, from its probabilities `(N, K)`."""
        target = [int(self.targets[record["id"]]["target"]) for record in self.parts["validation"]]
        true = probabilities[np.arange(len(target)), target].clip(min=np.finfo(np.float32).tiny)
        return float((-np.log(true) * method.weights.cpu().numpy()[target]).mean())

    def _write_test(self, run: Path, scores: ClassScores, probabilities: np.ndarray) -> None:
        """The test part's probabilities as a table, its scores as JSON and as text."""
        records, names = self.parts["test"], self.names
        rows = [
            (record["id"], str(record["subject"]), names[int(self.targets[record["id"]]["target"])])
            for record in records
        ]
        write_whole(run / "predictions_test.csv", predictions_csv(names, rows, probabilities).encode())
        write_json(run / "scores_test.json", scores.as_json(names))
        print(f"test: {scores.text(names)}")


class Regression(WholeScans):
    """Regression of a column of numbers, like the age, from a prepared store and a table."""

    def __init__(self, config: Config) -> None:
        data = config["data"]
        if data["table"] is None or data["column"] is None:
            raise ValueError(
                "data.table and data.column have to be given with method=regress: a table with subject (or id), and "
                "its column of numbers, like age"
            )
        self.column = str(data["column"])
        if self.column in RESERVED:
            raise ValueError(f"data.column={self.column}: predictions have a column of this name: rename yours")
        super().__init__(config, "table")
        found = read_column(data["table"], self.column, self.store.records)
        values = {id: as_number(data["table"], id, self.column, text) for id, text in found.items()}
        train = [values[one["id"]] for one in self.all_parts["train"] if one["id"] in values]
        if len(set(train)) < 2:
            raise ValueError(
                f"{data['table']}: the training scans have {len(set(train))} values of {self.column}: a regression "
                "needs two or more"
            )
        self.mean, self.sd = float(np.mean(train)), float(np.std(train))
        self.set_targets(values, mean=self.mean, sd=self.sd)

    def described_target(self) -> dict[str, Any]:
        return {"number": {"column": self.column, "mean": self.mean, "sd": self.sd}}

    def begin(self, run: Path) -> None:
        self.init.write(run)
        without = [one["id"] for part in self.all_parts.values() for one in part if one["id"] not in self.targets]
        if without:
            print(f"left out, without {self.column} in the table: {', '.join(sorted(without))}")
        print(
            f"regression of {self.column} ({self.mean:.4g}, SD {self.sd:.4g}) on {len(self.parts['train'])} scans, "
            f"in {run}"
        )

    def validated(self, method: Any) -> dict[str, float]:
        scores, _ = self._score(method.model, method, "validation")
        metrics = {"mae": scores.mae, "mean_predictor_mae": scores.mean_predictor_mae, "r2": scores.r2}
        return {**metrics, "correlation": scores.correlation, "loss": scores.mae / self.sd}

    def test(self, run: Path, method: Any, model: nn.Module) -> None:
        scores, predicted = self._score(model, method, "test")
        if is_main():
            rows = [
                (record["id"], str(record["subject"]), repr(self.targets[record["id"]]["target"]))
                for record in self.parts["test"]
            ]
            table = numbers_csv(self.column, rows, predicted, self.mean)
            write_whole(run / "predictions_test.csv", table.encode())
            write_json(run / "scores_test.json", scores.as_json(self.column))
            print(f"test: {scores.text(self.column)}")

    @staticmethod
    def predict(config: Config) -> None:
        refuse_healthy(config)
        checkpoint = only_checkpoint(config, "a regression")
        network = NumberPredictor(checkpoint, typed(PredictSettings, config["predict"]), **_raw(config))
        predict_scans(TablePredictor(network, network.number, Path(str(config["out"]))), config)

    @staticmethod
    def evaluate(config: Config) -> None:
        scores, column = evaluate_numbers(*tables_of(config, TABLE), config["column"])
        print(scores.text(column))

    def _score(self, model: nn.Module, method: Any, part: str) -> tuple[NumberScores, np.ndarray]:
        """Scores of a part of the split, and its predictions `(N,)`."""
        predicted = predict_numbers(model, self.crops(method, part))
        return score_numbers(predicted, self.truth(part), self.mean, self.subjects(part)), predicted


def _raw(config: Config) -> dict[str, Any]:
    """How raw scans are prepared, and where networks may come from."""
    return {"strip": config["strip"], "plugins": config["plugins"]}


class TablePredictor:
    """Collects what a network says of each scan, and writes it to `OUT/predictions.csv`.

    Args:
        network: of one of the tasks.
        predict: its prediction of a prepared volume `(C, D, H, W)`.
        out: the folder.
    """

    def __init__(
        self, network: ClassPredictor | NumberPredictor, predict: Callable[[np.ndarray], Any], out: Path
    ) -> None:
        self.network, self.predict, self.table = network, predict, out / TABLE
        self.preprocessor = network.preprocessor
        self.ids: list[str] = []
        self.found: list[Any] = []

    def predict_file(self, id: str, images: Channels) -> None:
        self._add(id, self.preprocessor.prepare(images)[0].image)

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        self._add(id, image)

    def finish(self) -> str:
        rows = [(id, "", "") for id in self.ids]
        write_whole(self.table, self.network.table(rows, np.array(self.found)).encode())
        return f"wrote {self.table}"

    def _add(self, id: str, image: np.ndarray) -> None:
        self.found.append(self.predict(image))
        self.ids.append(id)
