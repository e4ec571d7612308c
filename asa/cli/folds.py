"""Cross-validation: a fine-tuning for each fold, and every scan scored by the run that did not see its subject."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from asa.cli.chain import call
from asa.cli.front import Config
from asa.data.splits import make_split, read_split, select
from asa.data.store import Store
from asa.training.checkpoint import find_weights
from asa.training.distributed import world_size


def wants_folds(config: Config) -> bool:
    """Whether all folds are asked for; the policy, which only they need, stays in the configuration then."""
    split = config["data"]["split"]
    if isinstance(split, dict) and split["fold"] == "all":
        return True
    config.pop("policy", None)  # no setting of a single run
    return False


def finetune_folds(config: Config, finetune: Callable[[Config], None]) -> None:
    """Fine-tune all folds in folders of their own, predict each fold's test part, and score all predictions together.

    Args:
        config: of asa-finetune, with data.split.fold=all.
        finetune: fine-tunes one of them.

    Raises:
        ValueError: no number of folds, settings that one run cannot have, or several processes.
    """
    out, runs = Path(str(config["out"])), _fold_configs(config)
    if config["plan"] is not None or config["transfer"] != "load":
        print(f"fold 0 of {len(runs)}:")
        finetune(runs[0])  # the others take the same
        return
    for number, run in enumerate(runs, start=1):
        print(f"fold {number} of {len(runs)}")
        finetune(run)
    folders = [out / f"fold{k}" for k in range(len(runs))]
    for folder in folders:
        _predict(folder, out / "predictions", config)
    store, policy = config["data"]["store"], config["policy"]
    call(
        "evaluate",
        {"predictions": out / "predictions", "truth": store, "policy": policy, "out": out / "evaluation"},
    )
    listed = ",".join(map(str, folders))
    print(f"new scans, by all of them: asa-predict checkpoint=[{listed}] input=SCANS out=PREDICTIONS")


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
    make_split(store.records, **data["split"] | {"fold": None if folds is None else 0})  # says what does not fit
    if folds is None:
        raise ValueError("data.split.fold=all needs the number of folds: add data.split.folds=5")
    runs = []
    for k in range(folds):
        run = deepcopy(config)
        del run["policy"]
        run["out"], run["data"]["split"]["fold"] = str(Path(str(config["out"])) / f"fold{k}"), k
        runs.append(run)
    return runs


def _predict(run: Path, out: Path, config: Config) -> None:
    """Predict the test part of a run, unless its label maps are there and newer than its weights."""
    store = Store(config["data"]["store"])
    ids = [record["id"] for record in select(store.records, read_split(run / "split.json")["test"])]
    trained = find_weights(run).stat().st_mtime
    maps = [out / f"{id}.nii.gz" for id in ids]
    if not all(path.exists() and path.stat().st_mtime >= trained for path in maps):
        wanted = {"checkpoint": run, "input": store.path, "part": "test", "out": out}
        call("predict", {"predict": config["predict"]}, wanted)
