"""Classification: classes of whole volumes, from a table.

Data: crops of a prepared store, and a table of the scans' classes. Loss: the method's (weighted cross-entropy).
Validation: loss, AUC, balanced accuracy and calibration on the validation part; the test part is scored after training.
A checkpoint holds the class names, channels and preparation. Prediction: a table of class probabilities.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from asa.config import typed
from asa.data.io.files import write_whole
from asa.data.io.nifti import Volume
from asa.data.io.tables import read_column
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.evaluation.classification import ClassScores, score_classes
from asa.inference.classification import TABLE, ClassPredictor, predict_classes, predictions_csv
from asa.inference.preprocessing import training_scan_metadata
from asa.inference.segmentation import PredictSettings
from asa.methods.base import Batch
from asa.tasks.base import Config
from asa.tasks.prediction import Channels, only_checkpoint, predict_scans, refuse_healthy
from asa.tasks.table_evaluation import described, evaluate_classes, tables_of, write_scores
from asa.tasks.volumes import Initialisation, absolute, open_store, set_model, warn_of_padding
from asa.training.checkpoint import load_model
from asa.training.device import pick_device
from asa.training.distributed import is_main
from asa.training.loop import Validate, Validation
from asa.training.plan import volume_batch


class Classification:
    """Classification from a prepared store and a table."""

    command = "finetune"
    units = ("volumes", "scans")
    cross_validates = False

    def __init__(self, config: Config) -> None:
        self.config, self.augment = config, typed(AugmentSettings, config["augment"])
        data = config["data"]
        if data["classes"] is None:
            raise ValueError(
                "data.classes has to be given with method=classify: a table with subject (or id) and class"
            )
        absolute(data, "classes")
        self.store, self.split, parts = open_store(data, Path(str(config["out"])))
        self.init = Initialisation(config, self.store, self.split)
        class_of = read_column(data["classes"], "class", self.store.records)
        self.names = sorted(set(class_of.values()))
        self.targets: dict[str, dict[str, float]] = {
            id: {"target": self.names.index(name)} for id, name in class_of.items()
        }
        self.parts = {name: [one for one in part if one["id"] in class_of] for name, part in parts.items()}
        self.counts = Counter(int(self.targets[record["id"]]["target"]) for record in self.parts["train"])
        if config["method"].get("weights") == "balanced":
            config["method"]["weights"] = self._balanced_weights()
        set_model(config, in_channels=len(self.store.channels), classes=len(self.names))
        warn_of_padding(config, self.parts["train"])

    def example(self, method: Any, count: int) -> Batch:
        return volume_batch(method, count, target=True)

    def load_init(self, method: Any) -> None:
        self.init.load_and_print(method.model)

    def explain_init(self, method: Any) -> str:
        raise ValueError("transfer=explain is for segmentation: leave it out with method=classify")

    def dataset(self, method: Any) -> CropDataset:
        return self._crops(method, "train", crop=self.config["data"]["placement"], augment=self.augment)

    def validation(self, method: Any) -> Validate | None:
        if not self.parts["validation"]:
            return None

        def validate(step: int) -> Validation:
            scores, probabilities = self._score(method.model, method, "validation")
            metrics = {name: getattr(scores, name) for name in ("auc", "balanced_accuracy", "ece")}
            return {**metrics, "loss": self._loss(method, probabilities)}, {}

        return validate

    def metadata(self) -> dict[str, Any]:
        return {
            "channels": self.store.channels,
            "classes": self.names,
            "prepare": self.store.settings,
            **training_scan_metadata([], self.parts["train"]),
            **self.init.digests(self.parts["train"]),
        }

    def begin(self, run: Path) -> None:
        self.init.write(run)
        counts = ", ".join(f"{count} {self.names[k]}" for k, count in sorted(self.counts.items()))
        print(f"classifying {len(self.parts['train'])} scans ({counts}), in {run}")

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        if self.parts["test"]:
            trained = load_model(run, plugins=self.config["plugins"]).to(pick_device(self.config["train"]["device"]))
            scores, probabilities = self._score(trained, method, "test")
            if is_main():
                self._write_test(run, scores, probabilities)

    @staticmethod
    def predict(config: Config) -> None:
        refuse_healthy(config)
        predict_scans(ClassificationPredictor(config), config)

    @staticmethod
    def evaluate(config: Config) -> None:
        print(described(*evaluate_classes(*tables_of(config))))

    def _balanced_weights(self) -> list[float]:
        """Weights of the classes inverse to their number of training scans, with mean 1 over these."""
        total = len(self.parts["train"])
        if missing := [name for k, name in enumerate(self.names) if not self.counts[k]]:
            raise ValueError(f"data.classes: {missing[0]} has no scan in the training part of the split")
        return [total / (len(self.names) * self.counts[k]) for k in range(len(self.names))]

    def _crops(self, method: Any, part: str, **options: Any) -> CropDataset:
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

    def _score(self, model: nn.Module, method: Any, part: str) -> tuple[ClassScores, np.ndarray]:
        """Scores of a part of the split, and its probabilities `(N, K)`."""
        records = self.parts[part]
        probabilities = predict_classes(model, self._crops(method, part))
        truth = np.array([self.targets[record["id"]]["target"] for record in records])
        return score_classes(probabilities, truth, [str(record["subject"]) for record in records]), probabilities

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
        write_scores(run / "scores_test.json", scores, names)
        print(f"test: {described(scores, names)}")


class ClassificationPredictor:
    """Collects the class probabilities of each scan, and writes them to `OUT/predictions.csv`.

    Args:
        config: of asa-predict.
    """

    def __init__(self, config: Config) -> None:
        checkpoint = only_checkpoint(config, "a classification")
        settings = typed(PredictSettings, config["predict"])
        self.table = Path(str(config["out"])) / TABLE
        self.network = ClassPredictor(checkpoint, settings, strip=config["strip"], plugins=config["plugins"])
        self.preprocessor = self.network.preprocessor
        self.ids: list[str] = []
        self.probabilities: list[np.ndarray] = []

    def predict_file(self, id: str, images: Channels) -> None:
        self._add(id, self.preprocessor.prepare(images)[0].image)

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        self._add(id, image)

    def finish(self) -> str:
        rows = [(id, "", "") for id in self.ids]
        write_whole(self.table, predictions_csv(self.network.classes, rows, np.array(self.probabilities)).encode())
        return f"wrote {self.table}"

    def _add(self, id: str, image: np.ndarray) -> None:
        self.probabilities.append(self.network.probabilities(image))
        self.ids.append(id)
