"""The weights that validated best, kept beside the newest checkpoints.

RUN/best/step-NNNNNNNN/   a checkpoint without a training state; its description says by what number it is the best
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from asa.training.checkpoint import WEIGHTS, list_checkpoints, read_description, save_checkpoint

FOLDER = "best"


def keep_best(
    run: Path, step: int, name: str, numbers: Mapping[str, float], method: nn.Module, description: Mapping[str, Any]
) -> bool:
    """Keep the weights if they validated better than those that are kept; of equals the first stay.

    What was the best is read from its checkpoint, so nothing has to be remembered in a run that is stopped and goes on.

    Args:
        run: the run folder.
        step: steps done.
        name: of a validation number. The highest is best; with a minus before it, the lowest.
        numbers: of this validation. One that is not finite is never the best.
        method: its weights are kept.
        description: as for `save_checkpoint`.

    Returns:
        Whether they are kept.

    Raises:
        ValueError: validation gives no such number.
        OSError: they could not be written; those before are as they were.
    """
    key, sign = name.removeprefix("-"), -1 if name.startswith("-") else 1
    if key not in numbers:
        raise ValueError(f"train.best={name}: validation gives {', '.join(numbers)}")
    before = read_best(run)
    beaten = before is None or before["name"] != name or sign * numbers[key] > sign * before["value"]
    if not beaten or not math.isfinite(numbers[key]):
        return False
    found = {"name": name, "value": numbers[key]}
    save_checkpoint(run, step, method, {**description, "best": found}, {}, keep=1, folder=FOLDER)
    return True


def read_best(run: Path) -> dict[str, Any] | None:
    """Name and value of the number by which the kept weights are the best, None where none are kept.

    Raises:
        Damaged: they are not whole.
    """
    kept = list_checkpoints(run, FOLDER)
    return dict(read_description(kept[-1] / WEIGHTS)["best"]) if kept else None


def best_line(run: Path) -> str:
    """What is kept as the best, and where."""
    best = read_best(run)
    if best is None:
        return "no validation gave weights to keep as the best"
    path = list_checkpoints(run, FOLDER)[-1]
    return f"best {best['name']} {best['value']:.4g} at step {int(path.name[5:])}: {path / WEIGHTS}"
