"""The folder of a run: joined by all processes, locked, and never used for two different configurations."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from asa.config import flatten
from asa.data.io.files import read_yaml, write_digests, write_whole
from asa.data.io.lock import LOCK, locked
from asa.data.splits import write_split
from asa.moved import current_name
from asa.training.checkpoint import list_checkpoints
from asa.training.device import pick_device, pick_precision, precision_name
from asa.training.distributed import on_main, process_group
from asa.training.loop import TrainSettings
from asa.training.optim import warmup_steps

# Settings that may change when a run is resumed: its length, its reports, and how it is computed.
FREE_ON_RESUME = (
    "out",
    "loader",
    "predict",
    "plan",
    "transfer",
    "data.probe",
    "model.checkpointing",
    "method.model.checkpointing",
    "train.steps",
    "train.accumulate",
    "train.log_every",
    "train.log_to",
    "train.validate_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep",
    "train.best",
    "train.patience",
    "train.device",
    "train.timeout_minutes",
)
# Settings that later versions added or removed, with the value that changes nothing; some runs lack them.
ADDED = {
    "optim.encoder_lr": 1.0,
    "method.decode": 1.0,
    "method.air": "keep",
    "method.masks": 1,
    "method.background_weight": 1.0,
    "method.learn_temperature": True,
    "augment.mirror_axes": "W",
    "augment.contrast": [1.0, 1.0],
    "augment.contrast_probability": 0.15,
    "augment.blur": [0.0, 0.0],
    "augment.blur_probability": 0.1,
}


def run_precision(run: Path, settings: TrainSettings) -> str:
    """The name of a run's precision: what "auto" was when the run began, or what it is on this machine for a new run.

    Raises:
        ValueError: a precision that is unknown, or that the device cannot compute in.
    """
    name, device = settings.precision, pick_device(settings.device)
    before = flatten(_config_of_started(run)).get("train.precision", "auto") if name == "auto" else name
    return precision_name(pick_precision(str(before), device))


@contextmanager
def open_run(config: Mapping[str, Any], split: Mapping[str, Sequence[str]], settings: TrainSettings) -> Iterator[Path]:
    """Join the job's other processes, and create and lock their run folder.

    The folder holds the configuration and the split. A run with the same configuration is resumed.

    Args:
        config: composed configuration of the command; `out` is the folder.
        split: subjects of each part.
        settings: of the training.

    Raises:
        ValueError: the folder holds another run or other files, or is in use.
    """
    run = Path(str(config["out"]))
    with process_group(pick_device(settings.device), settings.timeout_minutes), ExitStack() as stack:

        def create() -> None:
            _check_folder(run)
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run))
            _check_config(run, config)
            write_whole(run / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
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
    """Raise a ValueError if the folder's run was made with other settings.

    A setting that only one of the two has is no difference while it is off (null, false, 0, empty, or as in `ADDED`),
    so a run can be resumed after an upgrade that added settings.
    """
    started = _config_of_started(run)
    if not started:
        return
    steps = int(flatten(started).get("train.steps", 0))
    before, now = _comparable(started, steps), _comparable(config, steps)
    for key in sorted(before.keys() | now.keys()):
        in_both = key in before and key in now
        alone = (before | now)[key]
        same = before[key] == now[key] if in_both else not alone or ADDED.get(key) == alone
        same = same or (key, before.get(key)) == ("train.precision", "auto")  # a run of an earlier version
        if not (same or key.startswith(FREE_ON_RESUME)):
            raise ValueError(
                f"{run} holds a run with other settings ({key} was {before.get(key)}, is {now.get(key)}): "
                "choose another out="
            )


def _config_of_started(run: Path) -> dict[str, Any]:
    """The configuration of a folder's run, empty before its first checkpoint."""
    file = run / "config.yaml"
    return read_yaml(file) if list_checkpoints(run) and file.exists() else {}


def _comparable(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Dotted key -> value, functions and classes by their present names, the warm-up in steps of a run of `steps`."""
    flat = flatten(config)
    flat["optim.warmup"] = warmup_steps(flat.get("optim.warmup", 0), steps)
    return {key: current_name(str(value)) if key.endswith("_target_") else value for key, value in flat.items()}
