"""Trackers: the rows of log.jsonl, offline, at no cost for the run whatever they do."""

import json
import math
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from asa.config import compose
from asa.settings import OptimSettings, TrainSettings
from asa.training import run_log
from asa.training.loop import check_settings
from asa.training.run_folder import FREE_ON_RESUME
from asa.training.run_log import RunLog, allowed
from asa.training.steps import Meter

Rows = list[tuple[int, dict[str, float]]]


class Fake:
    """A tracker that keeps what it gets."""

    title = "Fake"

    def __init__(self, run: Path, start: int) -> None:
        self.rows, self.drawn, self.closed = [], [], False
        type(self).last = self

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.rows.append((step, values))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self.drawn.append((step, name))

    def close(self) -> None:
        self.closed = True


def logged(run: Path) -> Rows:
    """The rows of log.jsonl as trackers name their numbers."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row.pop("step"), {f"{row['group']}/{name}": row[name] for name in row if name != "group"}) for row in rows]


def write_rows(run: Path, names: list[str], first: int = 1, last: int = 5) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("train: {steps: 5, log_to: [x]}\nname: {a: null}\n")
    log = RunLog(run, 5, first - 1, names)
    for step in range(first, last + 1):
        log.scalars(step, "train", {"loss": 1 / step, "lr": 0.1})
        log.pictures(step, {"image, truth": np.zeros((4, 8, 3), np.uint8)})
    log.scalars(last, "validation", {"dice é": 0.5})
    log.close()


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 5, 0, ())
    log.scalars(1, "validation", {"auc": math.nan, "loss": math.inf})
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "group": "validation", "auc": null, "loss": null}\n'


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "reset"), RuntimeError("DataLoader worker (pid 1) is killed")]
)
def test_a_loader_worker_that_was_killed_is_said(error: Exception) -> None:
    def batches() -> Iterator[dict[str, Any]]:
        raise error
        yield {}

    with pytest.raises(OSError, match=r"a worker process of the loader was killed, .* lower loader\.workers"):
        Meter(1, 1).next_batch(batches())


def test_a_log_makes_its_folder(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "run", 5, 0, ())
    log.scalars(1, "train", {"loss": 0.5})
    log.close()
    assert (tmp_path / "new" / "run" / "log.jsonl").read_text() == '{"step": 1, "group": "train", "loss": 0.5}\n'


def test_a_tracker_gets_the_rows_of_the_log_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run_log.TRACKERS, "fake", Fake)
    write_rows(tmp_path / "run", ["fake"])
    assert Fake.last.rows == logged(tmp_path / "run") and len(Fake.last.rows) == 6
    assert Fake.last.drawn == [(step, "image, truth") for step in range(1, 6)] and Fake.last.closed


@pytest.mark.parametrize("fails", ["__init__", "scalars", "picture", "close"])
def test_a_tracker_that_raises_costs_one_warning_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("quota\nexceeded")

    monkeypatch.setitem(run_log.TRACKERS, "fake", type("Broken", (Fake,), {fails: broken}))
    monkeypatch.setitem(run_log.TRACKERS, "sound", Fake)
    write_rows(tmp_path / "run", ["fake", "sound"])
    assert len(logged(tmp_path / "run")) == 6 and Fake.last.rows == logged(tmp_path / "run")
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "warning: Fake failed (quota exceeded); " in out


@pytest.mark.parametrize("hangs", ["__init__", "scalars", "close"])
def test_a_tracker_that_hangs_costs_one_warning_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hangs: str
) -> None:
    released = threading.Event()

    def hanging(*_: object) -> None:
        released.wait()

    monkeypatch.setattr(run_log, "WAITING", 3)
    monkeypatch.setattr(run_log, "PATIENCE", 0.05)
    monkeypatch.setitem(run_log.TRACKERS, "fake", type("Hanging", (Fake,), {hangs: hanging}))
    monkeypatch.setattr(Fake, "picture", lambda *_: None)
    write_rows(tmp_path / "run", ["fake"])  # ends, although the tracker never does
    assert not released.is_set() and len(logged(tmp_path / "run")) == 6
    assert capsys.readouterr().out.count("warning: Fake ") == 1
    released.set()


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused_before_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wrong in (["aim"], ["tensorboard", "tensorboard"]):
        with pytest.raises(ValueError, match=f"train.log_to={wrong[0]}: choose from tensorboard, mlflow, wandb"):
            check_settings(TrainSettings(log_to=wrong), OptimSettings())
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf'pip install "asa-mri\[{name}\]"'):
            check_settings(TrainSettings(log_to=[name]), OptimSettings())
    check_settings(TrainSettings(log_to=[]), OptimSettings())


def test_trackers_are_a_setting_of_the_commands_that_may_change_when_a_run_goes_on() -> None:
    composed = compose("pretrain", ["train.log_to=[tensorboard,mlflow]", "out=x", "data.store=y"])
    assert composed["train"]["log_to"] == ["tensorboard", "mlflow"]
    assert "train.log_to" in FREE_ON_RESUME


def test_the_settings_of_a_run_are_told_by_dotted_key_and_those_of_the_network_once(tmp_path: Path) -> None:
    network = {"depth": 2, "position": None}
    settings = {"model": network, "method": {"model": network, "mask_ratio": 0.75}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run_log.configuration(tmp_path) == {"model.depth": 2, "model.position": "None", "method.mask_ratio": 0.75}
    assert run_log.configuration(tmp_path / "elsewhere") == {}


def test_mlflow_holds_the_rows_of_the_log_in_one_run_that_is_resumed_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no local database")
    monkeypatch.setattr(run_log, "PATIENCE", 600)  # a busy machine takes a minute to import it
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def refused(*_: object) -> None:
        raise AssertionError("a tracker used the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    run = tmp_path / "run"
    write_rows(run, ["mlflow"], last=3)
    write_rows(run, ["mlflow"], first=4)
    assert "warning" not in capsys.readouterr().out
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow.db")
    (experiment,) = (one for one in client.search_experiments() if one.name == "asa")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["train.steps"] == "5"
    for name in ("train/loss", "train/lr"):
        history = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        assert history == [(step, values[name]) for step, values in logged(run) if name in values]
    assert found.data.metrics[allowed("validation/dice é")] == 0.5


def test_wandb_writes_the_rows_of_the_log_to_the_run_folder_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setattr(run_log, "PATIENCE", 600)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    write_rows(run, ["wandb"])
    assert "warning" not in capsys.readouterr().out
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for _, values in logged(run):
        assert all(name.encode() in content and json.dumps(value).encode() in content for name, value in values.items())
