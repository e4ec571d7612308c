"""The demonstration's results in one table; fails where the method has not learnt what it should."""

import json
import sys
from pathlib import Path

TISSUES = ("csf", "gm", "wm")
STARTS = ("pretrained", "scratch")


def last_validation(run: Path) -> dict[str, float]:
    """The numbers of a run's last validation."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == "validation"][-1]


def mean(folder: Path, tissue: str, metric: str) -> float:
    """A metric's mean over the test subjects."""
    return json.loads((folder / "summary.json").read_text())["results"][tissue][metric]["mean"]


def main() -> int:
    """Print the table; 1 if a result is too poor."""
    out = Path(sys.argv[1])
    error = last_validation(out / "pretrained")
    ratio = error["masked_mse"] / error["mean_predictor_mse"]
    print("phantom subjects, not patients; 4 test subjects that no stage was trained on")
    print(f"masked error on held-out subjects: {error['masked_mse']:.4f}, {ratio:.2f} of predicting the mean")
    print(f"\n{'encoder':<12}" + "".join(f"{'Dice ' + tissue.upper():>10}" for tissue in TISSUES), end="")
    print("".join(f"{'HD95 ' + tissue.upper():>10}" for tissue in TISSUES) + "  (mm)")
    dice = {}
    for start in STARTS:
        folder = out / f"evaluation_{start}"
        dice[start] = {tissue: mean(folder, tissue, "dice") for tissue in TISSUES}
        row = "".join(f"{dice[start][tissue]:>10.3f}" for tissue in TISSUES)
        row += "".join(f"{mean(folder, tissue, 'hd95_mm'):>10.2f}" for tissue in TISSUES)
        print(f"{start:<12}{row}")
    print("\nreports:")
    for start in STARTS:
        print(f"  {out / f'evaluation_{start}' / 'report.html'}")
    print(f"curves and pictures: .venv/bin/tensorboard --logdir {out}")
    poor = [f"{start} {tissue}" for start in STARTS for tissue in ("gm", "wm") if dice[start][tissue] <= 0.80]
    if ratio >= 0.5 or poor:
        print(
            f"\nThis is worse than it should be: masked error ratio {ratio:.2f}, Dice under 0.80: {poor}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
