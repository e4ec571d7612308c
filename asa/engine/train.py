"""The training loop, for every method."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asa.data.loader import LoaderSettings, Samples, check_batch, make_loader
from asa.engine import distributed
from asa.engine.allocator import keep_freed_memory
from asa.engine.best import best_line, keep_best
from asa.engine.checkpoint import load_newest, load_training, load_weights, save_checkpoint
from asa.engine.ema import Average
from asa.engine.guard import Guard
from asa.engine.logging import RunLog, SilentLog
from asa.engine.optim import OptimSettings, Schedule, freeze, make_optimizer, set_learning_rate, set_training
from asa.engine.stopping import Stopped, stop_signals

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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


def pick_device(name: str) -> torch.device:
    """The device that a setting means. Of several processes on a machine each has the GPU of its local rank.

    Raises:
        ValueError: a GPU is asked for and there is none, or fewer than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; give auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name}, but torch {torch.__version__} sees no GPU here: use device=cpu or install a CUDA build"
        )
    if device.type != "cuda" or distributed.world_size() == 1:
        return device
    if device.index is not None:
        raise ValueError(f"device={name}: of several processes each has its own GPU; give cuda")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
    return torch.device("cuda", distributed.local_rank())


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in.

    Raises:
        ValueError: an unknown name, or fp16 on a CPU.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in PRECISIONS:
        raise ValueError(f"precision is auto, {', '.join(PRECISIONS)}, not {name!r}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU: use fp32, or bf16 where the CPU computes it")
    return PRECISIONS[name]


def check_settings(settings: TrainSettings, optim: OptimSettings) -> None:
    """Raise a ValueError now for what `train` would refuse after the run folder is made."""
    pick_precision(settings.precision, pick_device(settings.device))
    Schedule(optim, settings.steps, settings.batch_size)
    check_batch(settings.batch_size, settings.accumulate, distributed.world_size())


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision of a device and type; float32 switches an outer one off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


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

    With several processes (see `asa.engine.distributed.joined`) all call this with the same arguments.

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
    # --- where, and in what precision
    check_settings(settings, optim)
    if settings.best and validate is None:
        raise ValueError(f"train.best={settings.best}: nothing is validated: give the split a validation part")
    device = pick_device(settings.device)
    dtype = pick_precision(settings.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    schedule = Schedule(optim, settings.steps, settings.batch_size)
    freeze(method.get_submodule("model"), optim.freeze)
    set_training(method.to(device))
    if settings.compile:
        method.get_submodule("model").compile()

    # --- what is optimised, and where the run stands
    optimizer = make_optimizer(method, optim)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = Average(method, settings.ema)
    before = resume(run, method, optimizer, scaler, average)
    step, planned = before.get("step", 0), before.get("steps", 0)
    log = RunLog(run, settings.steps, step) if distributed.is_main() else SilentLog()
    if step:
        log.say(f"the run stands at step {step} of {settings.steps}")
    if planned not in (0, settings.steps) and optim.schedule != "constant":
        log.say(
            f"warning: the learning rate followed a plan of {planned} steps, and follows one of {settings.steps} now"
        )
    guard = Guard(run, log, optimizer, fp16=dtype == torch.float16)
    guard.load_state_dict(before.get("guard", guard.state_dict()))
    ddp = distributed.wrapped(method)
    batches = iter(
        make_loader(
            dataset,
            settings.batch_size,
            loader,
            micro_batches=settings.accumulate,
            start_step=step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=device.type == "cuda",
        )
    )
    meter = Meter(settings.batch_size)
    saved_at, saved_step, last = time.monotonic(), step, {}
    kept = {**description, **({"ema": settings.ema} if settings.ema else {})}

    def save() -> None:
        training = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "guard": guard.state_dict(),
            "random": torch.get_rng_state(),
            "steps": settings.steps,
        }
        if settings.ema:
            training["weights"] = {name: tensor.detach().cpu() for name, tensor in method.state_dict().items()}
        with average.in_place():
            save_checkpoint(run, step, method, kept, training, settings.keep)

    def watch(validate: Validate) -> dict[str, float]:
        method.eval()
        with torch.no_grad(), autocast(device, dtype), average.in_place():
            numbers, pictures = validate(step)
            name = settings.best
            best = name is not None and distributed.on_main(lambda: keep_best(run, step, name, numbers, method, kept))
        set_training(method)
        log.scalars(step, "validation", numbers)  # after the best is kept: a validation that is logged is done
        log.pictures(step, pictures)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        log.say(f"step {step}: {shown}{'  (the best, kept)' if best else ''}")
        meter.restart()
        return numbers

    # --- the loop
    try:
        with stop_signals() as stop:
            # A validation that was due when the run was stopped: the log does not have it.
            missed = step > 0 and _validates(settings, step)
            if validate and missed and not distributed.on_main(lambda: log.has(step, "validation")):
                last = watch(validate)
            while step < settings.steps:
                distributed.alive()
                set_learning_rate(optimizer, schedule[step])
                meter.mark()
                for part in range(settings.accumulate):
                    batch = meter.wait(batches)
                    moved = on_device(batch, device)
                    final = part == settings.accumulate - 1
                    if final:
                        late = time.monotonic() - saved_at >= 60 * settings.save_minutes
                        agreed = distributed.any_rank(stop.asked, late and distributed.is_main())
                    with distributed.exchange(ddp, final):
                        with autocast(device, dtype):
                            result = ddp(moved)
                        loss = guard.add(batch, result["loss"])
                        scaler.scale(loss / settings.accumulate).backward()
                    meter.add(result, settings.accumulate)
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(method.parameters(), settings.clip or float("inf"))
                meter.leave_out(guard.judge(step + 1, norm))
                optimizer.step()  # not the scaler's: the guard tells what to skip
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                average.update(step)

                stopping, late = agreed()
                done = step == settings.steps
                due = done or stopping or late or step - saved_step >= settings.save_every
                if step % settings.log_every == 0 or due:
                    values = meter.read(gradient_norm=norm, lr=schedule[step - 1])
                    guard.settle()
                    values["skipped_steps"] = guard.skipped
                    log.scalars(step, "train", values)
                    log.progress(step, values)
                    last = values
                # After a step that was skipped the weights may be what is wrong: not saved, but for the last time.
                if due and (done or stopping or not guard.in_a_row):
                    distributed.on_main(save)
                    saved_at, saved_step = time.monotonic(), step
                    meter.restart()
                if stopping and not done:
                    raise Stopped(f"stopped at step {step} of {settings.steps}, and saved in {run}")
                if validate and _validates(settings, step):
                    last = watch(validate)
        if settings.best and distributed.is_main():
            log.say(best_line(run))
    finally:
        log.close()
    return last


def _validates(settings: TrainSettings, step: int) -> bool:
    """Whether a validation is due after so many steps."""
    return step == settings.steps or (settings.validate_every > 0 and step % settings.validate_every == 0)


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


class Meter:
    """Sums what the steps return on the device, and times them; read back only for the log."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forget what was timed and summed."""
        self.sums: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.left_out: Tensor | float = 0.0
        self.micro_batches, self.accumulate, self.waited = 0, 1, 0.0
        self.start = time.perf_counter()

    def wait(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch, its waiting time counted."""
        start = time.perf_counter()
        try:
            batch = next(batches)
        except (ValueError, OSError) as error:
            # A worker hands over its whole traceback as the message; its last line says what happened.
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        self.waited += time.perf_counter() - start
        return batch

    def mark(self) -> None:
        """A step begins."""
        self.before = dict(self.sums)

    def add(self, result: Mapping[str, Tensor], accumulate: int) -> None:
        """Add a micro-batch's numbers."""
        for name, value in result.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_batches += 1
        self.accumulate = accumulate

    def leave_out(self, skipped: Tensor) -> None:
        """Forget the numbers of the step that ends, if it is skipped (1.0, else 0.0)."""
        for name, value in self.sums.items():
            self.sums[name] = torch.where(skipped > 0, self.before.get(name, torch.zeros_like(value)), value)
        self.left_out = self.left_out + skipped

    def read(self, *, gradient_norm: Tensor, lr: float) -> dict[str, float]:
        """Means since the last reading and over the ranks, waiting for the device, and start again.

        Steps that were skipped are left out; where all were, so are the names of what is averaged.
        """
        counted = self.micro_batches - int(self.left_out) * self.accumulate
        means = distributed.mean_over_ranks({name: value / max(counted, 1) for name, value in self.sums.items()})
        values = {name: value.item() for name, value in means.items()} if counted else {}
        seconds = time.perf_counter() - self.start
        values |= {
            "lr": lr,
            "volumes_per_second": self.micro_batches * self.batch_size / self.accumulate / seconds,
            "data_wait": self.waited / seconds,
        }
        if math.isfinite(norm := gradient_norm.item()):
            values["gradient_norm"] = norm
        self.restart()
        return values


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; seeds stay on the CPU, where masks are drawn from them."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key != "seed" else value
        for key, value in batch.items()
    }
