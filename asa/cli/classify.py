"""asa-finetune method=classify: learn classes of whole volumes from a table."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from asa.cli.cohort import Records, open_parts
from asa.cli.front import Config
from asa.cli.job import Job
from asa.cli.start import start
from asa.config import typed
from asa.data.io.files import write_json, write_whole
from asa.data.io.tables import read_column
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.evaluation.classification import ClassScores, class_table, predict_classes, score_classes
from asa.inference.preprocessing import learnt_from
from asa.training.checkpoint import find_weights, load_model
from asa.training.device import pick_device
from asa.training.distributed import is_main
from asa.training.pretrained import read_source


def classify(config: Config) -> None:
    """Fine-tune a classifier, and score the test part of the split.

    Raises:
        ValueError: no table, no class in a part of the split, or a pretrained encoder that does not match.
    """
    job, augment = Job(config), typed(AugmentSettings, config["augment"])
    if config.pop("transfer") == "explain":
        raise ValueError("transfer=explain is of segmentation: leave it out with method=classify")
    data = config["data"]
    if data["classes"] is None:
        raise ValueError("data.classes has to be given with method=classify: a table with subject (or id) and class")
    data["classes"] = str(Path(str(data["classes"])).resolve())  # the run goes on from any directory
    store, split, parts = open_parts(data, Path(str(config["out"])))
    task = _task(data["classes"], store.records, parts)
    config["method"]["weights"] = task.weights(config["method"]["weights"])
    for node in (config["model"], config["method"]["model"]):
        node["in_channels"], node["classes"] = len(store.channels), len(task.names)
    method = job.method(len(task.parts["train"]), labelled=False)
    if method is None:
        return
    opened = read_source(config["init"]) if config["init"] else None
    trained, seen = start(config, opened, method.model, task.parts["train"], store, split)

    def crops(records: Records, **options: Any) -> CropDataset:
        common: dict[str, Any] = dict(mirrored=method.mirrored, attached=task.targets, seed=job.settings.seed)
        return CropDataset(store, records, method.model.encoder.img_size, **common, **options)

    def scored(model: nn.Module, records: Records) -> tuple[ClassScores, np.ndarray]:
        shares = predict_classes(model, crops(records))
        truth = np.array([task.targets[record["id"]]["target"] for record in records])
        return score_classes(shares, truth, [str(record["subject"]) for record in records]), shares

    def validate(step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        scores = scored(method.model, task.parts["validation"])[0]
        return {name: getattr(scores, name) for name in ("auc", "balanced_accuracy", "ece")}, {}

    known = {"channels": store.channels, "classes": task.names, "prepare": store.settings}
    known |= {**learnt_from([], task.parts["train"]), **(trained or {})}
    with job.run(split, seen) as run:
        counts = ", ".join(f"{count} {task.names[k]}" for k, count in sorted(task.counts().items()))
        print(f"classifying {len(task.parts['train'])} scans ({counts}), in {run}")
        dataset = crops(task.parts["train"], crop=data["placement"], augment=augment)
        job.train(run, method, dataset, known, validate if task.parts["validation"] else None)
        if task.parts["test"]:
            scores, shares = scored(load_model(run).to(pick_device(job.settings.device)), task.parts["test"])
            if is_main():
                _write(run, task, shares, scores)
    print(f"wrote {find_weights(run)}")


@dataclass(frozen=True)
class Task:
    """What is to be told apart.

    Args:
        names: of the classes, sorted.
        targets: the class index of each scan that has one, as it goes into batches.
        parts: records of each part of the split, without those that have no class.
    """

    names: list[str]
    targets: dict[str, dict[str, float]]
    parts: dict[str, Records]

    def counts(self) -> Counter[int]:
        """Training scans of each class."""
        return Counter(int(self.targets[record["id"]]["target"]) for record in self.parts["train"])

    def weights(self, chosen: Any) -> Any:
        """The classes' weights; balanced ones have the mean 1 over the training scans."""
        if chosen != "balanced":
            return chosen
        counts, total = self.counts(), len(self.parts["train"])
        if missing := [name for k, name in enumerate(self.names) if not counts[k]]:
            raise ValueError(f"data.classes: {missing[0]} has no scan in the training part of the split")
        return [total / (len(self.names) * counts[k]) for k in range(len(self.names))]


def _task(table: str, records: Records, parts: Mapping[str, Records]) -> Task:
    said = read_column(table, "class", records)
    names = sorted(set(said.values()))
    targets: dict[str, dict[str, float]] = {id: {"target": names.index(name)} for id, name in said.items()}
    return Task(names, targets, {name: [one for one in part if one["id"] in said] for name, part in parts.items()})


def _write(run: Path, task: Task, shares: np.ndarray, scores: ClassScores) -> None:
    """The test part's probabilities as a table, its scores as JSON and in words."""
    names, records = task.names, task.parts["test"]
    classes = [names[int(task.targets[record["id"]]["target"])] for record in records]
    rows = [(record["id"], str(record["subject"]), name) for record, name in zip(records, classes, strict=True)]
    write_whole(run / "predictions_test.csv", class_table(names, rows, shares).encode())
    write_json(run / "scores_test.json", {"classes": list(names), **asdict(scores)})
    print(
        f"test: AUC {scores.auc:.3f} ({scores.auc_low:.3f} to {scores.auc_high:.3f}), balanced accuracy "
        f"{scores.balanced_accuracy:.3f}, ECE {scores.ece:.3f}, {scores.scans} scans of {scores.subjects} subjects"
    )
    for name, row in zip(names, scores.confusion, strict=True):
        print(f"  {name}: {', '.join(f'{count} as {other}' for count, other in zip(row, names, strict=True) if count)}")
