"""What a task is: what a network is trained for, and the one that a method or a checkpoint names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from asa.config import PACKAGES, locate
from asa.data.loading.crops import Samples
from asa.methods.base import Batch
from asa.settings import Config
from asa.training.loop import Validate

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
