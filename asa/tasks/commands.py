"""The commands as functions: prepare, pretrain, finetune, predict, evaluate.

Keyword arguments are the commands' keys, nested or dotted: `finetune("stores/ibsr", "runs/ibsr", experiment="ibsr",
train={"steps": 5000}, **{"optim.lr": 1e-3})`. `asa-finetune --help` lists them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asa.data.io.files import read_json
from asa.tasks.base import Config, task_of_method
from asa.tasks.cross_validation import cross_validate
from asa.tasks.preparation import prepare_task
from asa.tasks.run import configure, evaluate_task, predict_task, train_task


def prepare(out: str | Path, **settings: Any) -> Path:
    """Prepare raw scans into a store, as asa-prepare does; scans that are prepared already are not done again.

    Args:
        out: folder of the store.
        settings: keys of asa-prepare, like `data="bids", **{"data.root": FOLDER}`.

    Returns:
        `out`.

    Raises:
        ValueError: settings that do not fit, or scans that failed; the others are prepared.
    """
    prepare_task(configure("prepare", settings, {"out": str(out)}))
    return Path(out)


def pretrain(
    store: str | Path, out: str | Path, *, config_dir: str | Path | None = None, **settings: Any
) -> Path | None:
    """Pretrain an encoder on unlabelled scans, as asa-pretrain does; a run that was stopped is resumed.

    Args:
        store: folder made by asa-prepare.
        out: run folder.
        config_dir: a folder of your own experiments.
        settings: keys of asa-pretrain.

    Returns:
        The run folder; None for `plan="only"`.

    Raises:
        ValueError: settings or data that do not fit.
        Stopped: by SIGTERM or SIGUSR1, after saving.
    """
    required = {"data.store": str(store), "out": str(out)}
    return pretrain_task(configure("pretrain", settings, required, config_dir=config_dir))


def finetune(
    store: str | Path | None, out: str | Path, *, config_dir: str | Path | None = None, **settings: Any
) -> Path | None:
    """Fine-tune a network on labelled scans, as asa-finetune does; a run that was stopped is resumed.

    Args:
        store: folder made by asa-prepare; None for restoration, which takes `data={"root": FOLDER}`.
        out: run folder.
        config_dir: a folder of your own experiments.
        settings: keys of asa-finetune.

    Returns:
        The run folder; None for `plan="only"` and `transfer="explain"`.

    Raises:
        ValueError: settings or data that do not fit.
        Stopped: by SIGTERM or SIGUSR1, after saving.
    """
    required = {"out": str(out)} if store is None else {"data.store": str(store), "out": str(out)}
    return finetune_task(configure("finetune", settings, required, config_dir=config_dir))


def predict(checkpoint: str | Path | Sequence[str | Path], input: str | Path, out: str | Path, **settings: Any) -> Path:
    """Predict scans with a trained network, as asa-predict does.

    Args:
        checkpoint: a run, a checkpoint or a weights file; several are averaged.
        input: a scan, a folder of scans, or a store.
        out: folder for the results.
        settings: keys of asa-predict.

    Returns:
        `out`.

    Raises:
        FileNotFoundError, ValueError: no such input or checkpoint, or scans that failed.
    """
    paths = str(checkpoint) if isinstance(checkpoint, str | Path) else [str(path) for path in checkpoint]
    predict_task(configure("predict", settings, {"checkpoint": paths, "input": str(input), "out": str(out)}))
    return Path(out)


def evaluate(predictions: str | Path, truth: str | Path, out: str | Path, **settings: Any) -> dict[str, Any]:
    """Score predictions against the truth under a policy, as asa-evaluate does.

    Args:
        predictions: folder of label maps (or restored images).
        truth: a store, or a folder of label maps (or clean images).
        out: folder for cases.csv, summary.json and report.html.
        settings: keys of asa-evaluate.

    Returns:
        The content of summary.json.

    Raises:
        FileNotFoundError, ValueError: no such folder, or cases that cannot be evaluated.
    """
    required = {"predictions": str(predictions), "truth": str(truth), "out": str(out)}
    evaluate_task(configure("evaluate", settings, required))
    summary: dict[str, Any] = read_json(Path(out) / "summary.json")
    return summary


def pretrain_task(config: Config) -> Path | None:
    """Pretrain an encoder."""
    return train_task(config, "pretrain")


def finetune_task(config: Config) -> Path | None:
    """Fine-tune one network, or with data.split.fold=all one for each fold, which are then scored together."""
    split, policy = config["data"]["split"], config.pop("policy")  # no setting of a single run
    if not (isinstance(split, dict) and split["fold"] == "all"):
        return train_task(config, "finetune")
    name, task = task_of_method(config, "finetune")
    if not task.cross_validates:
        raise ValueError(f"data.split.fold=all is not for {name}: give data.split.fold=0, then 1, ...")
    return cross_validate(config, policy)
