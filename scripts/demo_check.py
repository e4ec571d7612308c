"""The demonstration's results: python -m scripts.demo_check FOLDER prints them, and fails if the scores are too low."""

import json
import sys
from pathlib import Path
from typing import Any

from scripts.reproduce.commands import validations


def read_means(folder: Path) -> dict[str, dict[str, float]]:
    """Label -> metric -> mean over the cases, of a folder that asa-evaluate wrote."""
    results: dict[str, Any] = json.loads((folder / "summary.json").read_text())["results"]
    return {label: {metric: found["mean"] for metric, found in row.items()} for label, row in results.items()}


def table(folders: list[Path]) -> str:
    """Mean Dice and HD95 of several evaluations, as text."""
    means = {folder.name.removeprefix("evaluation_"): read_means(folder) for folder in folders}
    labels = list(next(iter(means.values())))
    width = max(map(len, means))
    heads = [f"  {metric} {label:<5}" for metric in ("Dice", "HD95") for label in labels]
    lines = [" " * width + "".join(heads)]
    for name, row in means.items():
        dice = "".join(f"  {row[label]['dice']:<10.3f}" for label in labels)
        lines.append(f"{name:<{width}}{dice}" + "".join(f"  {row[label]['hd95_mm']:<10.2f}" for label in labels))
    return "\n".join(line.rstrip() for line in lines) + "\n(means over the test subjects; HD95 in mm)"


def main() -> int:
    """Print; 1 if a score is too low."""
    out = Path(sys.argv[1])
    error = validations(out / "pretrained")[-1]
    ratio = error["masked_mse"] / error["mean_predictor_mse"]
    evaluations = [out / "evaluation_pretrained", out / "evaluation_scratch"]
    print("Phantom subjects, not patients. The test subjects were held out from every stage.\n")
    print(f"masked error on held-out subjects: {error['masked_mse']:.4f}, {ratio:.2f} of the mean predictor's\n")
    print(table(evaluations))
    print("\nreports:")
    for folder in evaluations:
        print(f"  {folder / 'report.html'}")
    print(f"curves and images: .venv/bin/tensorboard --logdir '{out}'")
    dice = {(f.name, tissue): read_means(f)[tissue]["dice"] for f in evaluations for tissue in ("gm", "wm")}
    poor = {name: score for name, score in dice.items() if score <= 0.80}
    if ratio >= 0.5 or poor:
        print(f"\nWorse than expected: masked error ratio {ratio:.2f}; Dice not above 0.80: {poor}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
