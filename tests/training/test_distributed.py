"""Laws of training in several processes. Each test is bounded: a process that does not end is killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import PATIENCE, Job, command, log, losses, ranks, replaced, steps_done, tiny_run, until
from safetensors.torch import load_file

from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import EndlessSampler, collate
from asa.data.store import Store
from asa.methods.pretrain import MaskedPretraining
from asa.methods.segment import Segmentation
from asa.models.masked_autoencoder import asa_tiny
from asa.models.unet import unet_tiny
from asa.ops.labels import IGNORED
from asa.settings import LoaderSettings, OptimSettings, TrainSettings
from asa.training import distributed, process
from asa.training.checkpoint_files import list_checkpoints
from asa.training.distributed import process_group
from asa.training.loop import train
from asa.training.process import RESUME_CODE

several = pytest.mark.distributed


class PartlyIgnored(Store):
    """A store in which a different fraction of each scan's label is ignored."""

    def label(self, id: str) -> np.ndarray | None:
        label = np.array(super().label(id))
        label[:, : 20 * int(id[1:])] = IGNORED  # s0: nothing, s3: most voxels
        return label


def segment(run: Path, store: Path) -> None:
    """Fine-tune a tiny U-Net in double precision."""
    # In single precision the normalisation over the U-Net's few coarsest voxels amplifies rounding: the losses of one
    # process differ by 1e-2 after 20 steps if its batch is computed in two parts.
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    opened = PartlyIgnored(store)
    method = Segmentation(
        model=unet_tiny(img_size=(64, 32, 32), out_channels=4, feature_size=1, embed_dim=24, depth=4, num_heads=2)
    )
    dataset = CropDataset(opened, opened.records, (64, 32, 32), crop="random", labelled=True)
    run.mkdir(exist_ok=True)
    settings = TrainSettings(steps=8, batch_size=2, device="cpu", precision="fp32", log_every=1)
    optim = OptimSettings(name="sgd", lr=0.01, schedule="poly")
    loader = LoaderSettings(workers=0)
    with process_group(torch.device("cpu"), 0.5), replaced(torch.Tensor, "float", torch.Tensor.double):
        train(method, dataset, run, settings=settings, optim=optim, loader=loader, description={"model": {}})


def finished(ended: list) -> bool:
    """Whether all processes succeeded; prints their output."""
    print(*[f"{one.code}: {one.text}" for one in ended], sep="\n")
    return all(one.code == 0 for one in ended)


def test_the_processes_divide_the_samples_of_each_step_without_losing_any() -> None:
    def first(n: int, **where: int) -> list[list]:
        batches = iter(EndlessSampler(7, 12, seed=5, micro_batches=2, start_step=3, **where))
        return [next(batches) for _ in range(n)]

    whole = first(6)
    for world in (2, 3, 6):
        parts = [first(6, rank=rank, world_size=world) for rank in range(world)]
        assert [[address for part in step for address in part] for step in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match=r"4 processes with train.accumulate=2 do not divide train.batch_size=12"):
        first(1, rank=0, world_size=4)


@several
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (2, 2)])
def test_two_processes_pretrain_like_one(store: Path, tmp_path: Path, world: int, accumulate: int) -> None:
    tiny_run(tmp_path / "one", store, 20)
    assert finished(ranks(tmp_path, world, tiny_run, tmp_path / "many", store, 20, accumulate=accumulate))
    one, many = tmp_path / "one", tmp_path / "many"
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-6)
    keys = ("step", "masked_mse", "mean_predictor_mse", "gradient_norm")
    np.testing.assert_allclose(np.array(log(many, *keys)), np.array(log(one, *keys)), rtol=1e-5)


@several
def test_two_processes_fine_tune_like_one_with_ignored_voxels(store: Path, tmp_path: Path) -> None:
    assert finished(ranks(tmp_path, 1, segment, tmp_path / "one", store))
    assert finished(ranks(tmp_path, 2, segment, tmp_path / "two", store))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)


def gradients(out: Path, store: Path) -> None:
    """Save the gradient of one global batch."""
    torch.manual_seed(0)
    opened = Store(store)
    method = MaskedPretraining(model=asa_tiny(img_size=32, embed_dim=24, depth=2, num_heads=2))
    dataset = CropDataset(opened, opened.records, (32, 32, 32))
    with process_group(torch.device("cpu"), 0.5):
        world, rank = distributed.world_size(), distributed.rank()
        addresses = next(iter(EndlessSampler(4, 4, rank=rank, world_size=world)))
        batch = collate([dataset[address] for address in addresses])
        ddp = distributed.data_parallel(method)
        ddp(batch)["loss"].backward()
        # Delete it before its process group: torch 2.13 may otherwise deadlock, waiting for a gloo thread while
        # holding the interpreter's lock.
        del ddp
    if distributed.is_main():
        torch.save({name: weight.grad for name, weight in method.named_parameters()}, out)


@several
def test_the_gradient_is_that_of_the_global_batch(store: Path, tmp_path: Path) -> None:
    gradients(tmp_path / "one.pt", store)
    assert finished(ranks(tmp_path, 2, gradients, tmp_path / "two.pt", store))
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    scale = max(gradient.abs().max() for gradient in one.values())
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6 * scale


@several
def test_a_run_continues_with_another_number_of_processes(store: Path, tmp_path: Path) -> None:
    tiny_run(tmp_path / "whole", store, 12)
    run = tmp_path / "changed"
    with pytest.raises(KeyboardInterrupt):
        stopped_after(run, store, 5)
    job = Job(tmp_path, 2, stopped_after, run, store, 9)
    assert all(one.code != 0 for one in job.wait())
    assert list_checkpoints(run)[-1].name == "step-00000008"
    tiny_run(run, store, 12)
    np.testing.assert_allclose(losses(run), losses(tmp_path / "whole"), rtol=1e-6)


def stopped_after(run: Path, store: Path, step: int) -> None:
    """A run of 12 steps that is interrupted after some."""
    forward, calls = MaskedPretraining.forward, []

    def counted(self, batch):
        calls.append(1)
        if len(calls) > step - done:
            raise KeyboardInterrupt
        return forward(self, batch)

    done = int(list_checkpoints(run)[-1].name[5:]) if list_checkpoints(run) else 0
    with replaced(MaskedPretraining, "forward", counted):
        tiny_run(run, store, 12)


def slow(run: Path, store: Path) -> None:
    """A long run with steps of at least 0.05 s, which exits with the resume code as a command does."""
    from asa.training.process import Stopped

    def delayed(self, batch):
        time.sleep(0.05)
        return forward(self, batch)

    with replaced(MaskedPretraining, "forward", delayed) as forward:
        try:
            tiny_run(run, store, 400, save_every=1000)
        except Stopped:
            sys.exit(RESUME_CODE)


@several
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_saves_and_stops_all(
    store: Path, tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    job = Job(tmp_path, 2, slow, run, store)
    until(lambda: steps_done(run) >= 3)
    job.send(rank, number)
    ended = job.wait()
    print(*[one.text for one in ended])
    assert [one.code for one in ended] == [RESUME_CODE, RESUME_CODE]
    (checkpoint,) = list_checkpoints(run)
    assert int(checkpoint.name[5:]) == steps_done(run)  # the step at which both stopped


def with_nonfinite_loss(run: Path, store: Path, steps: list[int], on_rank: int) -> None:
    """A run whose loss is NaN at some steps of one rank."""
    calls = []

    def nonfinite(self, batch):
        calls.append(1)
        result = forward(self, batch)
        wrong = len(calls) in steps and distributed.rank() == on_rank
        return {**result, "loss": result["loss"] * float("nan")} if wrong else result

    with replaced(MaskedPretraining, "forward", nonfinite) as forward:
        tiny_run(run, store, 16)


@several
def test_all_processes_skip_a_step_that_is_not_finite_on_one(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finished(ranks(tmp_path, 2, with_nonfinite_loss, run, store, [3, 7], 1))
    skipped = log(run, "step", "what", "ids", group="skipped")
    assert [row[:2] for row in skipped] == [(3, "loss"), (7, "loss")]
    order = [address[0] for address in list(zip(range(3), EndlessSampler(4, 4), strict=False))[2][1]]
    assert skipped[0][2] == [Store(store).records[k]["id"] for k in order[2:]]  # rank 1's samples only
    assert log(run, "skipped_steps")[-1] == (2,)
    weights = load_file(list_checkpoints(run)[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@several
def test_ten_skipped_steps_in_a_row_stop_all_processes_and_dump_the_batch(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = ranks(tmp_path, 2, with_nonfinite_loss, run, store, list(range(5, 30)), 1)
    assert all(one.code == 1 and "FloatingPointError" in one.text for one in ended)
    assert "10 steps in a row, the last of them step 14: stopped before saving" in ended[0].text
    assert list_checkpoints(run)[-1].name == "step-00000004"
    (dump,) = (run / "nonfinite").iterdir()
    kept = torch.load(dump, weights_only=True)
    assert dump.name == "step-00000014-rank-1.pt" and kept["batches"][0]["image"].shape == (2, 1, 32, 32, 32)
    assert kept["batches"][0]["id"] == log(run, "ids", group="skipped")[-1][0]


def failing(run: Path, store: Path, kind: str) -> None:
    """A run whose rank 1 fails at its fourth step."""
    calls = []

    def broken(self, batch):
        calls.append(1)
        if distributed.rank() == 1 and len(calls) == 4:
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raises":
                raise RuntimeError("test failure on rank 1")
            time.sleep(1000)
        return forward(self, batch)

    with replaced(MaskedPretraining, "forward", broken) as forward:
        tiny_run(run, store, 400, timeout=0.1)


@several
@pytest.mark.parametrize("kind", ["dies", "raises", "hangs"])
def test_a_process_that_fails_ends_the_job_within_the_timeout(store: Path, tmp_path: Path, kind: str) -> None:
    ended = Job(tmp_path, 2, failing, tmp_path / "run", store, kind).wait()
    print(*[one.text for one in ended])
    assert all(one.code not in (0, None) for one in ended)
    if kind == "raises":
        assert "test failure on rank 1" in ended[1].text
    if kind == "hangs":  # it prints its stack
        assert "Timeout" in ended[1].text and "in broken" in ended[1].text


@several
@pytest.mark.slow
def test_only_the_main_process_prints(store: Path, tmp_path: Path) -> None:
    tiny = ["loader.workers=0", "train.device=cpu", "optim.warmup=1", "model=asa_tiny", "crop=32", "train.steps=2"]
    run = tmp_path / "run"
    arguments = [f"data.store={store}", f"out={run}", *tiny, "data.split.validation=2"]
    ended = ranks(tmp_path, 2, command, "pretrain", *arguments, "train.batch_size=2")
    assert finished(ended)
    assert "mean predictor" in ended[0].text and ended[1].text == ""
    # An error that only the main process finds ends the others silently; an invalid setting is an error on all ranks.
    ended = ranks(tmp_path, 2, command, "pretrain", *arguments, "train.batch_size=2", "optim.lr=0.5")
    assert [one.code for one in ended] == [1, 1] and "optim.lr" in ended[0].text and ended[1].text == ""
    ended = ranks(tmp_path, 2, command, "pretrain", *arguments[:1], f"out={run}2", *tiny, "train.batch_size=3")
    assert all(one.code == 1 and "2 processes" in one.text for one in ended) and not Path(f"{run}2").exists()
    ended = ranks(
        tmp_path, 2, command, "finetune", f"data.store={store}", f"out={tmp_path}/fine", f"init={run}",
        *tiny[:3], "model=unet_tiny", "+model.feature_size=4", "crop=[64,32,32]", "train.steps=2", "train.batch_size=2",
        "data.split={validation: 1, test: 0}", "predict.overlap=0",
    )  # fmt: skip
    assert finished(ended) and "dice" in ended[0].text and ended[1].text == ""


@several
def test_validation_in_two_processes_gives_the_result_of_one(store: Path, tmp_path: Path) -> None:
    tiny = ["loader.workers=0", "train.device=cpu", "optim.lr=0", "optim.warmup=0", "model=asa_tiny", "crop=32"]
    shared = [f"data.store={store}", *tiny, "train.steps=1", "train.batch_size=2", "data.split.validation=3"]
    for world in (1, 2):
        assert finished(ranks(tmp_path, world, command, "pretrain", f"out={tmp_path}/{world}", *shared))
    one, two = (log(tmp_path / str(world), "loss", "masked_mse", group="validation") for world in (1, 2))
    assert one == two


@several
@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_the_run_is_the_same(store: Path, tmp_path: Path) -> None:
    tiny = [
        "loader.workers=0",
        "train.device=cpu",
        "train.precision=fp32",
        "train.log_every=1",
        "model=asa_tiny",
        "crop=32",
        "train.steps=40",
        "optim.warmup=1",
    ]
    arguments = [f"data.store={store}", *tiny, "train.batch_size=4", "train.save_every=5"]
    assert finished(ranks(tmp_path, 1, command, "pretrain", *arguments, f"out={tmp_path}/one"))
    run = tmp_path / "many"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launch, "-m", "asa", "pretrain", *arguments, f"out={run}"], env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until(lambda: steps_done(run) >= 12)
        os.kill(process_of_rank(1, run), signal.SIGKILL)
        text, _ = process.communicate(timeout=PATIENCE)
    finally:
        for rank in (0, 1):
            with suppress(AssertionError):
                os.kill(process_of_rank(rank, run), signal.SIGKILL)
        process.kill()
    print(text)
    assert process.returncode == 0
    np.testing.assert_allclose(losses(run), losses(tmp_path / "one"), rtol=1e-6)


def process_of_rank(rank: int, run: Path) -> int:
    """Process id of a rank of the job that writes a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"out={run}".encode() in (folder / "cmdline").read_bytes().split(b"\0")
            if ours and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


def test_a_process_uses_the_gpu_of_its_number_on_the_machine_also_if_there_are_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (process.world_size(), process.rank(), process.local_rank()) == (1, 0, 0)
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert (process.world_size(), process.rank(), process.local_rank()) == (2, 1, 1)
