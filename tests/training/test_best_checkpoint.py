"""The best validated weights are kept beside the newest checkpoints, complete or absent, however a run was stopped."""

import os
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from ranks import MODEL, log, ranks, replaced
from torch import nn

from asa.config import build, compose
from asa.data.io.files import sha256_of
from asa.data.loading.crops import CropDataset
from asa.data.store import Store
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import asa_tiny
from asa.settings import LoaderSettings, OptimSettings, TrainSettings
from asa.tasks.run import task_of_method, train_task
from asa.training import checkpoint as checkpoint_module
from asa.training.checkpoint import (
    describe_best,
    find_weights,
    keep_best,
    list_checkpoints,
    load_model,
    read_best,
    read_weights,
)
from asa.training.distributed import is_main, process_group, rank
from asa.training.loop import train
from asa.training.process import Stopped
from asa.training.run_log import RunLog

SCORES = {2: 0.3, 4: 0.7, 6: 0.7, 8: 0.5}  # by step


def run(folder: Path, store: Path, steps: int = 8, scores: dict[int, float] = SCORES, **settings: object) -> None:
    """Train a tiny autoencoder whose validation returns given metrics, in one or several processes."""
    torch.set_num_threads(1)
    torch.manual_seed(rank())
    opened = Store(store)
    method = MaskedPretraining(model=asa_tiny(**{k: v for k, v in MODEL.items() if k != "_target_"}))
    dataset = CropDataset(opened, opened.records, (32, 32, 32))
    chosen = dict(steps=steps, batch_size=2, log_every=1, save_every=3, validate_every=2, best="dice")
    chosen |= dict(device="cpu", precision="fp32")
    if is_main():
        folder.mkdir(exist_ok=True)
    with process_group(torch.device("cpu"), 0.5):
        train(
            method,
            dataset,
            folder,
            settings=TrainSettings(**{**chosen, **settings}),
            optim=OptimSettings(lr=1e-3, warmup=1),
            loader=LoaderSettings(workers=0),
            description={"model": MODEL},
            validate=lambda step: ({"dice": scores[step], "loss": -scores[step]}, {}),
        )


def kept(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder, "best")]


def test_the_best_validated_weights_are_kept_beside_the_newest_checkpoints(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", store)
    assert kept(tmp_path / "a") == ["step-00000004"]  # the first of equal values
    assert [path.name for path in list_checkpoints(tmp_path / "a")] == ["step-00000006", "step-00000008"]
    best = find_weights(tmp_path / "a" / "best")
    assert read_best(tmp_path / "a") == {"name": "dice", "value": 0.7, "step": 4, "file": best}
    assert f"best dice 0.7 at step 4: {best}" in capsys.readouterr().out
    run(tmp_path / "short", store, steps=8, save_every=4, keep=9)
    then = list_checkpoints(tmp_path / "short")[0]
    assert then.name == "step-00000004"
    weights, same = (read_weights(path)[0] for path in (tmp_path / "a" / "best", then))
    assert all(torch.equal(weights[name], same[name]) for name in same)
    assert not load_model(tmp_path / "a" / "best").training
    run(tmp_path / "low", store, best="-loss")
    assert kept(tmp_path / "low") == ["step-00000004"]
    run(tmp_path / "none", store, best=None)
    assert not (tmp_path / "none" / "best").exists()


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_stopped_and_resumed_run_keeps_the_same_best_checkpoint_as_an_uninterrupted_run(
    store: Path, tmp_path: Path, stop: int
) -> None:
    run(tmp_path / "whole", store, ema=0.5)
    calls = []

    def stopping(self: MaskedPretraining, batch: dict) -> dict:
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with pytest.raises(Stopped), replaced(MaskedPretraining, "forward", stopping) as original:
        run(tmp_path / "cut", store, ema=0.5)
    # The step in which it is stopped is done again, and so is its validation.
    assert len(log(tmp_path / "cut", "dice", group="validation")) == (stop - 1) // 2
    run(tmp_path / "cut", store, ema=0.5)
    run(tmp_path / "cut", store, ema=0.5)  # the run is complete: nothing is validated again
    assert log(tmp_path / "cut", "step", "dice", group="validation") == list(SCORES.items())
    one, other = (find_weights(tmp_path / name / "best") for name in ("whole", "cut"))
    assert one.parent.name == other.parent.name and sha256_of(one) == sha256_of(other)


def test_a_run_that_crashes_between_validation_and_saving_the_best_validates_again(store: Path, tmp_path: Path) -> None:
    run(tmp_path / "whole", store)

    class Crashed(Exception):
        pass

    def crashing(self: RunLog, step: int, group: str, values: dict) -> None:
        if group == "validation" and step == 4:
            raise Crashed
        original(self, step, group, values)

    with pytest.raises(Crashed), replaced(RunLog, "scalars", crashing) as original:
        run(tmp_path / "cut", store, save_every=2)
    run(tmp_path / "cut", store, save_every=2)
    assert log(tmp_path / "cut", "step", group="validation") == [(2,), (4,), (6,), (8,)]
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole") == ["step-00000004"]


def test_a_best_checkpoint_that_cannot_be_written_leaves_the_previous_one_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no space left")

    model = nn.Linear(2, 2)
    assert keep_best(tmp_path, 5, "dice", {"dice": 0.5}, model, {"model": {}})
    assert not keep_best(tmp_path, 6, "dice", {"dice": float("nan")}, model, {"model": {}})
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module.torch, "save", broken)
        with pytest.raises(OSError, match="no space left"):
            keep_best(tmp_path, 7, "dice", {"dice": 0.6}, model, {"model": {}})
    assert kept(tmp_path) == ["step-00000005"] and read_weights(tmp_path / "best")[1]["step"] == 5
    # A run whose newest checkpoint was damaged repeats steps: an earlier step may become the best after a later one.
    assert keep_best(tmp_path, 4, "dice", {"dice": 0.9}, model, {"model": {}}) and kept(tmp_path) == ["step-00000004"]
    assert keep_best(tmp_path, 9, "-loss", {"loss": 2.0}, model, {"model": {}})  # by another metric
    assert not keep_best(tmp_path, 10, "-loss", {"loss": 2.5}, model, {"model": {}})
    assert describe_best(tmp_path).startswith("best -loss 2 at step 9: ")


def test_a_metric_that_validation_does_not_return_is_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train.best=dize: validation gives dice, loss"):
        run(tmp_path, store, best="dize")
    with pytest.raises(FileNotFoundError, match="which exists with train.best"):
        find_weights(tmp_path / "best")


@pytest.mark.distributed
def test_two_processes_keep_the_same_best_checkpoint_as_one(store: Path, tmp_path: Path) -> None:
    for name, world in (("one", 1), ("two", 2)):
        ended = ranks(tmp_path, world, run, tmp_path / name, store)
        assert all(one.code == 0 for one in ended), [one.text for one in ended]
    one, two = (read_weights(tmp_path / name / "best") for name in ("one", "two"))
    assert one[1] == two[1] and kept(tmp_path / "two") == ["step-00000004"]
    for name in one[0]:
        torch.testing.assert_close(one[0][name], two[0][name], atol=1e-5, rtol=1e-4)


# --- early stopping


def test_a_run_ends_after_as_many_validations_without_a_better_one_as_its_patience(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {2: 0.3, 4: 0.7, 6: 0.7, 8: 0.5, 10: 0.9}
    run(tmp_path / "a", store, steps=10, scores=scores, patience=2)
    assert "ended early at step 8: 2 validations without a better dice" in capsys.readouterr().out
    assert list_checkpoints(tmp_path / "a")[-1].name == "step-00000008" and kept(tmp_path / "a") == ["step-00000004"]
    steps = len(log(tmp_path / "a", "step"))
    run(tmp_path / "a", store, steps=10, scores=scores, patience=2)  # it has ended: nothing is trained
    assert len(log(tmp_path / "a", "step")) == steps
    run(tmp_path / "a", store, steps=10, scores=scores, patience=3)  # more patience: it goes on
    assert kept(tmp_path / "a") == ["step-00000010"]
    run(tmp_path / "b", store, steps=10, scores=scores, patience=3)
    assert kept(tmp_path / "b") == ["step-00000010"]


def test_patience_counts_validations_however_many_steps_lie_between_them(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {4: 0.7, 8: 0.5, 9: 0.4, 10: 0.3, 11: 0.2, 12: 0.1}
    run(tmp_path / "a", store, steps=8, scores=scores, validate_every=4)
    run(tmp_path / "a", store, steps=12, scores=scores, validate_every=1, patience=3)
    assert "ended early at step 10: 3 validations without a better dice" in capsys.readouterr().out


def test_patience_does_not_count_from_the_best_of_another_metric(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {2: 0.9, 4: 0.2, 6: 0.3, 8: 0.1, 10: 0.4, 12: 0.5}
    run(tmp_path / "a", store, steps=6, scores=scores)
    run(tmp_path / "a", store, steps=12, scores=scores, best="-loss", patience=2)
    assert "ended early" not in capsys.readouterr().out
    assert list_checkpoints(tmp_path / "a")[-1].name == "step-00000012"


def test_patience_needs_a_metric_and_validations(store: Path, tmp_path: Path) -> None:
    for wrong in ({"best": None}, {"validate_every": 0}):
        with pytest.raises(ValueError, match=r"train\.patience=2 counts validations"):
            TrainSettings(**{"best": "dice", "patience": 2, **wrong})


# --- names


SMALL = ["crop=32", "loader.workers=0", "data.split.validation=1", "data.split.test=1"]


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("pretrain", ["model=asa_tiny", "data.labelled_store={store}"]),
        ("pretrain", ["method=sa_swin", "model=sa_swin_tiny", "crop=64"]),
        ("pretrain", ["method=rpl", "model=puzzle_tiny", "crop=48"]),
        ("finetune", ["model=unet_tiny", "crop=[64,32,32]", "predict.overlap=0"]),
        ("finetune", ["method=classify", "model=asa_classifier_tiny", "data.classes={table}"]),
        ("finetune", ["method=regress", "model=asa_regressor_tiny", "data.table={table}", "data.column=age"]),
    ],
)
def test_the_metric_of_the_best_checkpoint_is_checked_before_training_by_what_validation_gives(
    command: str, settings: list[str], store: Path, tmp_path: Path
) -> None:
    rows = [f"s{k},{'xy'[k % 2]},{20 + k}" for k in range(4)]
    (tmp_path / "table.csv").write_text("\n".join(["subject,class,age", *rows]))
    given = [f"data.store={store}", f"out={tmp_path}/run", *SMALL, *settings]
    config = compose(command, [one.format(store=store, table=tmp_path / "table.csv") for one in given])
    config["train"]["best"] = "dcie"
    for plan in (None, "only"):
        with pytest.raises(ValueError, match="train.best=dcie: validation gives ") as refused:
            train_task({**deepcopy(config), "plan": plan}, command)
    assert not (tmp_path / "run").exists()
    task = task_of_method(config, command)[1](config)
    method = build(config["method"]).eval()
    with torch.no_grad():
        metrics, _ = task.validation(method)(0)
    named = set(str(refused.value).partition(" gives ")[2].split(", "))
    assert metrics.keys() <= named <= {*metrics, "linear_dice_csf"}  # none of it in these crops
