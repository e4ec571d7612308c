"""The log of a run: progress bar, JSON lines and trackers: TensorBoard, MLflow, Weights & Biases.

Each tracker works in a thread of its own, so that one that fails or hangs costs no step. MLflow and Weights & Biases
write to the run folder, and use a network only where their own environment variables say so.
"""

import json
import math
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.config import flatten
from asa.data.io.files import naming, open_unlinked, read_json, read_yaml, write_json, write_whole
from asa.errors import one_line, require

WAITING = 1000  # rows that wait for a tracker; of a full queue further rows are dropped
PATIENCE = 60.0  # seconds that the end of a run waits for a tracker
CONFIG = "config.yaml"  # in the run folder, of runs of the commands
RUNS = "trackers.json"  # in the run folder: the ids by which a resumed run continues its curves


# --- the log


class RunLog:
    """Scalars and pictures of a run. The progress bar, `log.jsonl` and the trackers show the same numbers.

    Lines that an earlier process logged beyond `start`, the steps done before, are removed, so that the log reads as
    that of one uninterrupted run.
    """

    def __init__(self, run: Path, total: int, start: int, trackers: Sequence[str] = ("tensorboard",)) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text(errors="replace").splitlines() if _step(line) <= start]
            write_whole(self.path, "".join(f"{line}\n" for line in lines).encode())
        often = 1.0 if sys.stderr.isatty() else 10.0  # in a file each update stays
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=often)
        kinds = [TRACKERS[name] for name in trackers]
        self.trackers = [Queued(kind.title, partial(kind, run, start), self._warn) for kind in kinds]

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Log the numbers of a step under a group ("train", "validation")."""
        self.record(step, group, values)
        named = {f"{group}/{name}": value for name, value in values.items()}
        for tracker in self.trackers:
            tracker.put("scalars", step, named)

    def record(self, step: int, group: str, content: Mapping[str, Any]) -> None:
        """Write a line of JSON about a step, with null for numbers that are not finite."""
        row = {"step": step, "group": group}
        for key, value in content.items():
            row[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        with naming(self.path), open_unlinked(self.path, "a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def steps(self, group: str) -> list[int]:
        """The steps that have a line under a group."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        return [step for line in lines if (step := _step(line)) >= 0 and json.loads(line).get("group") == group]

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Show pictures (H, W, 3) uint8 by name."""
        for name, picture in pictures.items():
            for tracker in self.trackers:
                tracker.put("picture", step, name, picture)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Update the progress bar and the numbers beside it."""
        shown = "loss {loss:.4f}  lr {lr:.2e}  {volumes_per_second:.2f} volumes/s  data {data_wait:.0%}"
        self.bar.set_postfix_str(shown.format(**{"loss": math.nan, **values}), refresh=False)
        self.bar.update(step - self.bar.n)

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        self.bar.write(text)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        self.bar.close()

    def _warn(self, text: str) -> None:
        self.message(f"{text}; {self.path} still receives the numbers")


class SilentLog(RunLog):
    """The log of all ranks but the main one: nothing is written."""

    def __init__(self) -> None:
        self.trackers = []

    def record(self, step: int, group: str, content: Mapping[str, Any]) -> None: ...

    def progress(self, step: int, values: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return 2**63  # a line cut off by a crash, or damaged


# --- trackers


class Tracker:
    """Shows numbers of a run, and pictures if it can; `start` are the steps done before. Methods may raise and hang."""

    title: str  # for warnings

    def __init__(self, run: Path, start: int) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by "GROUP/NAME"."""

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard(Tracker):
    """Numbers, pictures and the configuration, in `RUN/tensorboard`; what was logged after `start` is hidden."""

    title = "TensorBoard"

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.board: Any = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        if settings := configuration(run):  # as a text and as hyperparameters
            lines = (run / CONFIG).read_text().splitlines()
            self.board.add_text("configuration", "\n".join(f"    {line}" for line in lines))
            for summary in hparams(dict(settings), dict.fromkeys(("train/loss", "validation/loss"), 0.0)):
                self.board.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self.board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.board.close()


class MLflow(Tracker):
    """Numbers and the configuration, in the database `RUN/mlflow.db`, or on the server of MLFLOW_TRACKING_URI."""

    title = "MLflow"

    def __init__(self, run: Path, start: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = require("mlflow", "mlflow", "train.log_to=[mlflow]")
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.absolute()}/mlflow.db"
        self.client = mlflow.MlflowClient(tracking_uri=address)
        self.entities = mlflow.entities
        self.id = run_id(run, "mlflow", start, lambda: self._new_run(run))
        self.client.update_run(self.id, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self.entities.Metric(allowed(name), float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.id)

    def _new_run(self, run: Path) -> str:
        """The id of a new run with the configuration."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "asa")
        found = self.client.get_experiment_by_name(name)
        folder = None if "MLFLOW_TRACKING_URI" in os.environ else (run / "mlflow").absolute().as_uri()
        experiment = found.experiment_id if found else self.client.create_experiment(name, folder)
        id = str(self.client.create_run(experiment, run_name=run.name).info.run_id)
        settings = [self.entities.Param(allowed(key), str(value)) for key, value in configuration(run).items()]
        for first in range(0, len(settings), 100):  # as many as one request may hold
            self.client.log_batch(id, params=settings[first : first + 100])
        return id


class WeightsAndBiases(Tracker):
    """Numbers and the configuration, in `RUN/wandb` for `wandb sync`, or online where WANDB_MODE=online."""

    title = "Weights & Biases"

    def __init__(self, run: Path, start: int) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = require("wandb", "wandb", "train.log_to=[wandb]")
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
        project, config = os.environ.get("WANDB_PROJECT", "asa"), configuration(run)
        id = run_id(run, "wandb", start, lambda: secrets.token_hex(4))
        self.run = wandb.init(
            project=project, name=run.name, dir=run, mode=mode, config=config, settings=settings, id=id,
            resume="allow" if mode == "online" else None,
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


def check_trackers(names: Sequence[str]) -> None:
    """Raise a ValueError for an unknown tracker or one given twice, an ImportError for one that is not installed."""
    if unknown := [name for name in names if name not in TRACKERS or names.count(name) > 1]:
        raise ValueError(f"train.log_to={unknown[0]}: choose from {', '.join(TRACKERS)}, each at most once")
    for name in names:
        if name != "tensorboard":
            require(name, name, f"train.log_to=[{name}]")


class Queued:
    """A tracker in a thread of its own, in which `make` makes it; `warn` is called at most once, in any thread.

    Calls wait in a queue of at most `WAITING`; further ones are dropped. What fails, or does not end within `PATIENCE`,
    is given up.
    """

    def __init__(self, title: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self.title, self.make, self.warn = title, make, warn
        self.calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(WAITING)
        self.given_up, self.warned, self.lock = threading.Event(), False, threading.Lock()
        self.thread = threading.Thread(target=self._work, name=f"tracker {title}", daemon=True)
        self.thread.start()

    def put(self, call: str, *arguments: Any) -> None:
        """Call a method of the tracker when its turn comes; never waits."""
        if self.given_up.is_set():
            return
        try:
            self.calls.put_nowait((call, arguments))
        except queue.Full:
            self._warn(f"is {WAITING} rows behind, and further rows are dropped")

    def close(self) -> None:
        """Let the tracker finish what waits, for at most `PATIENCE`."""
        if self.given_up.is_set():
            return
        with suppress(queue.Full):
            self.calls.put(("close", ()), timeout=PATIENCE)
            self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self._give_up(f"did not end within {PATIENCE:g} s")

    def _work(self) -> None:
        try:
            tracker = self.make()
            call = ""
            while call != "close" and not self.given_up.is_set():
                call, arguments = self.calls.get()
                getattr(tracker, call)(*arguments)
        except BaseException as error:  # of any kind, SystemExit too: it would end the thread without a word
            self._give_up(f"failed ({one_line(error) if isinstance(error, Exception) else repr(error)})")

    def _give_up(self, reason: str) -> None:
        self._warn(reason)
        self.given_up.set()

    def _warn(self, reason: str) -> None:
        with self.lock:
            first, self.warned = not self.warned, True
        if first:
            self.warn(f"warning: {self.title} {reason}")


def configuration(run: Path) -> dict[str, bool | int | float | str]:
    """The run's settings by dotted key; {} for a method trained without the commands."""
    flat = flatten(read_yaml(run / CONFIG)) if (run / CONFIG).exists() else {}
    return {
        key: value if isinstance(value, bool | int | float) else str(value)
        for key, value in flat.items()
        if not key.startswith("method.model.")  # the same as model
    }


def run_id(run: Path, name: str, start: int, make: Callable[[], str]) -> str:
    """The id by which a tracker knows the run: that of before if it is resumed, else a new one, which is kept."""
    known = _run_ids(run)
    if start and name in known:
        return str(known[name])
    id = make()
    with _WRITING:
        write_json(run / RUNS, {**_run_ids(run), name: id})
    return id


_WRITING = threading.Lock()  # trackers start at the same time


def _run_ids(run: Path) -> dict[str, Any]:
    return dict(read_json(run / RUNS)) if (run / RUNS).exists() else {}


def allowed(name: str) -> str:
    """A name of a metric or setting with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)
