"""Ablations: arms x labelled subjects x seeds, trained and scored on the same held-out subjects."""

import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from asa.config import flatten
from asa.data.io.files import open_unlinked, read_json, read_yaml, write_whole
from asa.data.io.lock import LOCK, locked
from asa.data.splits import keep_labelled, make_split, write_split
from asa.data.store import Store
from asa.errors import one_line, reason_of
from asa.evaluation.comparison import Run, read_class_run, read_run
from asa.evaluation.policies import CLASSIFICATION
from asa.evaluation.summary import listed
from asa.reporting.ablation import Trial, labelled_text, trial_line, write_ablation
from asa.reporting.pages import require_report_extra
from asa.tasks.base import Config
from asa.tasks.commands import finetune_task
from asa.tasks.preparation import prepare_task
from asa.tasks.run import configure, evaluate_task, predict_task, train_task
from asa.training.distributed import world_size
from asa.training.process import Stopped

COMMANDS = ("prepare", "pretrain", "finetune", "predict")  # whose settings can be given
# Settings that may change when an ablation is continued: they add runs to the existing ones.
FREE = ("only", "labelled", "seeds", "config_dir")


@dataclass
class Ablation:
    """The state of an ablation."""

    config: Config
    out: Path
    store: Path  # the given one, or that of `prepare`
    arms: dict[str, dict[str, Any]]
    pretrained: dict[str, str | None] = field(default_factory=dict)  # name -> why it failed, None: done
    trials: list[Trial] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def ablate(config: Config) -> None:
    """Run an ablation.

    Raises:
        ValueError: invalid settings, or runs that failed; these are listed, and the others are done.
    """
    out = Path(str(config["out"]))
    for key in COMMANDS:
        config[key] = config[key] or {}
    for key in ("store", "unlabelled"):
        config[key] = config[key] and str(Path(str(config[key])).resolve())  # it can be continued from any directory
    _check(config)
    if _of_classes(config):
        table = flatten(config["finetune"])["data.classes"]
        config["finetune"] = {**config["finetune"], "data.classes": str(Path(str(table)).resolve())}
    ablation = Ablation(config, out, Path(config["store"] or out.resolve() / "store"), _arms(config))
    if config["store"]:
        _splits(ablation)
    _check_folder(out, config)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _run(ablation)


def _run(ablation: Ablation) -> None:
    """Do what is not done yet, and write the tables of all runs that are."""
    config, out = ablation.config, ablation.out
    _check_folder(out, config)  # again, as another process may have begun before the lock was held
    write_whole(out / "config.yaml", yaml.safe_dump(_lasting(config), sort_keys=False).encode())
    if not config["store"]:
        _prepare(ablation)
    splits = _splits(ablation)
    planned = [(seed, count, arm) for seed in config["seeds"] for count in config["labelled"] for arm in ablation.arms]
    try:
        for number, (seed, count, arm) in enumerate(planned, start=1):
            write_split(_split_file(out, seed), splits[seed])
            print(f"[{number}/{len(planned)}] {_name(seed, arm, count)}: ", end="", flush=True)
            print(_one(ablation, seed, count, arm), flush=True)
    finally:  # if it is stopped too: the table of the finished runs
        if ablation.trials:
            write_ablation(out, ablation.trials, list(ablation.arms), _notes(ablation))
    if ablation.trials:
        print((out / "ablation.md").read_text(), end="")
        print(f"wrote ablation.md, .tex, .csv and .png to {out}")
    if ablation.failures:
        for name, reason in ablation.failures.items():
            print(f"{name}: failed: {reason}")
        raise ValueError(
            f"{len(ablation.failures)} of {len(planned)} runs failed, listed above (their output: {out / 'logs'}): "
            "the same command repeats them"
        )


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
    if not config["store"] and not config["prepare"]:
        raise ValueError("store has to be given, or prepare: settings of asa-prepare that make one")
    if _of_classes(config) and not flatten(config["finetune"]).get("data.classes"):
        raise ValueError("finetune.data.classes has to be given with policy=classification: the table of the classes")
    own = {"data.store", "data.split_file", "data.labelled", "init", "out", "train.seed", "checkpoint", "input", "part"}
    for key in COMMANDS:
        if taken := own & flatten(config[key]).keys():
            raise ValueError(f"{key}.{min(taken)} is set by asa-ablate for each run: leave it out")


def _of_classes(config: Config) -> bool:
    return bool(config["policy"] == CLASSIFICATION.name)


def _arms(config: Config) -> dict[str, dict[str, Any]]:
    """The chosen arms in order."""
    arms, chosen = config["arms"], config["only"]
    if not isinstance(chosen, list | None) or chosen == []:
        raise ValueError(f"only={chosen}: give a list of arms, like [scratch, asa]")
    for name in arms if chosen is None else chosen:
        if name not in arms:
            raise ValueError(f"only: no arm {name!r}; there are {', '.join(arms)}")
        if not isinstance(arms[name], Mapping) or arms[name].keys() != {"pretrain", "finetune"}:
            raise ValueError(f"arms.{name} needs pretrain (settings, or null) and finetune (settings)")
    return {name: arms[name] for name in (arms if chosen is None else chosen)}


def _prepare(ablation: Ablation) -> None:
    """Make the store by asa-prepare; scans that are prepared already are not done again.

    Raises:
        ValueError: scans failed.
    """
    print(f"store: {ablation.store}", flush=True)
    raw = {"data.root": ablation.out.resolve() / "scans"}  # where phantoms are generated
    fixed = {"out": ablation.store}
    if failure := _attempt(ablation, "prepare", lambda: call("prepare", raw, ablation.config["prepare"], fixed)):
        raise ValueError(f"prepare: {failure}")


def _splits(ablation: Ablation) -> dict[int, dict[str, list[str]]]:
    """The split of each seed; raises a ValueError without test subjects, or with too few training subjects."""
    config = ablation.config
    store, fixed = Store(ablation.store), config["split"]["seed"]
    splits = {}
    for seed in config["seeds"]:
        split = make_split(store.records, **config["split"] | {"seed": seed if fixed is None else fixed})
        if not split["test"]:
            raise ValueError("split: no test subjects; give split.test=0.2, or folds, or a site")
        for count in config["labelled"]:
            if count is not None:
                keep_labelled(split, count)
        splits[seed] = split
    return splits


def _lasting(config: Config) -> Config:
    """The settings that all runs of an ablation share."""
    return {key: value for key, value in config.items() if key not in (*FREE, "out")}


def _check_folder(out: Path, config: Config) -> None:
    """Raise a ValueError for a folder that holds anything but an ablation with these settings."""
    file = out / "config.yaml"
    if file.exists():
        before = read_yaml(file)
        for key, value in _lasting(config).items():
            if before.get(key) != value:
                raise ValueError(f"{out} holds an ablation with another {key}: choose another out=")
    elif out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and not an ablation: choose another out=")


def _one(ablation: Ablation, seed: int, count: int | float | None, arm: str) -> str:
    """Train, predict and score one run unless it is done; returns the line to print."""
    name, begun = _name(seed, arm, count), time.monotonic()
    evaluation = ablation.out / "evaluations" / name
    read = read_class_run if _of_classes(ablation.config) else read_run
    found, reason = _evaluated(evaluation, read)
    done = found is not None
    if found is None:
        if failure := _attempt(ablation, name, lambda: _train_and_score(ablation, seed, count, arm)):
            ablation.failures[name] = failure
            return f"failed: {failure}"
        found, reason = _evaluated(evaluation, read)
    if found is None:
        ablation.failures[name] = reason
        return f"failed: {reason}"
    trial = Trial(arm, labelled_text(count), seed, found)
    ablation.trials.append(trial)
    return f"{trial_line(trial)} ({'done before' if done else f'{time.monotonic() - begun:.0f} s'})"


def _evaluated(folder: Path, read: Callable[[str, Path], Run]) -> tuple[Run | None, str]:
    """The evaluation of a run; None and the reason where there is none, or a damaged one, which is made again."""
    try:
        return read(folder.name, folder), ""
    except (ValueError, OSError) as error:
        return None, one_line(error)


def _train_and_score(ablation: Ablation, seed: int, count: int | float | None, arm: str) -> None:
    config, out, name = ablation.config, ablation.out, _name(seed, arm, count)
    pretrained = ablation.arms[arm]["pretrain"] is not None
    init = out / "pretrained" / _pretrain(ablation, seed, arm) if pretrained else None
    split_file, run = _split_file(out, seed), out / "runs" / name
    fixed = {"data.store": ablation.store, "data.split_file": split_file, "data.labelled": count}
    fixed |= {"train.seed": seed, "init": init, "out": run}
    call("finetune", config["finetune"], ablation.arms[arm]["finetune"], fixed, config_dir=config["config_dir"])
    scans = {"checkpoint": run, "input": ablation.store, "part": "test", "out": out / "predictions" / name}
    call("predict", config["predict"], scans)
    truth = {"truth": ablation.store, "split_file": split_file}
    if _of_classes(config):
        truth = {"truth": config["finetune"]["data.classes"]}
    call(
        "evaluate",
        {"predictions": scans["out"]},
        truth,
        {"policy": config["policy"], "out": out / "evaluations" / name},
    )


def call(command: str, *settings: Mapping[str, Any], config_dir: str | None = None) -> None:
    """Run a command with settings, of which later ones win.

    Args:
        command: its name, without "asa-": prepare, pretrain, finetune, predict or evaluate.
        settings, config_dir: see `configure`.
    """
    config = configure(command, *settings, config_dir=config_dir)
    if command == "pretrain":
        train_task(config, command)
        return
    tasks = {"prepare": prepare_task, "finetune": finetune_task, "predict": predict_task, "evaluate": evaluate_task}
    tasks[command](config)


def _pretrain(ablation: Ablation, seed: int, arm: str) -> str:
    """Pretrain an arm, once a seed or once for all; the name of its folder."""
    config, out = ablation.config, ablation.out
    own_part = config["unlabelled"] is None
    each = config["pretrain_each_seed"] or (own_part and config["split"]["seed"] is None)
    name = f"seed{seed}_{arm}" if each else arm
    if name not in ablation.pretrained:
        fixed: dict[str, Any] = {
            "data.store": config["unlabelled"] or ablation.store,
            "out": out / "pretrained" / name,
        }
        if own_part:
            fixed["data.split_file"] = _split_file(out, seed)
        if each:
            fixed["train.seed"] = seed
        settings = (config["pretrain"], ablation.arms[arm]["pretrain"], fixed)
        ablation.pretrained[name] = _attempt(
            ablation, f"pretrained_{name}", lambda: call("pretrain", *settings, config_dir=config["config_dir"])
        )
    if failure := ablation.pretrained[name]:
        raise ValueError(f"pretraining: {failure}")
    return name


def _attempt(ablation: Ablation, name: str, work: Any) -> str | None:
    """Do a part of the work, its output into a file of its own; what went wrong, in a line, or None."""
    file = ablation.out / "logs" / f"{name}.txt"
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


def _notes(ablation: Ablation) -> list[str]:
    """What a reader has to know beside the numbers: what failed, and what pretraining saw."""
    notes = []
    if ablation.failures:
        notes.append(f"failed and not counted: {listed(list(ablation.failures))}")
    seen: dict[str, set[str]] = {}
    for trial in ablation.trials:
        file = ablation.out / "runs" / trial.run.name / "seen.json"
        found = (read_json(file)["seen"] or []) if file.exists() else []
        seen.setdefault(trial.arm, set()).update(one["subject"] for one in found if one["match"] == "scan")
    for arm, subjects in seen.items():
        if subjects:
            notes.append(
                f"the pretraining of {arm} saw {len(subjects)} held-out subjects ({listed(sorted(subjects), 5)}): "
                "read its scores as optimistic"
            )
    return notes


def _name(seed: int, arm: str, count: int | float | None) -> str:
    return f"seed{seed}_{labelled_text(count)}_{arm}"


def _split_file(out: Path, seed: int) -> Path:
    return out / "splits" / f"seed{seed}.json"
