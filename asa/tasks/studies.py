"""Several trainings that answer one question: the folds of a cross-validation, and the arms of an ablation.

Cross-validation: a fine-tuning for each fold, and every scan scored by the run that did not train on its subject.
Ablation: arms x labelled subjects x seeds, trained and scored on the same held-out subjects.
"""

import re
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asa.config import flatten
from asa.data.io.files import open_unlinked, read_json, read_yaml, sha256_of, write_json, write_whole
from asa.data.io.lock import LOCK, locked
from asa.data.splits import keep_labelled, make_split, read_split, select, write_split
from asa.data.store import Store
from asa.errors import listed, one_line, reason_of
from asa.evaluation.comparison import Run, read_class_run, read_run
from asa.evaluation.policies import CLASSIFICATION
from asa.reporting.ablation import Trial, labelled_text, trial_line, write_ablation
from asa.reporting.pages import require_report_extra
from asa.settings import Config
from asa.tasks.checks import chosen_arms
from asa.tasks.run import call, task_of_method, train_task
from asa.training.checkpoint_files import find_weights
from asa.training.distributed import world_size
from asa.training.process import Stopped

FOLD_RECORD = "predicted.json"  # of a fold: SHA-256 of its weights and of the label maps that they predicted
COMMANDS = ("prepare", "pretrain", "finetune", "predict")  # whose settings an ablation can be given
# Settings that may change when an ablation is continued: they add runs to the existing ones.
FREE = ("only", "labelled", "seeds", "config_dir")


def finetune_task(config: Config) -> Path | None:
    """Fine-tune one network, or with data.split.fold=all one for each fold, which are then scored together."""
    split, policy = config["data"]["split"], config.pop("policy")  # no setting of a single run
    if not (isinstance(split, dict) and split["fold"] == "all"):
        return train_task(config, "finetune")
    name, task = task_of_method(config, "finetune")
    if not task.cross_validates:
        raise ValueError(f"data.split.fold=all is not for {name}: give data.split.fold=0, then 1, ...")
    return cross_validate(config, policy)


def cross_validate(config: Config, policy: str) -> Path | None:
    """Fine-tune all folds in folders of their own, predict each fold's test part, and score all predictions together.

    Returns the folder that holds the folds' runs; None where nothing was to be trained.
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
            _predict_fold(folder, out / "predictions", config)
        truth = {"truth": config["data"]["store"], "policy": policy}
        call("evaluate", {"predictions": out / "predictions", "out": out / "evaluation"}, truth)
    runs = ",".join(map(str, folders))
    print(f"new scans, by all of them: asa-predict checkpoint=[{runs}] input=SCANS out=PREDICTIONS")
    return out


def _fold_configs(config: Config) -> list[Config]:
    """The configuration of each fold's run."""
    data = config["data"]
    if world_size() > 1:
        raise ValueError(
            "data.split.fold=all runs in one process: under torchrun give each fold by itself (data.split.fold=0 "
            f"out={config['out']}/fold0, ...), then this command without torchrun, which scores them"
        )
    labelled = [record for record in Store(data["store"]).records if "label" in record["arrays"]]
    make_split(labelled, **data["split"] | {"fold": 0})  # checks it
    configs = [deepcopy(config) for _ in range(data["split"]["folds"])]
    for k, fold in enumerate(configs):
        fold["out"], fold["data"]["split"]["fold"] = str(Path(str(config["out"])) / f"fold{k}"), k
    return configs


def _predict_fold(run: Path, out: Path, config: Config) -> None:
    """Predict the test part of a run, unless its label maps are there, unchanged, and of these weights and settings."""
    store, record = Store(config["data"]["store"]), run / FOLD_RECORD
    ids = [scan["id"] for scan in select(store.records, read_split(run / "split.json")["test"])]

    def state() -> dict[str, Any]:
        maps = {id: sha256_of(out / f"{id}.nii.gz") for id in ids}
        return {"weights": sha256_of(find_weights(run)), "predict": config["predict"], "maps": maps}

    with suppress(FileNotFoundError, ValueError):  # not predicted yet, or a record that cannot be read
        if read_json(record) == state():
            return
    scans = {"checkpoint": run, "input": store.path, "part": "test", "out": out, "plugins": config["plugins"]}
    call("predict", {"predict": config["predict"]}, scans)
    write_json(record, state())


def ablate(config: Config) -> None:
    """Run an ablation; a ValueError after the list of runs that failed, when the others are done."""
    for key in COMMANDS:
        config[key] = config[key] or {}
    for key in ("store", "unlabelled"):
        config[key] = config[key] and str(Path(str(config[key])).resolve())  # it can be continued from any directory
    _check(config)
    if _of_classes(config):
        table = flatten(config["finetune"])["data.classes"]
        config["finetune"] = {**config["finetune"], "data.classes": str(Path(str(table)).resolve())}
    ablation = Ablation(config)
    if config["store"]:
        ablation.splits()
    ablation.check_folder()
    ablation.out.mkdir(parents=True, exist_ok=True)
    with locked(ablation.out):
        ablation.run()


def _check(config: Config) -> None:
    """Raise a ValueError for invalid settings before anything is run."""
    if world_size() > 1:
        raise ValueError("asa-ablate runs in one process: start it without torchrun")
    require_report_extra("asa-ablate")
    for key in ("seeds", "labelled"):
        if not isinstance(config[key], list) or not config[key] or len(set(map(repr, config[key]))) < len(config[key]):
            raise ValueError(f"{key}={config[key]}: give a list of one or more, each once")
    if not all(isinstance(seed, int) and seed >= 0 for seed in config["seeds"]):
        raise ValueError(f"seeds={config['seeds']}: give whole numbers from 0")
    if _of_classes(config) and not flatten(config["finetune"]).get("data.classes"):
        raise ValueError("finetune.data.classes has to be given with policy=classification: the table of the classes")
    own = {"data.store", "data.split_file", "data.labelled", "init", "out", "train.seed", "checkpoint", "input", "part"}
    given = {key: config[key] for key in COMMANDS}
    for name, arm in chosen_arms(config).items():  # an arm without a pretraining of the ablation may bring an encoder
        free = {"init"} if arm["pretrain"] is None else set()
        tuned = {key: value for key, value in flatten(arm["finetune"] or {}).items() if key not in free}
        given |= {f"arms.{name}.pretrain": arm["pretrain"] or {}, f"arms.{name}.finetune": tuned}
    for key, settings in given.items():
        if taken := own & flatten(settings).keys():
            raise ValueError(f"{key}.{min(taken)} is set by asa-ablate for each run: leave it out")


def _of_classes(config: Config) -> bool:
    return bool(config["policy"] == CLASSIFICATION.name)


@dataclass(frozen=True)
class Cell:
    """One run of an ablation."""

    seed: int
    labelled: int | float | None
    arm: str

    @property
    def name(self) -> str:
        return f"seed{self.seed}_{labelled_text(self.labelled)}_{self.arm}"


class Ablation:
    """An ablation and its state."""

    def __init__(self, config: Config) -> None:
        self.config, self.arms = config, chosen_arms(config)
        self.out = Path(str(config["out"])).resolve()  # its parts are settings of runs, resumed from any directory
        self.store = Path(config["store"] or self.out / "store")  # the latter is that of `prepare`
        self.pretrained: dict[str, str | None] = {}  # name -> why it failed, None: done
        self.trials: list[Trial] = []
        self.failures: dict[str, str] = {}

    def run(self) -> None:
        """Do what is not done yet, and write the tables of all runs that are."""
        config, out = self.config, self.out
        self.check_folder()  # again, as another process may have begun before the lock was held
        write_whole(out / "config.yaml", yaml.safe_dump(self._lasting(), sort_keys=False).encode())
        if not config["store"]:
            self._prepare()
        splits = self.splits()
        for seed, split in splits.items():
            if (file := self._split_file(seed)).exists() and read_split(file) != split:
                raise ValueError(f"{file}: the store's subjects are others than when this began: choose another out=")
        cells = [Cell(seed, n, arm) for seed in config["seeds"] for n in config["labelled"] for arm in self.arms]
        try:
            for number, cell in enumerate(cells, start=1):
                write_split(self._split_file(cell.seed), splits[cell.seed])
                print(f"[{number}/{len(cells)}] {cell.name}: ", end="", flush=True)
                print(self._one(cell), flush=True)
        finally:  # if it is stopped too: the table of the finished runs
            if self.trials:
                write_ablation(out, self.trials, list(self.arms), self._notes())
        if self.trials:
            print((out / "ablation.md").read_text(), end="")
            print(f"wrote ablation.md, .tex, .csv and .png to {out}")
        for name, reason in self.failures.items():
            print(f"{name}: failed: {reason}")
        if self.failures:
            failed = f"{len(self.failures)} of {len(cells)} runs failed"
            raise ValueError(f"{failed}, listed above (their output: {out / 'logs'}): the same command repeats them")

    def splits(self) -> dict[int, dict[str, list[str]]]:
        """The split of each seed; raises a ValueError without test subjects, or with too few training subjects."""
        records, fixed = Store(self.store).records, self.config["split"]["seed"]
        splits = {}
        for seed in self.config["seeds"]:
            split = make_split(records, **self.config["split"] | {"seed": seed if fixed is None else fixed})
            if not split["test"]:
                raise ValueError("split: no test subjects; give split.test=0.2, or folds, or a site")
            for count in self.config["labelled"]:
                if count is not None:
                    keep_labelled(split, count)
            splits[seed] = split
        return splits

    def check_folder(self) -> None:
        """Raise a ValueError for a folder that holds anything but an ablation with these settings."""
        out, file = self.out, self.out / "config.yaml"
        if file.exists():
            before = read_yaml(file)
            for key, value in self._lasting().items():
                if before.get(key) != value:
                    raise ValueError(f"{out} holds an ablation with another {key}: choose another out=")
        elif out.exists() and any(path.name != LOCK for path in out.iterdir()):
            raise ValueError(f"{out} is not empty and not an ablation: choose another out=")

    def _lasting(self) -> Config:
        return {key: value for key, value in self.config.items() if key not in (*FREE, "out")}

    def _prepare(self) -> None:
        """Make the store by asa-prepare; scans that are prepared already are not done again."""
        print(f"store: {self.store}", flush=True)
        phantoms = {"data.root": self.out / "scans"}
        settings = (phantoms, self.config["prepare"], {"out": self.store})
        if failure := self._attempt("prepare", lambda: call("prepare", *settings)):
            raise ValueError(f"prepare: {failure}")

    def _one(self, cell: Cell) -> str:
        """Train, predict and score one run unless it is done; returns the line to print."""
        begun, took = time.monotonic(), "done before"
        found, reason = self._evaluated(cell)
        if found is None:
            if (failure := self._attempt(cell.name, lambda: self._train_and_score(cell))) is None:
                found, failure = self._evaluated(cell)
            reason, took = failure, f"{time.monotonic() - begun:.0f} s"
        if found is None:
            self.failures[cell.name] = reason
            return f"failed: {reason}"
        self.trials.append(Trial(cell.arm, labelled_text(cell.labelled), cell.seed, found))
        return f"{trial_line(self.trials[-1])} ({took})"

    def _evaluated(self, cell: Cell) -> tuple[Run | None, str]:
        """The evaluation of a run; None and the reason where there is none, or a damaged one, which is made again."""
        read = read_class_run if _of_classes(self.config) else read_run
        try:
            return read(cell.name, self.out / "evaluations" / cell.name), ""
        except (ValueError, OSError) as error:
            return None, one_line(error)

    def _train_and_score(self, cell: Cell) -> None:
        config, arm, run = self.config, self.arms[cell.arm], self.out / "runs" / cell.name
        split_file, predictions = self._split_file(cell.seed), self.out / "predictions" / cell.name
        own = {"data.store": self.store, "data.split_file": split_file, "data.labelled": cell.labelled}
        own |= {"train.seed": cell.seed, "out": run}
        if arm["pretrain"] is not None:
            own["init"] = self.out / "pretrained" / self._pretrain(cell.seed, cell.arm)
        call("finetune", config["finetune"], arm["finetune"], own, config_dir=config["config_dir"])
        scans = {"checkpoint": run, "input": self.store, "part": "test", "out": predictions}
        call("predict", config["predict"], scans)
        scored = {"predictions": predictions, "policy": config["policy"], "out": self.out / "evaluations" / cell.name}
        if _of_classes(config):
            scored["truth"] = config["finetune"]["data.classes"]
        else:
            scored |= {"truth": self.store, "split_file": split_file}
        call("evaluate", scored)

    def _pretrain(self, seed: int, arm: str) -> str:
        """Pretrain an arm, once a seed or once for all; the name of its folder."""
        config = self.config
        own_part = config["unlabelled"] is None
        each = config["pretrain_each_seed"] or (own_part and config["split"]["seed"] is None)
        name = f"seed{seed}_{arm}" if each else arm
        if name not in self.pretrained:
            out = self.out / "pretrained" / name
            own: dict[str, Any] = {"data.store": config["unlabelled"] or self.store, "out": out}
            own |= {"data.split_file": self._split_file(seed)} if own_part else {}
            own |= {"train.seed": seed} if each else {}
            settings = (config["pretrain"], self.arms[arm]["pretrain"], own)
            self.pretrained[name] = self._attempt(
                f"pretrained_{name}", lambda: call("pretrain", *settings, config_dir=config["config_dir"])
            )
        if failure := self.pretrained[name]:
            raise ValueError(f"pretraining: {failure}")
        return name

    def _attempt(self, name: str, work: Callable[[], object]) -> str | None:
        """Do a part of the work, its output into a file of its own; what went wrong, in a line, or None."""
        file = self.out / "logs" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_unlinked(file, "a") as log, redirect_stdout(log):
            try:
                work()
            except Stopped:
                raise
            except Exception as error:  # whatever it is, the other runs go on
                reason = reason_of(error)
                print(f"failed: {reason}")
                return reason
        return None

    def _notes(self) -> list[str]:
        """What a reader has to know beside the numbers: what failed, and what pretraining saw or did not learn."""
        notes = []
        if self.failures:
            notes.append(f"failed and not counted: {listed(list(self.failures))}")
        for file in sorted((self.out / "logs").glob("pretrained_*.txt")):
            alarms = re.findall("ALARM.*", file.read_text(errors="replace"))
            notes += [f"{file.stem}: {alarm}" for alarm in alarms[-1:]]
        seen: dict[str, set[str]] = {}
        for trial in self.trials:
            file = self.out / "runs" / trial.run.name / "seen.json"
            found = (read_json(file)["seen"] or []) if file.exists() else []
            seen.setdefault(trial.arm, set()).update(one["subject"] for one in found if one["match"] == "scan")
        for arm, subjects in seen.items():
            if subjects:
                held_out = f"{len(subjects)} held-out subjects ({listed(sorted(subjects), 5)})"
                notes.append(f"the pretraining of {arm} saw {held_out}: read its scores as optimistic")
        return notes

    def _split_file(self, seed: int) -> Path:
        return self.out / "splits" / f"seed{seed}.json"
