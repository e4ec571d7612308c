"""The commands as Python functions, and what they do with a composed configuration.

Keyword arguments are the commands' keys, nested or dotted: `finetune("stores/ibsr", "runs/ibsr", experiment="ibsr",
train={"steps": 5000}, **{"optim.lr": 1e-3})`. `asa-finetune --help` lists them. What is done depends on the task alone,
which the method or the checkpoint names, see `Task`.
"""

import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from asa.config import PACKAGES, as_overrides, at_home, build, compose, locate, typed
from asa.data.io.files import read_json
from asa.data.loading.crops import Samples
from asa.evaluation.comparison import comparison_table
from asa.evaluation.policies import POLICIES
from asa.methods.base import Batch
from asa.settings import Config, LoaderSettings, OptimSettings, TrainSettings
from asa.tasks import COMMANDS
from asa.tasks.atlases import check_network_settings, predict_by_registration
from asa.tasks.checks import check, follow_init, say_followed
from asa.tasks.embedding import evaluate_probe
from asa.tasks.evaluation import compare_folders
from asa.tasks.prediction import checkpoints_of
from asa.training.checkpoint import check_best, read_description
from asa.training.checkpoint_files import find_weights, is_shipped, on_hub
from asa.training.device import Backend
from asa.training.loop import Validate, check_settings, train
from asa.training.plan import micro_batch, preflight, show_plan
from asa.training.run_folder import open_run, run_backend, unfinished

BUILT_IN = {
    "pretraining": "asa.tasks.pretraining.Pretraining",
    "segmentation": "asa.tasks.segmentation.Segmentation",
    "classification": "asa.tasks.whole_scans.Classification",
    "regression": "asa.tasks.whole_scans.Regression",
    "restoration": "asa.restoration.task.Restoration",
}


class Task(Protocol):
    """What a network is trained for: one object per run. A task of your own package implements these members.

    It may add `metrics(make)`, the names that its validation gives: a wrong train.best is then found before training;
    and, of asa-finetune, `anomalies = True` if its prediction takes `healthy`.

    Attributes:
        command: that trains it, "pretrain" or "finetune".
        units: what batches and the training part consist of, like ("volumes", "scans").
        cross_validates: whether the test parts of all folds can be predicted and evaluated together.
        split: subjects of "train", "validation" and "test".
        parts: records of each part.
    """

    command: ClassVar[str]
    units: ClassVar[tuple[str, str]]
    cross_validates: ClassVar[bool]
    split: dict[str, list[str]]
    parts: Mapping[str, Sequence[Any]]

    def __init__(self, config: Config) -> None:
        """Open the data; enter what follows from it (channels, classes) into `config["method"]`. Raises ValueErrors."""

    def example(self, method: Any, count: int) -> Batch:
        """A micro-batch of `count` samples; floating-point tensors may be on the meta device."""

    def load_init(self, method: Any) -> None:
        """Load the weights that `init` names, if any, and print what was loaded."""

    def explain_init(self, method: Any) -> str:
        """What loading `init` would do, without doing it."""

    def dataset(self, method: Any) -> Samples:
        """The training samples."""

    def validation(self, method: Any) -> Validate | None:
        """What is called with the number of steps to validate the method; None without validation data."""

    def metadata(self) -> dict[str, Any]:
        """What the checkpoint has to hold about the data so that a new scan can be predicted; plain data."""

    def begin(self, run: Path) -> None:
        """Called in the open run folder before training: print what is trained, write what belongs to the run."""

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        """Called after training with the last metrics: print them, score the test part."""

    @staticmethod
    def predict(config: Config) -> None:
        """asa-predict: predict scans with the checkpoint that `config["checkpoint"]` names."""

    @staticmethod
    def evaluate(config: Config) -> None:
        """asa-evaluate: score predictions against the truth, and write `OUT/summary.json` with what else is written."""


def find_task(name: str, plugins: Sequence[str] = ()) -> type[Task]:
    """A task of `BUILT_IN`, or `package.module.Class` of a package listed in `plugins`; a ValueError for any other."""
    if name not in BUILT_IN and ("." not in name or not plugins):
        offered = f"{', '.join(BUILT_IN)}, and package.module.Class with plugins=[package]"
        raise ValueError(f"no task {name[:80]!r}: there are {offered}")
    found = locate(BUILT_IN[name], ("asa.tasks", *PACKAGES)) if name in BUILT_IN else locate(name, plugins)
    if not isinstance(found, type) or getattr(found, "command", None) not in ("pretrain", "finetune"):
        raise ValueError(f"{name}: no task: it has no command, pretrain or finetune")
    task: type[Task] = found
    return task


def task_of_method(config: Config, command: str) -> tuple[str, type[Task]]:
    """The name and the class of the task that a configuration's method names; a ValueError for another command's."""
    target, plugins = config["method"]["_target_"], config["plugins"]
    name = getattr(locate(target, ("asa.methods", *PACKAGES, *plugins)), "task", None)
    if not isinstance(name, str):
        raise ValueError(f"_target_={target} names no task: give the method an attribute task = 'package.module.Class'")
    task = find_task(name, plugins)
    if task.command != command:
        raise ValueError(f"_target_={target} is a method of {name}: train it with asa-{task.command}")
    return name, task


def configure(command: str, *settings: Mapping[str, Any], config_dir: str | Path | None = None) -> Config:
    """The composed configuration of a command, named without "asa-"; raises as `compose`.

    Args:
        settings: nested, or by dotted key; later ones win. None leaves a key at null.
        config_dir: a folder of your own experiments and other groups, as `--config-dir`.
    """
    return compose(command, as_overrides(command, *settings), config_dir=config_dir)


def call(command: str, *settings: Mapping[str, Any], config_dir: str | Path | None = None) -> Path | None:
    """Compose the configuration of a command, see `configure`, and run it; the run folder of a finished training."""
    config = configure(command, *settings, config_dir=config_dir)
    check(command, config)
    run: Path | None = pkgutil.resolve_name(COMMANDS[command])(config)
    return run


def prepare(out: str | Path, *, config_dir: str | Path | None = None, **settings: Any) -> Path:
    """Prepare raw scans into a store, as asa-prepare does; scans that are prepared already are not done again.

    Args:
        out: folder of the store, which is returned.
        config_dir, settings: as in `pretrain`, of asa-prepare, like `data="bids", **{"data.root": FOLDER}`.

    Raises:
        ValueError: settings that do not fit, or scans that failed; the others are prepared.
    """
    call("prepare", settings, {"out": str(out)}, config_dir=config_dir)
    return Path(at_home(str(out)))


def pretrain(
    store: str | Path | Sequence[str | Path], out: str | Path, *, config_dir: str | Path | None = None, **settings: Any
) -> Path | None:
    """Pretrain an encoder on unlabelled scans, as asa-pretrain does; a run that was stopped is resumed.

    Args:
        store, out: folder made by asa-prepare, or several as of data.stores, and the run folder.
        config_dir, settings: a folder of your own experiments, and keys of asa-pretrain.

    Returns:
        The run folder; None for `plan="only"`.

    Raises:
        ValueError: settings or data that do not fit.
        Stopped: by SIGTERM or SIGUSR1, after saving.
    """
    given: dict[str, Any] = {"out": str(out)}
    if isinstance(store, str | Path):
        given["data.store"] = str(store)
    else:
        given["data.stores"] = [str(path) for path in store]
    return _train("pretrain", settings, given, config_dir)


def finetune(
    store: str | Path | None, out: str | Path, *, config_dir: str | Path | None = None, **settings: Any
) -> Path | None:
    """Fine-tune a network on labelled scans, as asa-finetune does; a run that was stopped is resumed.

    Args:
        store: folder made by asa-prepare; None for restoration, which takes `data={"root": FOLDER}`.
        out, config_dir, settings: as in `pretrain`.

    Returns:
        The run folder; None for `plan="only"` and `transfer="explain"`.

    Raises:
        ValueError: settings or data that do not fit.
        Stopped: by SIGTERM or SIGUSR1, after saving.
    """
    required = {"out": str(out)} if store is None else {"data.store": str(store), "out": str(out)}
    return _train("finetune", settings, required, config_dir)


def _train(
    command: str, settings: Mapping[str, Any], required: Mapping[str, Any], config_dir: str | Path | None
) -> Path | None:
    """Call a training command; without `model` its network follows `init`, as on the command line."""
    followed = follow_init(command, as_overrides(command, settings, required))
    say_followed(followed)
    return call(command, followed, settings, required, config_dir=config_dir)


def predict(
    checkpoint: str | Path | Sequence[str | Path] | None,
    input: str | Path,
    out: str | Path,
    *,
    atlas: str | Path | None = None,
    config_dir: str | Path | None = None,
    **settings: Any,
) -> Path:
    """Predict scans with a trained network, or by registration of labelled scans, as asa-predict does.

    Args:
        checkpoint: a run, a checkpoint or a weights file; several are averaged. None: `atlas` alone.
        input: a scan, a folder of scans, or a store.
        out: folder for the results, which is returned.
        atlas: a store with labels, whose scans are registered to each new one; with `checkpoint`, averaged with it.
        config_dir, settings: as in `pretrain`, of asa-predict.

    Raises:
        FileNotFoundError, ValueError: no such input or checkpoint, neither checkpoint nor atlas, or scans that failed.
    """
    chosen = checkpoint if isinstance(checkpoint, str | Path | None) else list(checkpoint)
    call("predict", settings, {"checkpoint": chosen, "atlas": atlas, "input": input, "out": out}, config_dir=config_dir)
    return Path(at_home(str(out)))


def evaluate(
    predictions: str | Path,
    truth: str | Path,
    out: str | Path,
    *,
    config_dir: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score predictions against the truth under a policy, as asa-evaluate does.

    Args:
        predictions: folder of label maps (or restored images).
        truth: a store, or a folder of label maps (or clean images).
        out: folder for cases.csv, report.html and summary.json, of which the content is returned.
        config_dir, settings: as in `pretrain`, of asa-evaluate.

    Raises:
        FileNotFoundError, ValueError: no such folder, or cases that cannot be evaluated.
    """
    call("evaluate", settings, {"predictions": predictions, "truth": truth, "out": out}, config_dir=config_dir)
    summary: dict[str, Any] = read_json(Path(at_home(str(out))) / "summary.json")
    return summary


def compare(
    folders: Sequence[str | Path] | Mapping[str, str | Path], out: str | Path, *, allow_missing: bool = False
) -> None:
    """Compare folders of earlier evaluations with the first of them; print the table, write it and a page.

    Args:
        folders: that asa-evaluate wrote, by the name of the run or each called as its folder is.
        out: folder for comparison.json, .md, .tex and .html.
        allow_missing: compare the cases that all of them have, instead of refusing when they differ.
    """
    comparison = compare_folders(_named(folders), Path(out).expanduser(), allow_missing=allow_missing)
    print(comparison_table(comparison))
    print(f"wrote comparison.json, .md, .tex and .html to {out}")


def pretrain_task(config: Config) -> Path | None:
    return train_task(config, "pretrain")


def train_task(config: Config, command: str) -> Path | None:
    """Train what a configuration's method names, or print its plan; the run folder, None if nothing was trained."""
    settings, optim = typed(TrainSettings, config["train"]), typed(OptimSettings, config["optim"])
    loader = typed(LoaderSettings, config["loader"])
    planned = config["plan"] is not None
    if not planned:  # a plan may be for another machine
        check_settings(settings, optim)
        if "predict" in config:  # of asa-finetune, which predicts when it has trained
            Backend.of(config["predict"]["device"], config["predict"]["precision"])
        backend = run_backend(Path(str(config["out"])), settings)
    elif config["init"] and (absent := _not_here(config["init"])):
        print(f"note: whether init= fits this network is not checked: {absent}")
        config["init"] = None
    explain = config.pop("transfer", "load") == "explain"  # the key does not stay in the run's configuration
    name, make_task = task_of_method(config, command)
    task = make_task(config)

    def make() -> Any:
        return build(config["method"], plugins=config["plugins"])

    def example(method: Any) -> Any:
        return task.example(method, micro_batch(settings))

    if settings.best and (metrics := getattr(task, "metrics", None)):  # a task of the user's own may not know them
        check_best(settings.best, metrics(make))
    if planned:
        if config["init"]:  # whether it fits; a plan reads only the shapes
            with torch.device("meta"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # of a .pt, read whole
                task.load_init(make())
        print(show_plan(make, example, len(task.parts["train"]), settings, optim, config["plan_rate"], task.units))
        return None
    for line in preflight(make, example, settings, optim, backend):
        print(line)
    torch.manual_seed(settings.seed)
    method = make()
    if explain:
        print(task.explain_init(method))
        return None
    task.load_init(method)
    dataset, validate = task.dataset(method), task.validation(method)
    description = {"model": config["model"], "task": name, "data": task.metadata()}
    init, recorded = config["init"], dict(config)
    if init and not (on_hub(init) or is_shipped(init)):  # the run can then be continued from any folder
        recorded["init"] = str(Path(str(init)).expanduser().absolute())
    with open_run(recorded, task.split, settings, backend) as run:
        task.begin(run)
        metrics = train(
            method, dataset, run, settings=settings, optim=optim, loader=loader, description=description,
            validate=validate, backend=backend,
        )  # fmt: skip
        task.finish(run, method, metrics)
    print(f"wrote {find_weights(run)}")
    return run


def _not_here(init: str) -> str | None:
    """Why a plan cannot read a checkpoint: the run that makes it may be planned, too. None: it can."""
    if on_hub(init):
        return f"{init} is fetched when the run starts, and gives the network where model= does not"
    try:
        find_weights(init)
    except FileNotFoundError as error:
        return str(error)
    return None


def predict_task(config: Config) -> None:
    """Predict scans as the checkpoint's task does, of several checkpoints as that of the first; or with atlases."""
    if not isinstance(config["probabilities"], bool):
        raise ValueError(f"probabilities={config['probabilities']}: choose true or false")
    if config["atlas"] is None and not (checkpoints := checkpoints_of(config)):
        raise ValueError("checkpoint=[]: give at least one")
    for line in filter(None, map(unfinished, checkpoints_of(config) if config["checkpoint"] else ())):
        print(line)
    if config["atlas"] is not None:
        predict_by_registration(config)
        return
    check_network_settings(config)
    Backend.of(config["predict"]["device"], config["predict"]["precision"])
    task = find_task(str(read_description(checkpoints[0]).get("task", "")), config["plugins"])  # adds no plugin
    if config["healthy"] is not None and task.command != "pretrain" and not getattr(task, "anomalies", False):
        raise ValueError("healthy= is for anomaly maps, by runs of asa-pretrain and of segmentation: leave it out")
    if config["map"] is not None and task.command != "pretrain":
        raise ValueError(f"map={config['map']} is for a run of asa-pretrain: leave it out")
    task.predict(config)


def evaluate_task(config: Config) -> None:
    """Score predictions, or compare evaluations; print the table, write the results.

    A policy is one of label maps, "asymmetry" (anomaly maps and their tables), "probe" (features), or a task's name.
    """
    if config["compare"] is not None:
        if given := [key for key in ("predictions", "truth") if config[key] is not None]:
            raise ValueError(f"{given[0]}= and compare= exclude each other: evaluate each run first, then compare them")
        compare(config["compare"], config["out"], allow_missing=config["allow_missing"])
        return
    policy = str(config["policy"])
    if policy == "probe":
        evaluate_probe(config)
        return
    task = "segmentation" if policy in POLICIES else "pretraining" if policy == "asymmetry" else policy
    find_task(task, config["plugins"]).evaluate(config)


def _named(folders: Any) -> dict[str, Path]:
    """Folders by the name of the run: given, or the folder's own."""
    if isinstance(folders, Mapping):
        return {str(name): Path(str(folder)).expanduser() for name, folder in folders.items()}
    if not isinstance(folders, list | tuple):
        raise ValueError(f"compare= is a list of folders, like [runs/a, runs/b], got {folders!r}")
    named = {Path(str(folder)).name: Path(str(folder)).expanduser() for folder in folders}
    if len(named) < len(folders):
        raise ValueError("compare= has two folders of one name: name the runs, like {scratch: FOLDER, asa: FOLDER}")
    return named
