"""Evaluations side by side: results.py FOLDER ... prints mean Dice and HD95 of each folder of asa-evaluate."""

import json
import sys
from pathlib import Path
from typing import Any


def read_means(folder: Path) -> dict[str, dict[str, float]]:
    """Label -> metric -> mean over the cases."""
    results: dict[str, Any] = json.loads((folder / "summary.json").read_text())["results"]
    return {label: {metric: found["mean"] for metric, found in row.items()} for label, row in results.items()}


def table(folders: list[Path]) -> str:
    """The table as text."""
    means = {folder.name.removeprefix("evaluation_"): read_means(folder) for folder in folders}
    labels = list(next(iter(means.values())))
    width = max(map(len, means))
    heads = [f"  {metric} {label:<5}" for metric in ("Dice", "HD95") for label in labels]
    lines = [" " * width + "".join(heads)]
    for name, row in means.items():
        dice = "".join(f"  {row[label]['dice']:<10.3f}" for label in labels)
        lines.append(f"{name:<{width}}{dice}" + "".join(f"  {row[label]['hd95_mm']:<10.2f}" for label in labels))
    return "\n".join(line.rstrip() for line in lines) + "\n(means over the test subjects; HD95 in mm)"


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]))
