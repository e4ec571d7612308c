"""What both training commands look at before a run: `plan=only`, and the GPU."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from asa.methods.classify import Classification
from asa.training import gpu_check, plan
from asa.training.loop import TrainSettings
from asa.training.optim import OptimSettings


def wants_plan(config: dict[str, Any]) -> bool:
    """See `asa.training.plan.wants_plan`."""
    return plan.wants_plan(config["plan"], config["plan_rate"])


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
    """Print what a run takes; see `asa.training.plan.show_plan`."""
    batch = _batch(settings, labelled, example)
    print(plan.show_plan(make, batch, scans, settings, optim, config["plan_rate"], names))


def preflight(
    make: Callable[[], nn.Module],
    settings: TrainSettings,
    optim: OptimSettings,
    *,
    labelled: bool,
    example: Mapping[str, Any] | None = None,
) -> None:
    """Print whether a step will fit on the GPU; see `asa.training.gpu_check.preflight`."""
    for line in gpu_check.preflight(make, _batch(settings, labelled, example), settings, optim):
        print(line)


def _batch(settings: TrainSettings, labelled: bool, example: Mapping[str, Any] | None) -> plan.ExampleBatch:
    if example is not None:
        return example
    return lambda method: plan.volume_batch(
        method, plan.micro_batch(settings), label=labelled, target=isinstance(method, Classification)
    )
