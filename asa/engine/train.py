"""The training loop, for every method."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asa.data.loader import CropDataset, LoaderSettings, make_loader
from asa.engine.checkpoint import list_checkpoints, load_training, load_weights, save_checkpoint
from asa.engine.logging import RunLog
from asa.engine.optim import OptimSettings, Schedule, make_optimizer, set_learning_rate

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Validate = Callable[[int], tuple[dict[str, float], dict[str, np.ndarray]]]


@dataclass
class TrainSettings:
    """How long, on what and how often."""

    steps: int = 10000
    "optimizer steps of the whole run"
    batch_size: int = 2
    "samples a step"
    accumulate: int = 1
    "micro-batches a step is computed in; less memory, the same step"
    device: str = "auto"
    "auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    precision: str = "auto"
    "auto (bf16 or fp16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16"
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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: give 1 or more")
        for name in ("clip", "seed", "validate_every", "save_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}: give 0 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size}")


def pick_device(name: str) -> torch.device:
    """The device that a setting means.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; give auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name}, but torch {torch.__version__} sees no GPU here: use device=cpu or install a CUDA build"
        )
    return device


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


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision of a device and type; float32 switches an outer one off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def train(
    method: nn.Module,
    dataset: CropDataset,
    run: Path,
    *,
    settings: TrainSettings,
    optim: OptimSettings,
    loader: LoaderSettings,
    description: Mapping[str, Any],
    validate: Validate | None = None,
) -> dict[str, float]:
    """Train a method to its last step, from its newest checkpoint if the run has one.

    Args:
        method: see `asa.methods.base.Method`; its weights are changed in place.
        dataset: the training crops.
        run: the run folder, written to.
        settings, optim, loader: see the classes.
        description: plain data kept in every checkpoint, enough to rebuild `method.model`.
        validate: called with the steps done, returns numbers and pictures for the log. The method is in evaluation
            mode meanwhile.

    Returns:
        The numbers of the last validation, or of the last logged step.

    Raises:
        ValueError: settings that do not fit each other or this machine.
        FloatingPointError: the loss or the gradient is no longer finite.
    """
    # --- where, and in what precision
    device = pick_device(settings.device)
    dtype = pick_precision(settings.precision, device)
    schedule = Schedule(optim, settings.steps, settings.batch_size)
    method.to(device).train()

    # --- what is optimised, and where the run stands
    optimizer = make_optimizer(method, optim)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, planned = resume(run, method, optimizer, scaler)
    log = RunLog(run, settings.steps, step)
    if step:
        log.say(f"the run stands at step {step} of {settings.steps}")
    if planned not in (0, settings.steps) and optim.schedule != "constant":
        log.say(
            f"warning: the learning rate followed a plan of {planned} steps, and follows one of {settings.steps} now"
        )
    batches = iter(
        make_loader(
            dataset,
            settings.batch_size,
            loader,
            micro_batches=settings.accumulate,
            start_step=step,
            pin_memory=device.type == "cuda",
        )
    )
    meter = Meter(settings.batch_size)
    saved_at, saved_step, last = time.monotonic(), step, {}

    def save() -> None:
        training = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "steps": settings.steps,
        }
        save_checkpoint(run, step, method, description, training, settings.keep)

    # --- the loop
    try:
        while step < settings.steps:
            set_learning_rate(optimizer, schedule[step])
            for _ in range(settings.accumulate):
                batch = meter.wait(batches)
                batch = {key: _to_device(key, value, device) for key, value in batch.items()}
                with autocast(device, dtype):
                    result = method(batch)
                scaler.scale(result["loss"] / settings.accumulate).backward()
                meter.add(result, settings.accumulate)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(method.parameters(), settings.clip or float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            done = step == settings.steps
            due = (
                done
                or step - saved_step >= settings.save_every
                or time.monotonic() - saved_at >= 60 * settings.save_minutes
            )
            if step % settings.log_every == 0 or due:
                values = meter.read(gradient_norm=norm, lr=schedule[step - 1])
                check_finite(values, dtype, step, saved_step, batch["id"])
                log.scalars(step, "train", values)
                log.progress(step, values)
                last = values
            if due:
                save()
                saved_at, saved_step = time.monotonic(), step
                meter.restart()
            if validate and (done or (settings.validate_every and step % settings.validate_every == 0)):
                method.eval()
                with torch.no_grad(), autocast(device, dtype):
                    numbers, pictures = validate(step)
                method.train()
                log.scalars(step, "validation", numbers)
                log.pictures(step, pictures)
                log.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
                last = numbers
                meter.restart()
    finally:
        log.close()
    return last


def resume(
    run: Path, method: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[int, int]:
    """Take up the run's newest checkpoint: the steps done and those planned then, 0 and 0 if there is none."""
    found = list_checkpoints(run)
    if not found:
        return 0, 0
    weights, training = load_training(found[-1])
    load_weights(method, weights, str(found[-1]))
    optimizer.load_state_dict(training["optimizer"])
    scaler.load_state_dict(training["scaler"])
    torch.set_rng_state(training["random"])
    return int(training["step"]), int(training["steps"])


def check_finite(values: Mapping[str, float], dtype: torch.dtype, step: int, saved_step: int, ids: list[str]) -> None:
    """Stop before a checkpoint is written from numbers that are not finite; fp16 has a scaler that skips such steps."""
    watched = ("loss",) if dtype == torch.float16 else ("loss", "gradient_norm")
    for name in watched:
        if not np.isfinite(values[name]):
            raise FloatingPointError(
                f"{name} {values[name]} at step {step}: stopped before saving; the last checkpoint is of step "
                f"{saved_step}. Lower optim.lr, or look at the scans {', '.join(ids)}"
            )


class Meter:
    """Sums what the steps return on the device, and times them; read back only for the log."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.sums: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Forget what was timed and summed."""
        self.sums, self.micro_batches, self.accumulate, self.waited = {}, 0, 1, 0.0
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

    def add(self, result: Mapping[str, Tensor], accumulate: int) -> None:
        """Add a micro-batch's numbers."""
        for name, value in result.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_batches += 1
        self.accumulate = accumulate

    def read(self, *, gradient_norm: Tensor, lr: float) -> dict[str, float]:
        """Means since the last reading, waiting for the device, and start again."""
        values = {name: (value / self.micro_batches).item() for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.start
        samples = self.micro_batches * self.batch_size / self.accumulate
        values |= {
            "lr": lr,
            "gradient_norm": gradient_norm.item(),
            "volumes_per_second": samples / seconds,
            "data_wait": self.waited / seconds,
        }
        self.restart()
        return values


def _to_device(key: str, value: Any, device: torch.device) -> Any:
    # Seeds stay on the CPU: masks are drawn from them there.
    if isinstance(value, Tensor) and key != "seed":
        return value.to(device, non_blocking=True)
    return value
