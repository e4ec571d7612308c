"""What asa-evaluate writes for made-up scores."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from asa.evaluation.summary import CaseRow, cases_csv, summarise


def write_scores(folder: Path, brains: Sequence[float], labels: Iterable[str]) -> None:
    """An evaluation in `folder`, where each brain has this Dice for all labels."""
    names = dict(enumerate(labels, start=1))
    rows = [
        CaseRow(f"case{id}", name, {"dice": value, "hd95_mm": 1.0, "nsd_1mm": 0.5}, 10, 10, 0.1, 0.1)
        for id, value in enumerate(brains)
        for name in names.values()
    ]
    summary = summarise(rows, names, "ibsr")
    folder.mkdir(parents=True)
    (folder / "cases.csv").write_text(cases_csv(summary))
    (folder / "summary.json").write_text(json.dumps(summary.as_json()))
