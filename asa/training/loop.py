"""The training loop of every method: `train` reads from top to bottom."""

import json
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asa.data.loading.crops import Samples
from asa.data.loading.loader import make_loader
from asa.errors import reason_of
from asa.settings import LoaderSettings, OptimSettings, TrainSettings, check_batch
from asa.training import distributed
from asa.training.checkpoint import (
    describe_best,
    keep_best,
    load_newest,
    load_training,
    load_weights,
    read_best,
    read_description,
    save_checkpoint,
)
from asa.training.device import Backend, deterministic, keep_freed_memory, on_device, random_state, set_random_state
from asa.training.optim import EMA, Schedule, freeze, make_optimizer, set_learning_rate, set_training, unfreeze
from asa.training.process import StopNow, Stopped, stop_signals
from asa.training.run_log import RunLog, SilentLog, check_trackers
from asa.training.steps import Meter, NonFiniteGuard, RunningStatistics

SAVE_MINUTES = 20  # between checkpoints, if that comes before `train.save_every`
# Metrics and pictures, both by name; a picture is (H, W, 3) uint8.
Validation = tuple[dict[str, float], dict[str, np.ndarray]]
Validate = Callable[[int], Validation]  # called with the steps done


def check_settings(settings: TrainSettings, optim: OptimSettings) -> None:
    """Raise, before a run folder is made, for settings that do not fit each other, the processes or the trackers."""
    Schedule(optim, settings.steps, settings.batch_size)
    check_batch(settings.batch_size, settings.accumulate, distributed.world_size())
    check_trackers(settings.log_to)


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
    backend: Backend | None = None,
) -> dict[str, float]:
    """Train a method to its last step, continuing from the run's newest checkpoint if there is one.

    With several processes (see `asa.training.distributed.process_group`) all call this with the same arguments.

    Args:
        method: see `asa.methods.base.Method`; its weights are changed in place.
        dataset, run: the training crops, and the run folder, written to by the main process.
        description: plain data stored in every checkpoint, see `save_checkpoint`.
        validate: called by all processes with the number of steps done; returns metrics and pictures for the log. The
            method is in evaluation mode meanwhile, with the averaged weights under `train.ema`.
        backend: what the settings' device and precision stand for; None: resolved here.

    Returns:
        The metrics of the last validation, or of the last logged step; {} if no step was left to do.

    Raises:
        ValueError: settings that do not fit each other or this machine.
        FloatingPointError: a loss or gradient that was not finite in too many steps in a row.
        Stopped: by SIGTERM or SIGUSR1, after saving.
    """
    check_settings(settings, optim)
    if settings.best and validate is None:
        raise ValueError(f"train.best={settings.best} needs validation: give the split a validation part")

    # --- model
    backend = backend or Backend.of(settings.device, settings.precision)
    device, fp16 = backend.device, backend.dtype == torch.float16
    if device.type == "cpu":
        keep_freed_memory()
    model = method.get_submodule("model")
    if not optim.freeze_until:
        freeze(model, optim.freeze)
    method.to(device)
    if settings.compile:
        model.compile()

    # --- optimizer
    schedule = Schedule(optim, settings.steps, settings.batch_size)
    optimizer = make_optimizer(method, optim)
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    ema = EMA(method, settings.ema)

    # --- resume
    before = resume(run, method, optimizer, scaler, ema, description)
    step: int = before.get("step", 0)
    if step < optim.freeze_until:  # after the optimizer was made, which has these parts too
        freeze(model, optim.freeze)
    set_training(method)
    log = RunLog(run, settings.steps, step, settings.log_to) if distributed.is_main() else SilentLog()
    log.message(f"computing in {backend.precision} on {device}")
    if step:
        log.message(f"continuing from step {step} of {settings.steps}")
    if before.get("steps", settings.steps) != settings.steps and optim.schedule != "constant":
        changed = f"was made for {before['steps']} steps and is now for {settings.steps}"
        log.message(f"warning: the learning-rate schedule {changed}")
    guard = NonFiniteGuard(run, log, optimizer, fp16=fp16)
    guard.load_state_dict(before.get("guard", guard.state_dict()))
    statistics = RunningStatistics(method)
    alone = distributed.world_size() == 1
    ddp = spread(method, device)

    # --- data
    batches = iter(make_loader(
        dataset, settings.batch_size, loader, micro_batches=settings.accumulate, start_step=step,
        rank=distributed.rank(), world_size=distributed.world_size(), pin_memory=device.type == "cuda",
    ))  # fmt: skip
    if before:
        set_random_state(before, device)  # after the loader was made, which draws a number
    meter = Meter(settings.batch_size, settings.accumulate)

    # --- checkpoint
    description = {**description, **({"ema": settings.ema} if settings.ema else {})}
    saved_at, saved_step = time.monotonic(), step

    def save(random: Mapping[str, torch.Tensor] | None = None) -> None:
        training = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "guard": guard.state_dict(),
            "steps": settings.steps,
            **(random_state(device) if random is None else random),
        }
        if settings.ema:  # the model file holds the averaged weights
            training["weights"] = {name: tensor.detach().cpu() for name, tensor in method.state_dict().items()}
        with ema.swapped_in():
            save_checkpoint(run, step, method, description, training, settings.keep)

    @contextmanager
    def stopped_at_once(weights: AbstractContextManager[None] | None = None) -> Iterator[None]:
        """What a stop signal ends, but for a change of the `weights`; several processes stop together, after a step."""
        random = random_state(device)
        try:
            with weights or nullcontext(), stop.at_once() if alone else nullcontext():
                yield
        except StopNow:
            guard.resolve()
            statistics.restore()
            if step > saved_step or not step:
                save(random)
            raise Stopped(f"stopped at step {step} of {settings.steps}, and saved in {run}") from None

    # --- validation
    def validation_due() -> bool:
        every = settings.validate_every
        return validate is not None and (step == settings.steps or (every > 0 and step % every == 0))

    def run_validation() -> dict[str, float]:
        assert validate is not None
        method.eval()
        with stopped_at_once(ema.swapped_in()), torch.no_grad(), backend.autocast():
            metrics, pictures = validate(step)
            metric = settings.best
            is_best = metric is not None and distributed.on_main(
                lambda: keep_best(run, step, metric, metrics, method, description)
            )
        set_training(method)
        log.scalars(step, "validation", metrics)  # after the best is saved: a logged validation is complete
        log.pictures(step, pictures)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        log.message(f"step {step}: {shown}{'  (new best)' if is_best else ''}")
        meter.restart()
        return metrics

    def out_of_patience() -> bool:
        def validations_since_best() -> int:
            best = read_best(run)
            if best is None or best["name"] != settings.best:
                return 0
            return sum(done > best["step"] for done in log.steps("validation"))

        return settings.patience > 0 and distributed.on_main(validations_since_best) >= settings.patience

    # --- loop
    last: dict[str, float] = {}
    with closing(log), stop_signals() as stop, deterministic(settings.deterministic):
        tell = getattr(method, "progress", None)
        if step and validation_due() and not distributed.on_main(lambda: step in log.steps("validation")):
            if tell:
                tell((step - 1) / settings.steps)
            last = run_validation()  # the run was stopped between its checkpoint and this validation

        ended = out_of_patience()
        while step < settings.steps and not ended:
            # forward and backward passes of the micro-batches
            distributed.heartbeat()
            if optim.freeze_until and step == optim.freeze_until:
                unfreeze(model, optim.freeze)
                set_training(method)
                ddp = spread(method, device)
                log.message(f"step {step}: {', '.join(optim.freeze)} trained from here on")
            set_learning_rate(optimizer, schedule[step])
            if tell:
                tell(step / settings.steps)
            meter.start_step()
            statistics.keep()
            with stopped_at_once():
                for micro_batch in range(settings.accumulate):
                    batch = meter.next_batch(batches)
                    inputs = on_device(batch, device)
                    is_last = micro_batch == settings.accumulate - 1
                    if is_last:  # ask here, read the answers after the step: nothing waits for them
                        late = time.monotonic() - saved_at >= 60 * SAVE_MINUTES
                        answers = distributed.any_rank(stop.requested, late and distributed.is_main())
                    with distributed.gradient_sync(ddp, is_last):
                        with backend.autocast():
                            result = ddp(inputs)
                        loss = guard.add(batch, result["loss"])
                        scaler.scale(loss / settings.accumulate).backward()
                    meter.add(result)

            # optimizer step
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(method.parameters(), settings.clip or float("inf"))
            skipped = guard.check(step + 1, norm)
            meter.discard_step(skipped)
            statistics.finish(skipped)
            optimizer.step()  # not scaler.step(): the guard decides which steps are skipped
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            ema.update(step)

            stopping, late = answers()
            done = step == settings.steps
            save_due = done or stopping or late or step - saved_step >= settings.save_every

            # log
            if step % settings.log_every == 0 or save_due:
                last = meter.read(gradient_norm=norm, lr=schedule[step - 1])
                guard.resolve()
                last["skipped_steps"] = guard.skipped
                log.scalars(step, "train", last)
                log.progress(step, last)

            # checkpoint: after a skipped step the weights may be the cause, so they are saved at the end only
            if save_due and (done or stopping or not guard.in_a_row):
                distributed.on_main(save)
                saved_at, saved_step = time.monotonic(), step
                meter.restart()
            if stopping and not done:
                raise Stopped(f"stopped at step {step} of {settings.steps}, and saved in {run}")

            # validation
            if validation_due():
                last = run_validation()
                ended = out_of_patience()

        if ended and step < settings.steps:
            log.message(f"ended early at step {step}: {settings.patience} validations without a better {settings.best}")
            if step > saved_step:
                distributed.on_main(save)
        if settings.best and distributed.is_main():
            log.message(describe_best(run))
    return last


def spread(method: nn.Module, device: torch.device) -> nn.Module:
    """The method over all ranks; alone on a CPU one that hears signals also inside a backward pass of minutes."""
    if distributed.world_size() == 1 and device.type == "cpu":
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: None)  # in which Python handles them
    return distributed.data_parallel(method)


def _check_same_data(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ValueError for a run that was trained on other data than now; "overlap" is of predictions only."""

    def text(value: Any) -> str:  # as a checkpoint holds it; a NaN equals itself
        return json.dumps(json.loads(json.dumps(value)), sort_keys=True)

    shared = before.keys() & now.keys() - {"overlap"}
    if differing := sorted(key for key in shared if text(before[key]) != text(now[key])):
        advice = "give the store that it was trained on, which may have moved, or choose another out="
        raise ValueError(f"{run} was trained on other data ({', '.join(differing)} differ): {advice}")


def resume(
    run: Path,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: EMA,
    description: Mapping[str, Any],
) -> dict[str, Any]:
    """Load the newest intact checkpoint of a run on all ranks; its training state, empty if there is none.

    A ValueError if the run was trained on other data than `description` names, wherever their store is now.
    """
    found: Any = None

    def newest() -> str | None:
        nonlocal found
        found = load_newest(run, print)
        return None if found is None else str(found[0])

    path = distributed.on_main(newest)
    if path is None:
        return {}
    _check_same_data(run, read_description(path).get("data", {}), description.get("data", {}))
    weights, training = load_training(Path(path)) if found is None else found[1:]
    load_weights(method, weights, path)
    ema.restart()
    try:
        if "weights" in training:  # those of the model file are the average
            load_weights(method, training["weights"], path)
        optimizer.load_state_dict(training["optimizer"])
        scaler.load_state_dict(training["scaler"])
        torch.Generator().set_state(training["random"])  # as a check: the random state is set after the loader is made
        operator.index(training["step"])
    except Exception as error:  # its digest is right, and its content of another run or version
        raise ValueError(f"{path}: its training state does not fit this run ({reason_of(error)})") from error
    return training
