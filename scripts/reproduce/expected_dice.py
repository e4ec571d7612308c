"""Does the expected Dice of asa-predict tell the true one? python -m scripts.reproduce.expected_dice DEMO [DEMO ...]

DEMO: folders of scripts/demo, with several seeds. Of each network, the Dice that its probabilities let expect
(volumes.csv) beside the true one (cases.csv), over its test subjects and structures. Prints a table of
docs/prediction.md.
"""

from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from asa.data.io.tables import read_rows
from scripts.reproduce.commands import parser_of

NETWORKS = ("pretrained_1", "scratch_1", "pretrained_3", "scratch_3")


def pairs(demo: Path, network: str) -> dict[str, np.ndarray]:
    """The expected and the true Dice of each structure, `(structures, 2)`, by subject; those with both."""
    volumes = {row["id"]: row for row in read_rows(demo / "predictions" / network / "volumes.csv")}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(demo / "evaluations" / network / "cases.csv"):
        expected = volumes[row["id"]][f"{row['label']}_expected_dice"]
        if expected and row["dice"]:
            found.setdefault(row["id"], []).append((float(expected), float(row["dice"])))
    return {id: np.array(values) for id, values in found.items()}


def line(name: str, found: dict[str, np.ndarray]) -> str:
    """A row of the table: means, and rank correlations over structures of subjects and over subjects' means."""
    every, means = np.concatenate(list(found.values())), np.array([values.mean(axis=0) for values in found.values()])
    over = [spearmanr(*values.T).statistic for values in (every, means)]
    expected, true = every.mean(axis=0)
    return f"| {name} | {len(every)} | {expected:.3f} | {true:.3f} | {over[0]:.2f} | {over[1]:.2f} |"


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("demo", nargs="+", type=Path)
    folders = parser.parse_args().demo
    print("| network | n | expected | true | rank correlation | of subjects' means |\n|---|---:|---:|---:|---:|---:|")
    together: dict[str, np.ndarray] = {}
    for network in NETWORKS:
        found = {f"{demo}/{id}": values for demo in folders for id, values in pairs(demo, network).items()}
        print(line(network, found))
        together |= {f"{network}/{id}": values for id, values in found.items()}
    print(line("all", together))


if __name__ == "__main__":
    main()
