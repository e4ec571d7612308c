"""Tiny runs in processes as torchrun starts them: forked from one that has imported torch, with a time limit."""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.cli import COMMANDS

FORK = multiprocessing.get_context("forkserver")  # which has imported what conftest.py says

PATIENCE = 120  # seconds that a test waits for what takes a few; a busy machine may need most of them

MODEL = {
    "_target_": "asa.models.masked_autoencoder.asa_tiny",
    "img_size": 32,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}


def tiny_run(run: Path, store: Path, steps: int = 6, workers: int = 0, timeout: float = 0.5, **settings: Any) -> None:
    """Pretrain a tiny autoencoder on four scans, in as many processes as the environment says."""
    from asa.data.loading.crops import CropDataset
    from asa.data.loading.loader import LoaderSettings
    from asa.data.store import Store
    from asa.methods.pretrain import MaskedPretraining
    from asa.models.masked_autoencoder import asa_tiny
    from asa.training.distributed import is_main, process_group, rank
    from asa.training.loop import TrainSettings, train
    from asa.training.optim import OptimSettings

    torch.set_num_threads(1)
    torch.manual_seed(rank())  # each rank starts from other weights: those of rank 0 must be used
    opened = Store(store)
    method = MaskedPretraining(model=asa_tiny(**{k: v for k, v in MODEL.items() if k != "_target_"}))
    optim = settings.pop("optim", OptimSettings(lr=1e-3, warmup=1))
    cpu = dict(device="cpu", precision="fp32")
    chosen = TrainSettings(**{**cpu, **dict(steps=steps, batch_size=4, log_every=1, save_every=2), **settings})
    dataset = CropDataset(opened, opened.records, (32, 32, 32), crop="random", seed=chosen.seed)
    if is_main():
        run.mkdir(parents=True, exist_ok=True)
    loader = LoaderSettings(workers=workers)
    with process_group(torch.device("cpu"), timeout):
        train(method, dataset, run, settings=chosen, optim=optim, loader=loader, description={"model": MODEL})


def log(run: Path, *keys: str, group: str = "train") -> list[tuple]:
    """Values of some keys from the run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in keys) for line in lines if line["group"] == group]


def losses(run: Path) -> np.ndarray:
    """The logged training losses of a run."""
    return np.array(log(run, "loss"))[:, 0]


def command(name: str, *arguments: object) -> None:
    """Run a command, and exit with its code."""
    sys.argv = [f"asa-{name}", *map(str, arguments)]
    sys.exit(COMMANDS[name].main())


@dataclass
class Ended:
    """Exit code and output of a process."""

    code: int | None
    text: str


class Job:
    """Processes that each run a function, as ranks of one job."""

    def __init__(self, folder: Path, world: int, function: Callable[..., None], *arguments: Any, **keywords: Any):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [folder / f"rank-{rank}.txt" for rank in range(world)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            env = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
            process = FORK.Process(target=_child, args=(env, output, function, arguments, keywords))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[Ended]:
        """Wait for all processes; those that do not end are killed, and their code is None."""
        until = time.monotonic() + PATIENCE
        ended = []
        for process, output in zip(self.processes, self.outputs, strict=True):
            process.join(max(0.0, until - time.monotonic()))
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
            ended.append(Ended(code, output.read_text()))
        return ended

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one of the processes."""
        os.kill(self.processes[rank].pid, number)


def _child(env: dict[str, Any], output: Path, function: Callable[..., None], arguments: Any, keywords: Any) -> None:
    os.environ.update({key: str(value) for key, value in env.items()})
    os.setsid()
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    faulthandler.dump_traceback_later(PATIENCE - 5, file=handle)  # prints where a process hangs before it is killed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in a background job
    torch.set_num_threads(1)
    function(*arguments, **keywords)


def ranks(folder: Path, world: int, function: Callable[..., None], *arguments: Any, **keywords: Any) -> list[Ended]:
    """Run a function in several processes and wait for them."""
    return Job(folder, world, function, *arguments, **keywords).wait()


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def steps_done(run: Path) -> int:
    """Number of lines in the run's log."""
    file = run / "log.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[Any]:
    """Replace an attribute inside the context; yields the original value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def forked_rows(run_row: Callable[..., dict[str, Any]], main: Callable[[], None], folder: Path) -> Callable[..., Any]:
    """A benchmark's `run_row` whose rows run in processes that have imported torch; only the machine's starts anew."""

    def measured(spec: dict[str, Any], timeout: float) -> dict[str, Any]:
        if spec["kind"] == "machine":
            return run_row(spec, timeout)
        output = folder / "row.txt"
        process = FORK.Process(target=_print_row, args=(main, spec, output))
        process.start()
        process.join(timeout)
        lines = output.read_text().splitlines()
        assert process.exitcode == 0, lines
        return {"status": "ok", **json.loads(lines[-1])}

    return measured


def _print_row(main: Callable[[], None], spec: dict[str, Any], output: Path) -> None:
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        sys.argv = ["row", json.dumps(spec)]
        main()
