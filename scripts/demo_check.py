"""The demonstration's results: demo_check.py FOLDER prints them, and fails if the method has not learnt enough."""

import json
import sys
from pathlib import Path

from results import read_means, table


def main() -> int:
    """Print; 1 if a result is too poor."""
    out = Path(sys.argv[1])
    lines = [json.loads(line) for line in (out / "pretrained" / "log.jsonl").read_text().splitlines()]
    error = [line for line in lines if line["group"] == "validation"][-1]
    ratio = error["masked_mse"] / error["mean_predictor_mse"]
    evaluations = [out / "evaluation_pretrained", out / "evaluation_scratch"]
    print("Phantom subjects, not patients; the test subjects were seen by no stage before.\n")
    print(f"masked error on held-out subjects: {error['masked_mse']:.4f}, {ratio:.2f} of the mean predictor's\n")
    print(table(evaluations))
    print("\nreports:")
    for folder in evaluations:
        print(f"  {folder / 'report.html'}")
    print(f"curves and pictures: .venv/bin/tensorboard --logdir '{out}'")
    dice = {(f.name, tissue): read_means(f)[tissue]["dice"] for f in evaluations for tissue in ("gm", "wm")}
    poor = {name: score for name, score in dice.items() if score <= 0.80}
    if ratio >= 0.5 or poor:
        print(f"\nWorse than it should be: masked error ratio {ratio:.2f}; Dice not over 0.80: {poor}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
