"""`plan=only`, for both training commands."""

from collections.abc import Callable
from typing import Any

from torch import nn

from asa.engine.optim import OptimSettings
from asa.engine.plan import make_plan, measure_rate, plan_report
from asa.engine.train import PRECISIONS, TrainSettings, pick_device, pick_precision


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
) -> None:
    """Print what a run takes.

    Args:
        config: the command's.
        make: makes the method.
        scans: in the training part.
        settings, optim: the typed settings.
        labelled: batches have labels.
    """
    plan = make_plan(make, labelled=labelled, settings=settings, optim=optim)
    if config["plan_rate"] is not None:
        rate, source = config["plan_rate"] * 1e12, "as given by plan_rate"
    else:
        device = pick_device("auto")
        name = "fp32" if settings.precision == "fp16" and device.type == "cpu" else settings.precision
        dtype = pick_precision(name, device)
        rate = measure_rate(device, dtype)
        kind = next(key for key, value in PRECISIONS.items() if value == dtype)
        source = f"measured here by {kind} matrix products ({device.type}): a run reaches a part of it and takes longer"
    print(plan_report(plan, settings, scans, rate, source))
