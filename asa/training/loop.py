"""The training loop, for every method."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asa.data.loading.crops import Samples
from asa.data.loading.loader import LoaderSettings, check_batch, make_loader
from asa.training import distributed
from asa.training.allocator import keep_freed_memory
from asa.training.best import best_line, keep_best
from asa.training.checkpoint import load_newest, load_training, load_weights, save_checkpoint
from asa.training.device import autocast, on_device, pick_device, pick_precision
from asa.training.ema import Average
from asa.training.meter import Meter
from asa.training.nonfinite import Guard
from asa.training.optim import OptimSettings, Schedule, freeze, make_optimizer, set_learning_rate, set_training
from asa.training.run_log import RunLog, SilentLog
from asa.training.signals import Stopped, StopRequest, stop_signals

Validate = Callable[[int], tuple[dict[str, float], dict[str, np.ndarray]]]


@dataclass
class TrainSettings:
    """How long, on what and how often."""

    steps: int = 10000
    "optimizer steps of the whole run"
    batch_size: int = 2
    "samples a step, of all processes together"
    accumulate: int = 1
    "micro-batches a process computes its part of a step in; less memory, the same step"
    device: str = "auto"
    "auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    precision: str = "auto"
    "auto (bf16 or fp16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16"
    compile: bool = False
    "compile the network with torch.compile: the first steps take a minute or more"
    ema: float = 0.0
    "decay of an average of the weights, like 0.999, that is validated and kept for use; 0 keeps the weights themselves"
    clip: float = 1.0
    "largest gradient norm; 0 does not clip"
    seed: int = 0
    "start of every random draw"
    log_every: int = 10
    "steps between lines of the log"
    validate_every: int = 500
    "steps between validations; 0: only at the end"
    save_every: int = 500
    "steps between checkpoints"
    save_minutes: float = 20.0
    "minutes between checkpoints, whichever comes first"
    keep: int = 2
    "newest checkpoints to keep"
    best: str | None = None
    "a number of the validation, like dice, whose highest weights are kept too, in OUT/best; -loss: the lowest"
    timeout_minutes: float = 10.0
    "with several processes: one that makes no progress for so long ends the run"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: give 1 or more")
        for name in ("clip", "seed", "validate_every", "save_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: give 0 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema={self.ema}: a decay is 0 or more and less than 1")
        if not 0 < self.timeout_minutes < float("inf"):
            raise ValueError(f"train.timeout_minutes={self.timeout_minutes}: give a time that ends")
        check_batch(self.batch_size, self.accumulate, 1)


def check_settings(settings: TrainSettings, optim: OptimSettings) -> None:
    """Raise a ValueError now for what `train` would refuse after the run folder is made."""
    pick_precision(settings.precision, pick_device(settings.device))
    Schedule(optim, settings.steps, settings.batch_size)
    check_batch(settings.batch_size, settings.accumulate, distributed.world_size())


def train(
    method: nn.Module,
    dataset: Samples,
    run: Path,
    *,
    settings: TrainSettings,
    optim: OptimSettings,
    loader: LoaderSettings,
    description: Mapping[str, Any],
    validate: Validate | None = None,
) -> dict[str, float]:
    """Train a method to its last step, from its newest checkpoint if the run has one.

    With several processes (see `asa.training.distributed.joined`) all call this with the same arguments.

    Args:
        method: see `asa.methods.base.Method`; its weights are changed in place.
        dataset: the training crops.
        run: the run folder, written to by the main process.
        settings, optim, loader: see the classes.
        description: plain data kept in every checkpoint, enough to rebuild `method.model`.
        validate: called with the steps done, by all processes, returns numbers and pictures for the log. The method is
            in evaluation mode meanwhile, with the averaged weights under `train.ema`.

    Returns:
        The numbers of the last validation, or of the last logged step.

    Raises:
        ValueError: settings that do not fit each other or this machine.
        FloatingPointError: the loss or the gradient is no longer finite.
        Stopped: by SIGTERM or SIGUSR1, after saving.
    """
    check_settings(settings, optim)
    if settings.best and validate is None:
        raise ValueError(f"train.best={settings.best}: nothing is validated: give the split a validation part")
    loop = _Loop(method, dataset, run, settings, optim, loader, description)
    try:
        with stop_signals() as stop:
            loop.go(stop, validate)
        if settings.best and distributed.is_main():
            loop.log.say(best_line(run))
    finally:
        loop.log.close()
    return loop.last


class _Loop:
    """A run on its way: what is optimised, where it stands, and its log."""

    def __init__(
        self,
        method: nn.Module,
        dataset: Samples,
        run: Path,
        settings: TrainSettings,
        optim: OptimSettings,
        loader: LoaderSettings,
        description: Mapping[str, Any],
    ) -> None:
        self.method, self.run, self.settings = method, run, settings
        self.device = pick_device(settings.device)
        self.dtype = pick_precision(settings.precision, self.device)
        self.kept = {**description, **({"ema": settings.ema} if settings.ema else {})}
        if self.device.type == "cpu":
            keep_freed_memory()
        freeze(method.get_submodule("model"), optim.freeze)
        set_training(method.to(self.device))
        if settings.compile:
            method.get_submodule("model").compile()

        self.schedule = Schedule(optim, settings.steps, settings.batch_size)
        self.optimizer = make_optimizer(method, optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.average = Average(method, settings.ema)
        before = resume(run, method, self.optimizer, self.scaler, self.average)
        self.step: int = before.get("step", 0)
        self.log = RunLog(run, settings.steps, self.step) if distributed.is_main() else SilentLog()
        self._say_where_it_stands(before.get("steps", 0), optim)
        self.guard = Guard(run, self.log, self.optimizer, fp16=self.dtype == torch.float16)
        self.guard.load_state_dict(before.get("guard", self.guard.state_dict()))
        self.ddp = distributed.wrapped(method)
        self.batches = iter(
            make_loader(
                dataset,
                settings.batch_size,
                loader,
                micro_batches=settings.accumulate,
                start_step=self.step,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                pin_memory=self.device.type == "cuda",
            )
        )
        self.meter = Meter(settings.batch_size)
        self.saved_at, self.saved_step = time.monotonic(), self.step
        self.last: dict[str, float] = {}  # numbers of the last validation or logged step

    def go(self, stop: StopRequest, validate: Validate | None) -> None:
        """Step to the end of the run, or until it is told to stop."""
        # A validation that was due when the run was stopped: the log does not have it.
        missed = self.step > 0 and self._validates()
        if validate and missed and not distributed.on_main(lambda: self.log.has(self.step, "validation")):
            self._watch(validate)
        while self.step < self.settings.steps:
            norm, stopping, late = self._take_step(stop)
            done = self.step == self.settings.steps
            due = done or stopping or late or self.step - self.saved_step >= self.settings.save_every
            if self.step % self.settings.log_every == 0 or due:
                self._report(norm)
            # After a step that was skipped the weights may be what is wrong: not saved, but for the last time.
            if due and (done or stopping or not self.guard.in_a_row):
                distributed.on_main(self._save)
                self.saved_at, self.saved_step = time.monotonic(), self.step
                self.meter.restart()
            if stopping and not done:
                raise Stopped(f"stopped at step {self.step} of {self.settings.steps}, and saved in {self.run}")
            if validate and self._validates():
                self._watch(validate)

    def _take_step(self, stop: StopRequest) -> tuple[Tensor, bool, bool]:
        """A step of the optimizer: its gradient's norm, and whether the processes agreed to stop, and to save."""
        accumulate = self.settings.accumulate
        distributed.alive()
        set_learning_rate(self.optimizer, self.schedule[self.step])
        self.meter.mark()
        for part in range(accumulate):
            batch = self.meter.wait(self.batches)
            moved = on_device(batch, self.device)
            final = part == accumulate - 1
            if final:
                late = time.monotonic() - self.saved_at >= 60 * self.settings.save_minutes
                agreed = distributed.any_rank(stop.asked, late and distributed.is_main())
            with distributed.exchange(self.ddp, final):
                with autocast(self.device, self.dtype):
                    result = self.ddp(moved)
                loss = self.guard.add(batch, result["loss"])
                self.scaler.scale(loss / accumulate).backward()
            self.meter.add(result, accumulate)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.method.parameters(), self.settings.clip or float("inf"))
        self.meter.leave_out(self.guard.judge(self.step + 1, norm))
        self.optimizer.step()  # not the scaler's: the guard tells what to skip
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        stopping, late = agreed()
        return norm, stopping, late

    def _report(self, norm: Tensor) -> None:
        """The means since the last report, into the log."""
        values = self.meter.read(gradient_norm=norm, lr=self.schedule[self.step - 1])
        self.guard.settle()
        values["skipped_steps"] = self.guard.skipped
        self.log.scalars(self.step, "train", values)
        self.log.progress(self.step, values)
        self.last = values

    def _save(self) -> None:
        """Write a checkpoint."""
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "random": torch.get_rng_state(),
            "steps": self.settings.steps,
        }
        if self.settings.ema:
            training["weights"] = {name: tensor.detach().cpu() for name, tensor in self.method.state_dict().items()}
        with self.average.in_place():
            save_checkpoint(self.run, self.step, self.method, self.kept, training, self.settings.keep)

    def _watch(self, validate: Validate) -> None:
        """Validate, and keep the best weights."""
        step, name = self.step, self.settings.best
        self.method.eval()
        with torch.no_grad(), autocast(self.device, self.dtype), self.average.in_place():
            numbers, pictures = validate(step)
            best = name is not None and distributed.on_main(
                lambda: keep_best(self.run, step, name, numbers, self.method, self.kept)
            )
        set_training(self.method)
        self.log.scalars(step, "validation", numbers)  # after the best is kept: a validation that is logged is done
        self.log.pictures(step, pictures)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.log.say(f"step {step}: {shown}{'  (the best, kept)' if best else ''}")
        self.meter.restart()
        self.last = numbers

    def _validates(self) -> bool:
        """Whether a validation is due after the steps done."""
        every = self.settings.validate_every
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def _say_where_it_stands(self, planned: int, optim: OptimSettings) -> None:
        steps = self.settings.steps
        if self.step:
            self.log.say(f"the run stands at step {self.step} of {steps}")
        if planned not in (0, steps) and optim.schedule != "constant":
            self.log.say(
                f"warning: the learning rate followed a plan of {planned} steps, and follows one of {steps} now"
            )


def resume(
    run: Path,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: Average,
) -> dict[str, Any]:
    """Take up the run's newest whole checkpoint: its training state, empty if there is none."""
    found: Any = None

    def newest() -> str | None:
        nonlocal found
        found = load_newest(run, print)
        return None if found is None else str(found[0])

    path = distributed.on_main(newest)
    if path is None:
        return {}
    weights, training = load_training(Path(path)) if found is None else found[1:]
    load_weights(method, weights, path)
    average.restart()
    if "weights" in training:  # those of the file were the average
        load_weights(method, training["weights"], path)
    optimizer.load_state_dict(training["optimizer"])
    scaler.load_state_dict(training["scaler"])
    torch.set_rng_state(training["random"])
    return training
