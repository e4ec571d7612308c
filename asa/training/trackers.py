"""Trackers: TensorBoard, MLflow and Weights & Biases show the numbers of a run that `log.jsonl` holds.

Each works in a thread of its own behind a queue, so that one that fails or hangs costs no step. MLflow and Weights &
Biases write to the run folder, and use a network only where their own environment variables say so.
"""

import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from asa.config import flatten
from asa.data.io.files import read_json, read_yaml, write_json
from asa.errors import one_line, require

READABLE = 900  # width in pixels that a picture is enlarged to
TITLE = 30  # height in pixels of the titles
WAITING = 1000  # rows that wait for a tracker; of a full queue further rows are dropped
PATIENCE = 60.0  # seconds that the end of a run waits for a tracker
RUNS = "trackers.json"  # in the run folder: the ids by which a resumed run continues its curves


class Tracker(Protocol):
    """Shows numbers and pictures. Its methods may raise and may hang."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by "GROUP/NAME"."""

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 by "FIGURE: COLUMN, COLUMN" or "COLUMN, COLUMN"."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Numbers, pictures and the configuration, in `RUN/tensorboard`; what was logged after `start` is hidden."""

    title = "TensorBoard"

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board: Any = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self._configuration(run / "config.yaml")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        figure, _, columns = name.rpartition(": ")
        self.board.add_image(figure or name, titled(picture, columns.split(", ")), step, dataformats="HWC")

    def close(self) -> None:
        self.board.close()

    def _configuration(self, file: Path) -> None:
        """Show the run's configuration, as a text and as hyperparameters."""
        if not file.exists():  # of a method trained without the commands
            return
        from torch.utils.tensorboard.summary import hparams

        self.board.add_text("configuration", "\n".join(f"    {line}" for line in file.read_text().splitlines()))
        for summary in hparams(configuration(file), dict.fromkeys(("train/loss", "validation/loss"), 0.0)):
            self.board.file_writer.add_summary(summary)


class MLflow:
    """Numbers and the configuration, in the database `RUN/mlflow.db`, or on the server of MLFLOW_TRACKING_URI."""

    title = "MLflow"

    def __init__(self, run: Path, start: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = require("mlflow", "mlflow", "train.log_to=[mlflow]")
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.absolute()}/mlflow.db"
        self.client = mlflow.MlflowClient(tracking_uri=address)
        self.entities = mlflow.entities
        self.id = known_run(run, "mlflow", start)
        if self.id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "asa")
            found = self.client.get_experiment_by_name(name)
            folder = None if "MLFLOW_TRACKING_URI" in os.environ else (run / "mlflow").absolute().as_uri()
            experiment = found.experiment_id if found else self.client.create_experiment(name, folder)
            self.id = str(self.client.create_run(experiment, run_name=run.name).info.run_id)
            settings = [
                self.entities.Param(allowed(key), str(value))
                for key, value in configuration(run / "config.yaml").items()
            ]
            for first in range(0, len(settings), 100):  # as many as one request may hold
                self.client.log_batch(self.id, params=settings[first : first + 100])
            remember_run(run, "mlflow", self.id)
        self.client.update_run(self.id, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        metrics = [
            self.entities.Metric(allowed(name), float(value), int(1000 * time.time()), step)
            for name, value in values.items()
        ]
        self.client.log_batch(self.id, metrics=metrics)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None: ...

    def close(self) -> None:
        self.client.set_terminated(self.id)


class WeightsAndBiases:
    """Numbers and the configuration, in `RUN/wandb` for `wandb sync`, or online where WANDB_MODE=online."""

    title = "Weights & Biases"

    def __init__(self, run: Path, start: int) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = require("wandb", "wandb", "train.log_to=[wandb]")
        id = known_run(run, "wandb", start) or secrets.token_hex(4)
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "asa"),
            name=run.name,
            id=id,
            resume="allow" if mode == "online" else None,
            dir=run,
            mode=mode,
            config=configuration(run / "config.yaml"),
            settings=settings,
        )
        remember_run(run, "wandb", id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None: ...

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[MLflow] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and are installed.

    Raises:
        ValueError: an unknown name, or one given twice.
        ImportError: its extra is not installed.
    """
    if unknown := [name for name in names if name not in TRACKERS or names.count(name) > 1]:
        raise ValueError(f"train.log_to={unknown[0]}: choose from {', '.join(TRACKERS)}, each at most once")
    for name in names:
        if name != "tensorboard":
            require(name, name, f"train.log_to=[{name}]")


class Queued:
    """A tracker in a thread of its own.

    Calls wait in a queue of at most `WAITING`; further ones are dropped. What fails, or does not end within `PATIENCE`,
    is given up. Of all this there is one warning.

    Args:
        title: for the warning.
        make: makes the tracker, in the thread.
        warn: gets the warning, in any thread.
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
        try:
            self.calls.put(("close", ()), timeout=PATIENCE)
        except queue.Full:
            self._give_up(f"did not end within {PATIENCE:g} s")
            return
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
        except Exception as error:  # of any kind: a tracker must not end a run
            self._give_up(f"failed ({one_line(error)})")

    def _give_up(self, reason: str) -> None:
        self._warn(reason)
        self.given_up.set()

    def _warn(self, reason: str) -> None:
        with self.lock:
            first, self.warned = not self.warned, True
        if first:
            self.warn(f"warning: {self.title} {reason}")


def configuration(file: Path) -> dict[str, bool | int | float | str]:
    """The run's settings by dotted key; {} for a method trained without the commands."""
    flat = flatten(read_yaml(file)) if file.exists() else {}
    return {
        key: value if isinstance(value, bool | int | float) else str(value)
        for key, value in flat.items()
        if not key.startswith("method.model.")  # the same as model
    }


def known_run(run: Path, name: str, start: int) -> str | None:
    """The id under which a tracker holds a run that is resumed; None for a new one."""
    found = read_json(run / RUNS) if start and (run / RUNS).exists() else {}
    return str(found[name]) if name in found else None


def remember_run(run: Path, name: str, id: str) -> None:
    """Keep the id under which a tracker holds the run."""
    with _WRITING:
        found = read_json(run / RUNS) if (run / RUNS).exists() else {}
        write_json(run / RUNS, {**found, name: id})


_WRITING = threading.Lock()  # trackers start at the same time


def allowed(name: str) -> str:
    """A name of a metric or setting with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def titled(picture: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """A picture (H, W, 3) enlarged to a readable size, by whole factors, with a title above each of its columns."""
    from PIL import Image, ImageDraw, ImageFont  # comes with TensorBoard

    large = _readable(picture)
    bar = Image.new("RGB", (large.shape[1], TITLE))
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(TITLE * 0.6)
    for column, title in enumerate(titles):
        draw.text(((column + 0.5) * bar.width / len(titles), TITLE / 2), title, font=font, anchor="mm")
    return np.concatenate([np.asarray(bar), large])


def with_legend(picture: np.ndarray, names: Sequence[str], colours: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) enlarged as by `titled`, and below it the names of labels, each after its colour (RGB)."""
    from PIL import Image, ImageDraw, ImageFont

    large, font = _readable(picture), ImageFont.load_default(TITLE * 0.6)
    square, places, right, row = TITLE // 2, [], 0, 0
    for name in names:
        width = 2 * square + round(font.getlength(name)) + square
        if right + width > large.shape[1] and right:
            right, row = 0, row + 1
        places.append((right, row * TITLE))
        right += width
    bar = Image.new("RGB", (large.shape[1], (row + 1) * TITLE))
    draw = ImageDraw.Draw(bar)
    for name, colour, (x, y) in zip(names, colours, places, strict=True):
        draw.rectangle((x, y + square // 2, x + square, y + square // 2 + square), fill=tuple(map(int, colour)))
        draw.text((x + 2 * square, y + TITLE / 2), name, font=font, anchor="lm")
    return np.concatenate([large, np.asarray(bar)])


def _readable(picture: np.ndarray) -> np.ndarray:
    factor = max(round(READABLE / picture.shape[1]), 1)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
