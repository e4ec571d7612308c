"""The files of an evaluation with made-up scores."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from asa.evaluation.policies import get_policy
from asa.evaluation.summary import CaseRow, cases_csv, summarise


def write_run(
    folder: Path,
    dice: Mapping[str, Sequence[float]],
    policy: str = "ibsr",
    voxels: int = 500,
    subjects: Mapping[str, str] | None = None,
) -> Path:
    """An evaluation's files from Dice of each label; HD95 falls as Dice rises, NSD is the same in every case."""
    rows = [
        CaseRow(f"case{k:02}", label, values_of(policy, values[k]), voxels, voxels, 0.5, 0.5)
        for k in range(len(next(iter(dice.values()))))
        for label, values in dice.items()
    ]
    summary = summarise(rows, dict(enumerate(dice, start=1)), policy, subjects=subjects)
    folder.mkdir(parents=True)
    (folder / "cases.csv").write_text(cases_csv(summary))
    (folder / "summary.json").write_text(json.dumps(summary.as_json()))
    return folder


def values_of(policy: str, dice: float) -> dict[str, float]:
    """Values of all metrics of a policy."""
    values = {metric.name: 0.5 for metric in get_policy(policy).metrics} | {"dice": dice}
    if "hd95_mm" in values:
        values["hd95_mm"] = 10 * (1 - dice) if dice else math.nan
    return values
