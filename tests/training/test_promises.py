"""Laws of training under failures, in one process."""

import argparse
import contextlib
import importlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import FORK, MODEL, PATIENCE, Job, command, log, losses, replaced, steps_done, tiny_run, until
from safetensors.torch import load_file, save_file
from torch import nn

from asa.data.io import lock as lock_module
from asa.data.io.files import sha256_of
from asa.data.io.lock import LOCK, locked
from asa.data.loading.crops import CropDataset
from asa.data.store import Store, array_path
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import asa_tiny
from asa.settings import LoaderSettings, OptimSettings, TrainSettings
from asa.training.checkpoint import (
    DamagedCheckpoint,
    find_weights,
    list_checkpoints,
    load_model,
    load_newest,
    load_training,
    read_weights,
    save_checkpoint,
)
from asa.training.device import Backend
from asa.training.loop import train
from asa.training.optim import EMA
from asa.training.process import RESUME_CODE, StopNow, Stopped, stop_signals
from asa.training.run_folder import open_run, unfinished
from asa.training.run_log import RunLog, SilentLog
from asa.training.steps import NonFiniteGuard, RunningStatistics

sys.path.insert(0, str(Path(__file__).parents[2]))  # of scripts, which are of the checkout and not of the package


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def checkpoint(run: Path, step: int, keep: int = 2) -> Path:
    """Save a small checkpoint."""
    return save_checkpoint(run, step, nn.Linear(2, 2), {"model": {}}, {"x": torch.ones(3)}, keep)


# --- kill -9


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, 4), (1, 1), (2, 1)])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(
    store: Path, tmp_path: Path, workers: int, kills: int
) -> None:
    tiny_run(tmp_path / "whole", store, 20)
    run, draws = tmp_path / "killed", np.random.default_rng(workers)
    for _ in range(kills):
        before = steps_done(run)
        job = Job(tmp_path, 1, tiny_run, run, store, 20, workers)
        enough = before + int(draws.integers(1, 5))
        until(lambda enough=enough: steps_done(run) >= min(enough, 19))
        job.send(0, signal.SIGKILL)
        job.wait()
    (last,) = Job(tmp_path, 1, tiny_run, run, store, 20, workers).wait()
    assert last.code == 0
    assert sha256_of(find_weights(run)) == sha256_of(find_weights(tmp_path / "whole"))
    assert (losses(run) == losses(tmp_path / "whole")).all()


def killed_while_saving(run: Path, call: str) -> None:
    """Save, and kill this process at a certain call."""
    owner = {"fsync": os, "save": torch, "rename": Path}[call]
    with replaced(owner, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
        checkpoint(run, 3)


@pytest.mark.parametrize("call", ["save", "fsync", "rename"])
def test_a_process_killed_while_saving_leaves_the_previous_checkpoints_intact(tmp_path: Path, call: str) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step)
    process = FORK.Process(target=killed_while_saving, args=(tmp_path, call))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert load_newest(tmp_path, print)[0].name == "step-00000002"
    checkpoint(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_name_before_old_ones_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append(os.fstat(file).st_ino), fsync(file))[1])
    monkeypatch.setattr(Path, "rename", lambda old, new: (happened.append(new.name), rename(old, new))[1])
    first = checkpoint(tmp_path, 1, keep=1)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kw: (happened.append(path), rmtree(path, **kw))[1])
    happened.clear()
    second = checkpoint(tmp_path, 2, keep=1)
    named, deleted = happened.index(second.name), next(k for k, each in enumerate(happened) if isinstance(each, Path))
    flushed = {path.stat().st_ino for path in (second, *second.iterdir())}
    assert len(flushed) == 4 and flushed <= {*happened[:named]}
    assert second.parent.stat().st_ino in happened[named:deleted] and not first.exists()


# --- checkpoints


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_loaded(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        file = checkpoint(tmp_path, step) / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] if damage == "cut" else b"")
    messages: list[str] = []
    found = load_newest(tmp_path, messages.append)
    assert found is not None and found[0].name == "step-00000001" and found[2]["step"] == 1
    assert len(messages) == 1 and str(file) in messages[0] and "step-00000001" in messages[0]
    assert names(tmp_path) == ["step-00000001"]  # the damaged one is no longer counted
    file = list_checkpoints(tmp_path)[0] / name
    file.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="no checkpoint is intact.*Remove"):
        load_newest(tmp_path, messages.append)
    assert names(tmp_path) == ["step-00000001"]  # a new run does not start silently


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "digests.json"])
def test_a_flipped_bit_anywhere_is_noticed_and_the_previous_checkpoint_is_loaded(tmp_path: Path, name: str) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    whole, draws = (second / name).read_bytes(), np.random.default_rng(0)
    for position in draws.integers(0, 8 * len(whole), 20):
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << (position % 8)
        (second / name).write_bytes(changed)
        with pytest.raises(DamagedCheckpoint):
            load_training(second)
    (second / name).write_bytes(whole + b"more" if name != "digests.json" else b"[]")
    messages: list[str] = []
    found = load_newest(tmp_path, messages.append)
    assert found is not None and found[0] == first and "step-00000002" in messages[0]


def test_a_changed_model_is_not_used(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, 1) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedCheckpoint, match="has changed since it was written"):
        read_weights(tmp_path)
    alone = file.rename(tmp_path / "model.safetensors")
    assert read_weights(alone)[1]["step"] == 1  # out of its folder there is nothing to compare with


@pytest.mark.parametrize("header", ["{", "[]", "3"])
def test_a_header_without_a_description_is_damage(tmp_path: Path, header: str) -> None:
    folder = checkpoint(tmp_path, 1)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors", metadata={"asa": header})
    (folder / "digests.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="its description is"):
        read_weights(tmp_path)


def test_a_damaged_checkpoint_does_not_change_the_final_weights(store: Path, tmp_path: Path) -> None:
    tiny_run(tmp_path / "whole", store, 6)
    tiny_run(tmp_path / "run", store, 4, optim=OptimSettings(lr=1e-3, schedule="constant"))
    tiny_run(tmp_path / "other", store, 6, optim=OptimSettings(lr=1e-3, schedule="constant"))
    file = list_checkpoints(tmp_path / "run")[-1] / "training.pt"
    file.write_bytes(file.read_bytes()[:100])
    tiny_run(tmp_path / "run", store, 6, optim=OptimSettings(lr=1e-3, schedule="constant"))
    assert sha256_of(find_weights(tmp_path / "run")) == sha256_of(find_weights(tmp_path / "other"))


def test_a_full_disk_leaves_the_last_checkpoint_and_is_reported(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for bytes_left in (10, 700):  # neither file fits; only the weights fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limits[1]))
        try:
            with pytest.raises(
                OSError, match="step-00000002.*last complete checkpoint is step-00000001; free disk space"
            ):
                checkpoint(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_rename_that_fails_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("stale file handle")

    checkpoint(tmp_path, 1)
    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="stale file handle"):
        checkpoint(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_training_state_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    for write in (torch.save, lambda bomb, file: file.write_bytes(pickle.dumps(bomb))):
        write({"step": Bomb(tmp_path / "owned")}, folder / "training.pt")
        (folder / "digests.json").unlink(missing_ok=True)  # an attacker would write their own
        with pytest.raises(DamagedCheckpoint, match="UnpicklingError"):
            load_newest(tmp_path, print)
    assert not (tmp_path / "owned").exists()


# --- signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_with_the_resume_code(store: Path, tmp_path: Path, number: signal.Signals) -> None:
    tiny = ["loader.workers=0", "train.device=cpu", "train.log_every=1", "model=asa_tiny", "crop=32", "optim.warmup=1"]
    arguments = [f"data.store={store}", *tiny, "train.steps=30", "train.batch_size=4"]
    (whole,) = Job(tmp_path, 1, command, "pretrain", *arguments, f"out={tmp_path}/whole").wait()
    assert whole.code == 0
    run = tmp_path / "run"
    job = Job(tmp_path, 1, command, "pretrain", *arguments, f"out={run}")
    until(lambda: steps_done(run) >= 3)
    job.send(0, number)
    (ended,) = job.wait()
    assert ended.code == RESUME_CODE and "saved" in ended.text and "the same command goes on" in ended.text
    assert names(run) == [f"step-{steps_done(run):08d}"] and steps_done(run) < 30
    (ended,) = Job(tmp_path, 1, command, "pretrain", *arguments, f"out={run}").wait()
    assert ended.code == 0
    assert sha256_of(find_weights(run)) == sha256_of(find_weights(tmp_path / "whole"))


def test_a_signal_to_the_process_group_saves_too(store: Path, tmp_path: Path) -> None:
    tiny = ["loader.workers=1", "train.device=cpu", "train.log_every=1", "model=asa_tiny", "crop=32", "optim.warmup=1"]
    run = tmp_path / "run"
    arguments = [f"data.store={store}", *tiny, "train.steps=500", "train.batch_size=4", f"out={run}"]
    job = Job(tmp_path, 1, command, "pretrain", *arguments)
    until(lambda: steps_done(run) >= 3)
    os.killpg(job.processes[0].pid, signal.SIGTERM)
    (ended,) = job.wait()
    print(ended.text)
    assert ended.code == RESUME_CODE and names(run) == [f"step-{steps_done(run):08d}"]
    until(lambda: members(job.processes[0].pid) == [])


def signalled(number: int) -> tuple[list[int], Any]:
    """A forward of the method that gets SIGTERM in its call of this number, from 1; and the calls so far."""
    calls: list[int] = []
    original = MaskedPretraining.forward

    def forward(self: MaskedPretraining, batch: dict) -> dict:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    return calls, forward


@pytest.mark.parametrize(("number", "step"), [(1, 0), (3, 0), (6, 1), (9, 2)])
def test_a_signal_ends_a_step_within_a_micro_batch_and_the_step_is_done_again(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, step: int
) -> None:
    four = {"accumulate": 4, "save_every": 100}
    tiny_run(tmp_path / "whole", store, 3, **four)
    calls, forward = signalled(number)
    with (
        pytest.raises(Stopped, match=f"stopped at step {step} of 3, and saved in"),
        replaced(MaskedPretraining, "forward", forward),
    ):
        tiny_run(tmp_path / "cut", store, 3, **four)
    assert len(calls) == number and names(tmp_path / "cut") == [f"step-{step:08d}"]
    assert "SIGTERM received: saving, then stopping" in capfd.readouterr().err
    tiny_run(tmp_path / "cut", store, 3, **four)
    assert sha256_of(find_weights(tmp_path / "cut")) == sha256_of(find_weights(tmp_path / "whole"))
    assert (losses(tmp_path / "cut") == losses(tmp_path / "whole")).all()


def test_a_signal_is_heard_while_gradients_are_computed(store: Path, tmp_path: Path) -> None:
    reached: list[str] = []

    def forward(self: MaskedPretraining, batch: dict) -> dict:
        (last,), (first,) = (list(part.parameters())[:1] for part in (self.model.head, self.model.encoder.patch_embed))
        if not last._backward_hooks:
            last.register_hook(lambda grad: reached.append("last") or os.kill(os.getpid(), signal.SIGTERM))
            first.register_hook(lambda grad: reached.append("first"))
        return original(self, batch)

    with pytest.raises(Stopped), replaced(MaskedPretraining, "forward", forward) as original:
        tiny_run(tmp_path / "run", store)
    assert reached == ["last"]


def test_a_signal_ends_a_validation_which_is_done_when_the_run_continues(store: Path, tmp_path: Path) -> None:
    opened, begun, ended = Store(store), [], []

    def run(folder: Path, signal_at: int | None) -> None:
        def validate(step: int) -> Any:
            begun.append(step)
            if step == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            ended.append(step)
            return {"number": float(torch.rand(()))}, {}

        torch.manual_seed(0)
        method = MaskedPretraining(asa_tiny(**{key: value for key, value in MODEL.items() if key != "_target_"}))
        crops = CropDataset(opened, opened.records, (32, 32, 32))
        settings = TrainSettings(steps=4, batch_size=4, device="cpu", validate_every=2, save_every=3, ema=0.9)
        chosen = dict(settings=settings, optim=OptimSettings(), loader=LoaderSettings(workers=0))
        folder.mkdir(exist_ok=True)
        train(method, crops, folder, **chosen, description={"model": MODEL}, validate=validate)

    run(tmp_path / "whole", None)
    with pytest.raises(Stopped, match="stopped at step 2 of 4, and saved"):
        run(tmp_path / "cut", 2)
    assert begun == [2, 4, 2] and ended == [2, 4] and names(tmp_path / "cut") == ["step-00000002"]
    run(tmp_path / "cut", None)
    assert ended == [2, 4, 2, 4]
    assert sha256_of(find_weights(tmp_path / "cut")) == sha256_of(find_weights(tmp_path / "whole"))
    numbers = [log(tmp_path / name, "step", "number", group="validation") for name in ("cut", "whole")]
    assert numbers[0] == numbers[1]


def test_signal_handlers_are_restored_after_a_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.requested)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_stop_what_the_first_one_has_left() -> None:
    undone = []
    with stop_signals() as stop, pytest.raises(StopNow), stop.at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: False)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            undone.append(True)
    assert undone


def test_ctrl_c_leaves_no_process_behind(store: Path, tmp_path: Path) -> None:
    tiny = ["loader.workers=2", "train.device=cpu", "train.log_every=1", "model=asa_tiny", "crop=32", "optim.warmup=1"]
    run = tmp_path / "run"
    arguments = [f"data.store={store}", *tiny, "train.steps=500", "train.batch_size=4", f"out={run}"]
    job = Job(tmp_path, 1, command, "pretrain", *arguments)
    until(lambda: steps_done(run) >= 3)
    group = job.processes[0].pid
    assert len(members(group)) > 1
    os.killpg(group, signal.SIGINT)  # as a terminal sends it
    (ended,) = job.wait()
    assert ended.code == 130 and "interrupted" in ended.text and "Traceback" not in ended.text
    until(lambda: members(group) == [])  # a loader worker checks for its parent every 5 s
    assert not (run / LOCK).exists()


def members(session: int) -> list[int]:
    """Running processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


# --- non-finite losses and gradients


class NonFiniteLoss:
    """A method's forward pass that returns a non-finite loss at some calls, counted from 1."""

    def __init__(self, calls: range | list[int], value: float = float("nan")) -> None:
        self.calls, self.value, self.count = calls, value, 0
        self.original = MaskedPretraining.forward

    def __call__(self, method: nn.Module, batch: dict) -> dict:
        self.count += 1
        result = self.original(method, batch)
        return {**result, "loss": result["loss"] + self.value} if self.count in self.calls else result

    def __get__(self, instance: object, owner: type) -> object:
        return lambda batch: self(instance, batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("nonfinite", [1, 4])
def test_a_non_finite_step_changes_only_the_count(
    store: Path, tmp_path: Path, value: float, optimizer: str, nonfinite: int
) -> None:
    # An added infinity has a finite gradient: the loss must be checked too.
    optim = OptimSettings(name=optimizer, lr=1e-3, schedule="constant")
    with replaced(MaskedPretraining, "forward", NonFiniteLoss([nonfinite], value)):
        tiny_run(tmp_path, store, nonfinite, save_every=1, optim=optim, keep=9)
    if nonfinite > 1:
        before, after = (load_file(path / "model.safetensors") for path in list_checkpoints(tmp_path)[-2:])
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert log(tmp_path, "skipped_steps")[-1] == (1,)
    ((step, what, ids, row),) = log(tmp_path, "step", "what", "ids", "in_a_row", group="skipped")
    assert (step, what, sorted(ids), row) == (nonfinite, "loss", ["s0", "s1", "s2", "s3"], 1)
    tiny_run(tmp_path, store, nonfinite + 3, optim=optim)  # and training continues
    assert np.isfinite(losses(tmp_path)[nonfinite:].astype(float)).all()


def test_the_scans_of_the_micro_batch_are_logged_and_the_step_is_excluded_from_the_means(
    store: Path, tmp_path: Path
) -> None:
    tiny_run(tmp_path / "clean", store, 2, accumulate=2, log_every=1)
    with replaced(MaskedPretraining, "forward", NonFiniteLoss([6])):
        tiny_run(tmp_path / "run", store, 4, accumulate=2, log_every=4)
    ((ids,),) = log(tmp_path / "run", "ids", group="skipped")
    assert len(ids) == 2
    assert np.isfinite(losses(tmp_path / "run").astype(float)).all()


def test_ten_skipped_steps_in_a_row_stop_the_run_before_saving_and_dump_the_batch(store: Path, tmp_path: Path) -> None:
    with (
        replaced(MaskedPretraining, "forward", NonFiniteLoss(range(5, 99))),
        pytest.raises(FloatingPointError, match=r"10 steps in a row.*before saving.*step-00000004.*s\d"),
    ):
        tiny_run(tmp_path, store, 40)
    assert names(tmp_path)[-1] == "step-00000004"
    (dump,) = (tmp_path / "nonfinite").iterdir()
    kept = torch.load(dump, weights_only=True)
    assert kept["step"] == 14 and sorted(kept["batches"][0]["id"]) == ["s0", "s1", "s2", "s3"]
    assert kept["batches"][0]["image"].isfinite().all()


def make_guard(run: Path, fp16: bool) -> tuple[NonFiniteGuard, nn.Linear]:
    model = nn.Linear(2, 1)
    return NonFiniteGuard(run, SilentLog(), torch.optim.AdamW(model.parameters(), fused=True), fp16=fp16), model


def test_fp16_stops_if_no_loss_scale_is_found(tmp_path: Path) -> None:
    guard, model = make_guard(tmp_path, fp16=True)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="gradient was not finite in 26 steps in a row"):
        for step in range(1, 40):
            loss = guard.add({"id": ["a"]}, model(torch.ones(1, 2)).sum())
            scaler.scale(loss * float("inf")).backward()  # as after an overflow in half precision
            scaler.unscale_(guard.optimizer)
            guard.check(step, nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            guard.optimizer.step()
            scaler.update()
            guard.optimizer.zero_grad()
    assert torch.equal(model.weight, before) and scaler.get_scale() < 1


def test_fp16_continues_once_the_loss_scale_is_found(tmp_path: Path) -> None:
    guard, model = make_guard(tmp_path, fp16=True)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    for step in range(1, 20):
        loss = guard.add({"id": ["a"]}, model(torch.ones(1, 2)).sum())
        scaler.scale(loss).backward()
        if scaler.get_scale() > 100:  # as after an overflow in half precision
            model.weight.grad.fill_(float("inf"))
        scaler.unscale_(guard.optimizer)
        guard.check(step, nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        guard.optimizer.step()
        scaler.update()
        guard.optimizer.zero_grad()
    guard.resolve()
    assert guard.skipped == 10 and guard.in_a_row == 0 and scaler.get_scale() == 64


def test_a_skipped_or_interrupted_step_leaves_the_statistics_of_batch_normalisation_as_they_were() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2))
    statistics = RunningStatistics(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for end in (lambda: statistics.finish(torch.tensor(1.0)), statistics.restore):
        statistics.keep()
        model(torch.full((1, 1, 4, 4, 4), float("nan")))
        assert model[1].running_mean.isnan().all()
        end()
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    statistics.keep()
    model(torch.rand(1, 1, 4, 4, 4))
    statistics.finish(torch.tensor(0.0))
    assert model[1].num_batches_tracked == 1 and not torch.equal(model[1].running_mean, before["1.running_mean"])


# --- data, memory, locks, logs


@pytest.mark.parametrize("workers", [0, 1])
def test_the_file_of_a_damaged_scan_is_named(store: Path, tmp_path: Path, workers: int) -> None:
    copy = tmp_path / "store"
    subprocess.run(["cp", "-r", store, copy], check=True)
    file = array_path(copy, "s2", "image")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"{file}: missing or damaged"):
        tiny_run(tmp_path / "run", copy, workers=workers)


def test_memory_does_not_grow_over_epochs(store: Path, tmp_path: Path) -> None:
    sizes = []

    def measured(dataset: CropDataset, address: tuple[int, int]) -> dict:
        if address[1] in (20, 59):
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        return original(dataset, address)

    with replaced(CropDataset, "__getitem__", measured) as original:
        tiny_run(tmp_path, store, 60, save_every=100, log_every=10)
    assert sizes[-1] - sizes[0] < 8e6


def hold(run: Path, mark: Path) -> None:
    """Hold a run's lock for 20 s."""
    with locked(run):
        mark.touch()
        time.sleep(20)


def test_two_runs_cannot_use_one_folder_and_the_lock_of_a_dead_process_is_taken_over(
    store: Path, tmp_path: Path
) -> None:
    run, mark, messages = tmp_path / "run", tmp_path / "held", []
    run.mkdir()
    process = FORK.Process(target=hold, args=(run, mark))
    process.start()
    until(mark.exists)
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on"), locked(run):
        pass
    tiny = ["loader.workers=0", "train.device=cpu", "model=asa_tiny", "crop=32", "optim.warmup=1", "train.steps=2"]
    (second,) = Job(tmp_path, 1, command, "pretrain", f"data.store={store}", f"out={run}", *tiny).wait()
    assert second.code == 1 and "in use by process" in second.text
    assert [path.name for path in run.iterdir()] == [LOCK]
    process.kill()
    process.join()
    with locked(run, messages.append):
        assert len(messages) == 1 and f"process {process.pid}" in messages[0] and "no longer running" in messages[0]
    assert not (run / LOCK).exists()


def test_a_lock_of_another_machine_is_taken_over_only_without_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"host": "elsewhere pid:[1]", "pid": 1, "born": "1", "job": "7"}
    file = tmp_path / LOCK
    monkeypatch.setattr(lock_module, "STALE_AFTER", 0.3)
    file.write_text(json.dumps(other))
    with locked(tmp_path, lambda _: None):  # no heartbeat
        pass
    file.write_text(json.dumps(other))
    times = iter(range(100))
    with (
        replaced(lock_module, "_modified", lambda _: next(times)),
        pytest.raises(ValueError, match="in use by process 1 on elsewhere:"),
        locked(tmp_path),
    ):
        pass
    monkeypatch.setattr(lock_module, "STALE_AFTER", 100)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with locked(tmp_path, lambda _: None):  # the same job, restarted on another machine: at once
        pass
    file.write_text("")  # cut off by a power failure
    with locked(tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_tensorboard_failure_does_not_stop_the_run(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "no folder"
    run.mkdir()
    (run / "tensorboard").write_text("")  # no folder can be made here
    tiny_run(run, store, 3)
    assert len(losses(run)) == 3 and capsys.readouterr().out.count("TensorBoard failed") == 1


def test_the_log_of_a_resumed_run_has_no_duplicate_lines(tmp_path: Path) -> None:
    log_ = RunLog(tmp_path, 4, 0)
    for step in (1, 2, 3):
        log_.scalars(step, "train", {"loss": 1.0})
    log_.close()
    RunLog(tmp_path, 4, 2).close()
    assert log(tmp_path, "step") == [(1,), (2,)]


# --- EMA, compilation


def test_the_ema_follows_its_formula(store: Path, tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, expected = EMA(model, 0.5), 0.0
    for step in range(1, 12):
        model.weight.data.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with ema.swapped_in():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 11


def test_averaged_weights_are_saved_in_the_model_file_and_resume_to_the_bit(store: Path, tmp_path: Path) -> None:
    tiny_run(tmp_path / "plain", store)
    tiny_run(tmp_path / "whole", store, ema=0.9)

    def stopping(self: MaskedPretraining, batch: dict) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with pytest.raises(Stopped), replaced(MaskedPretraining, "forward", stopping) as original:
        tiny_run(tmp_path / "cut", store, ema=0.9)
    tiny_run(tmp_path / "cut", store, ema=0.9)
    assert sha256_of(find_weights(tmp_path / "cut")) == sha256_of(find_weights(tmp_path / "whole"))
    # The average does not change training, and differs from the last weights.
    assert (losses(tmp_path / "plain") == losses(tmp_path / "whole")).all()
    raw = torch.load(list_checkpoints(tmp_path / "whole")[-1] / "training.pt", weights_only=True)["weights"]
    plain, averaged = (read_weights(tmp_path / name)[0] for name in ("plain", "whole"))
    assert all(torch.equal(raw[name], plain[name]) for name in plain)
    assert any(not torch.equal(averaged[name], plain[name]) for name in plain)
    assert read_weights(tmp_path / "whole")[1]["ema"] == 0.9 and load_model(tmp_path / "whole")


def test_the_saved_average_is_that_of_the_weights_after_each_step(store: Path, tmp_path: Path) -> None:
    tiny_run(tmp_path, store, 4, ema=0.3, save_every=1, keep=4)
    checkpoints = list_checkpoints(tmp_path)
    average, *later = (read_weights(checkpoint)[0] for checkpoint in checkpoints)
    assert len(later) == 3
    for step, (checkpoint, expected) in enumerate(zip(checkpoints[1:], later, strict=True), start=2):
        raw = torch.load(checkpoint / "training.pt", weights_only=True)["weights"]
        decay = min(0.3, (1 + step) / (10 + step))
        average = {name: decay * mean + (1 - decay) * raw[name] for name, mean in average.items()}
        assert all(torch.allclose(average[name], expected[name], atol=1e-6) for name in expected)
        assert any((average[name] - raw[name]).abs().max() > 1e-5 for name in raw)


def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(store: Path, tmp_path: Path) -> None:
    tiny_run(tmp_path / "plain", store, 3)
    # Traced and split into graphs as in real use, but not compiled to C++, which takes minutes.
    with replaced(nn.Module, "compile", lambda self: compiled(self, backend="eager")) as compiled:
        tiny_run(tmp_path / "compiled", store, 3, compile=True)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-5)
    assert read_weights(tmp_path / "compiled")[0].keys() == read_weights(tmp_path / "plain")[0].keys()
    assert read_weights(tmp_path / "compiled")[1]["model"] == MODEL


def test_invalid_ema_and_timeout_settings_are_refused() -> None:
    for wrong in ({"ema": 1.0}, {"ema": -0.1}, {"timeout_minutes": 0.0}, {"timeout_minutes": float("inf")}):
        with pytest.raises(ValueError, match=f"train.{next(iter(wrong))}"):
            TrainSettings(**wrong)


# --- scripts


class Forked:
    """A forked process with what the script uses of a Popen."""

    def __init__(self, process: Any) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self.process.exitcode


@pytest.mark.slow
def test_verify_resume_compares_a_killed_run_with_an_uninterrupted_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the uninterrupted run is started from the command line: the others need not import torch again."""
    verify = importlib.import_module("scripts.verify_resume")
    start = verify.start

    def started(chosen: argparse.Namespace, name: str) -> "subprocess.Popen[bytes] | Forked":
        if name == "whole":
            return start(chosen, name)
        job = Job(tmp_path, 1, command, chosen.command, *chosen.settings, f"out={chosen.out / name}")
        return Forked(job.processes[0])

    monkeypatch.setattr(verify, "start", started)
    tiny = ["loader.workers=0", "train.device=cpu", "model=asa_tiny", "crop=32", "optim.warmup=1", "train.steps=40"]
    arguments = ["pretrain", f"data.store={store}", *tiny, "train.save_every=5"]
    monkeypatch.setattr(sys, "argv", ["verify", "--kills", "2", "--out", str(tmp_path / "v"), *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert verify.main() == 0
    assert "the same weights" in capsys.readouterr().out


def test_a_run_is_not_opened_for_fewer_steps_than_it_has(tmp_path: Path) -> None:
    split, backend = {"train": ["a"], "validation": [], "test": []}, Backend.of("cpu", "fp32")

    def opened(steps: int) -> str:
        config = {"out": str(tmp_path / "run"), "train": {"steps": steps}}
        with open_run(config, split, TrainSettings(steps=steps, device="cpu"), backend) as run:
            return (run / "config.yaml").read_text()

    opened(4)
    checkpoint(tmp_path / "run", 4)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/run has 4 steps, and train.steps=3: give 4 or more to go on"):
        opened(3)
    assert "steps: 4" in (tmp_path / "run" / "config.yaml").read_text()
    assert "steps: 4" in opened(4) and unfinished(tmp_path / "run") == "" == unfinished("asa://tiny-t1")
    assert "steps: 9" in opened(9)
    assert unfinished(tmp_path / "run").startswith(f"note: {tmp_path}/run has 4 of 9 steps: it was stopped")
