"""What both training commands look at before a run: `plan=only`, and the GPU."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from asa.training.device import PRECISIONS, pick_device, pick_precision
from asa.training.gpu_check import check_gpu, fit_line
from asa.training.loop import TrainSettings
from asa.training.optim import OptimSettings
from asa.training.plan import make_plan, measure_rate, plan_report, step_memory


def wants_plan(config: dict[str, Any]) -> bool:
    """Whether a plan is asked for in place of a run.

    Raises:
        ValueError: a value that is neither null nor `only`, or a rate that is none.
    """
    plan, rate = config["plan"], config["plan_rate"]
    if plan not in (None, "only"):
        raise ValueError(f"plan={plan}: choose only, or null")
    if rate is not None and not (isinstance(rate, int | float) and rate > 0):
        raise ValueError(f"plan_rate={rate}: give the TFLOP/s that the run will reach, like 40")
    return plan is not None


def show_plan(
    config: dict[str, Any],
    make: Callable[[], nn.Module],
    scans: int,
    settings: TrainSettings,
    optim: OptimSettings,
    *,
    labelled: bool,
    example: Mapping[str, Any] | None = None,
    names: tuple[str, str] = ("volumes", "scans"),
) -> None:
    """Print what a run takes.

    Args:
        config: the command's.
        make: makes the method.
        scans: in the training part.
        settings, optim: the typed settings.
        labelled: batches have labels.
        example: see `make_plan`.
        names: see `plan_report`.
    """
    plan = make_plan(make, labelled=labelled, settings=settings, optim=optim, example=example)
    if config["plan_rate"] is not None:
        rate, source = config["plan_rate"] * 1e12, "as given by plan_rate"
    else:
        device = pick_device("auto")
        elsewhere = settings.precision == "fp16" and device.type == "cpu"
        kind = _precision("fp32" if elsewhere else settings.precision, device)
        rate = measure_rate(device, PRECISIONS[kind])
        source = f"measured here by {kind} matrix products ({device.type}): a run reaches a part of it and takes longer"
    print(plan_report(plan, settings, scans, rate, source, names))


def preflight(
    make: Callable[[], nn.Module],
    settings: TrainSettings,
    optim: OptimSettings,
    *,
    labelled: bool,
    example: Mapping[str, Any] | None = None,
) -> None:
    """Print whether a step will fit on the GPU, if training uses one.

    Raises:
        ValueError: PyTorch has no kernels for that GPU.
    """
    device = pick_device(settings.device)
    if device.type != "cuda":
        return
    for line in check_gpu(device):
        print(line)
    precision = _precision(settings.precision, device)
    _, memory = step_memory(
        make, precision, labelled=labelled, settings=settings, optim=optim, gpu=True, example=example
    )
    print(fit_line(memory.peak, device))


def _precision(name: str, device: torch.device) -> str:
    """The precision that a setting means on a device, by name."""
    dtype = pick_precision(name, device)
    return next(key for key, value in PRECISIONS.items() if value == dtype)
