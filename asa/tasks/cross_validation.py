"""Cross-validation: a fine-tuning for each fold, and every scan scored by the run that did not train on its subject."""

from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from asa.data.io.files import read_json, sha256_of, write_json
from asa.data.io.lock import locked
from asa.data.splits import make_split, read_split, select
from asa.data.store import Store
from asa.tasks.base import Config
from asa.tasks.run import configure, evaluate_task, predict_task, train_task
from asa.training.checkpoint import find_weights
from asa.training.distributed import world_size

PREDICTED = "predicted.json"  # of a fold: SHA-256 of its weights and of the label maps that they predicted


def cross_validate(config: Config, policy: str) -> Path | None:
    """Fine-tune all folds in folders of their own, predict each fold's test part, and score all predictions together.

    Args:
        config: of asa-finetune, with data.split.fold=all.
        policy: of the evaluation.

    Returns:
        The folder that holds the folds' runs; None where nothing was to be trained.

    Raises:
        ValueError: no number of folds, settings that one run cannot have, or several processes.
    """
    out, folds = Path(str(config["out"])), _fold_configs(config)
    if config["plan"] is not None or config["transfer"] != "load":
        print(f"fold 0 of {len(folds)}:")
        train_task(folds[0], "finetune")  # the others take the same
        return None
    folders = [out / f"fold{k}" for k in range(len(folds))]
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for number, fold in enumerate(folds, start=1):
            print(f"fold {number} of {len(folds)}")
            train_task(fold, "finetune")
        for folder in folders:
            _predict(folder, out / "predictions", config)
        scored = {"predictions": out / "predictions", "truth": config["data"]["store"], "policy": policy}
        evaluate_task(configure("evaluate", scored, {"out": out / "evaluation"}))
    listed = ",".join(map(str, folders))
    print(f"new scans, by all of them: asa-predict checkpoint=[{listed}] input=SCANS out=PREDICTIONS")
    return out


def _fold_configs(config: Config) -> list[Config]:
    """The configuration of each fold's run."""
    data = config["data"]
    if world_size() > 1:
        raise ValueError(
            "data.split.fold=all runs in one process: under torchrun give each fold by itself (data.split.fold=0 "
            f"out={config['out']}/fold0, ...), then this command without torchrun, which scores them"
        )
    if data["split_file"] is not None:
        raise ValueError("data.split.fold=all makes the split of each fold: leave out data.split_file")
    store = Store(data["store"])
    folds = data["split"]["folds"]
    make_split(store.records, **data["split"] | {"fold": None if folds is None else 0})  # names what does not fit
    if folds is None:
        raise ValueError("data.split.fold=all needs the number of folds: add data.split.folds=5")
    configs = []
    for k in range(folds):
        fold = deepcopy(config)
        fold["out"], fold["data"]["split"]["fold"] = str(Path(str(config["out"])) / f"fold{k}"), k
        configs.append(fold)
    return configs


def _predict(run: Path, out: Path, config: Config) -> None:
    """Predict the test part of a run, unless its label maps are there, unchanged, and of these weights and settings."""
    store, record = Store(config["data"]["store"]), run / PREDICTED
    ids = [scan["id"] for scan in select(store.records, read_split(run / "split.json")["test"])]

    def state() -> dict[str, Any]:
        maps = {id: sha256_of(out / f"{id}.nii.gz") for id in ids}
        return {"weights": sha256_of(find_weights(run)), "predict": config["predict"], "maps": maps}

    with suppress(FileNotFoundError, ValueError):  # not predicted yet, or a record that cannot be read
        if read_json(record) == state():
            return
    scans = {"checkpoint": run, "input": store.path, "part": "test", "out": out, "plugins": config["plugins"]}
    predict_task(configure("predict", {"predict": config["predict"]}, scans))
    write_json(record, state())
