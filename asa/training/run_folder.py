"""The folder of a run: joined by all processes, locked, and never used for two different configurations."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from asa.config import flatten
from asa.data.io.files import read_yaml, write_digests, write_whole
from asa.data.io.lock import LOCK, locked
from asa.data.splits import write_split
from asa.errors import reason_of
from asa.settings import TrainSettings
from asa.training.checkpoint_files import list_checkpoints
from asa.training.device import Backend
from asa.training.distributed import on_main, process_group
from asa.training.optim import warmup_steps

# Settings, and groups of them, that may change when a run is resumed: its length, its reports, how it is computed, and
# where its data are, which are compared themselves.
FREE_ON_RESUME = (
    *("out", "loader", "predict", "plan", "plan_rate", "transfer"),
    *("data.labelled_store", "data.store", "data.stores"),
    *("model.checkpointing", "method.model.checkpointing"),
    *(f"train.{setting.name}" for setting in fields(TrainSettings) if setting.metadata["free"]),
)


def run_backend(run: Path, settings: TrainSettings) -> Backend:
    """The device and precision of a run: of `precision=auto` what it was when the run began, or is on this machine."""
    name = settings.precision
    if name == "auto" and (started := _config_of_started(run)):
        name = str(flatten(started).get("train.precision", name))
    return Backend.of(settings.device, name)


@contextmanager
def open_run(
    config: Mapping[str, Any], split: Mapping[str, Sequence[str]], settings: TrainSettings, backend: Backend
) -> Iterator[Path]:
    """Join the job's other processes, and create and lock their run folder, `out`, with configuration and split.

    A run with the same configuration is resumed, in the same precision. A ValueError for a folder with another run or
    other files, or in use.
    """
    run = Path(str(config["out"]))
    config = {**config, "train": {**config["train"], "precision": backend.precision}}
    with process_group(backend.device, settings.timeout_minutes), ExitStack() as stack:

        def create() -> None:
            _check_folder(run)
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run))
            _check_config(run, config)
            write_whole(run / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
            write_split(run / "split.json", split)
            write_digests(run, ["split.json"])

        on_main(create)
        yield run


def _check_folder(run: Path) -> None:
    """Raise a ValueError for a folder that holds anything but a run."""
    if run.is_file():
        raise ValueError(f"{run} is a file: out= names a folder")
    is_run = (run / "config.yaml").exists() and (run / "split.json").exists()
    if not is_run and run.exists() and any(path.name != LOCK for path in run.iterdir()):
        raise ValueError(f"{run} is not empty and not a run: choose another out=")


def _check_config(run: Path, config: Mapping[str, Any]) -> None:
    """Raise a ValueError if the folder's run was made with other settings."""
    if not (started := _config_of_started(run)):
        return
    try:
        steps = int(flatten(started).get("train.steps", 0))
        before = _comparable(started, steps)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{run / 'config.yaml'}: not the settings of a run ({reason_of(error)}): restore it") from None
    now = _comparable(config, steps)
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
        if before.get(key) != now.get(key) and not free:
            other = f"{key} was {before.get(key)}, is {now.get(key)}"
            raise ValueError(f"{run} holds a run with other settings ({other}): choose another out=")
    if (done := _steps_done(run)) > (asked := now.get("train.steps", done)):
        advice = f"give {done} or more to go on, or choose another out="
        raise ValueError(f"{run} has {done} steps, and train.steps={asked}: {advice}")


def unfinished(run: str | Path) -> str:
    """A line about a run folder with fewer steps than its configuration has; "" for any other path."""
    try:
        steps = flatten(_config_of_started(Path(run))).get("train.steps")
    except (OSError, ValueError, RecursionError):  # its checkpoint can be used all the same
        return ""
    done = _steps_done(Path(run))
    short = isinstance(steps, int) and done < steps
    return f"note: {run} has {done} of {steps} steps: it was stopped, ended early, or is not through" if short else ""


def _steps_done(run: Path) -> int:
    """Steps of the newest checkpoint, by its name."""
    numbers = (path.name.removeprefix("step-") for path in list_checkpoints(run))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _config_of_started(run: Path) -> dict[str, Any]:
    """The configuration of a folder's run, empty before its first checkpoint."""
    file = run / "config.yaml"
    return read_yaml(file) if list_checkpoints(run) and file.exists() else {}


def _comparable(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Dotted key -> value, the warm-up in steps of a run of `steps`."""
    flat = flatten(config)
    return flat | {"optim.warmup": warmup_steps(flat.get("optim.warmup", 0), steps)}
