"""asa-evaluate: predictions against the truth."""

import sys
from pathlib import Path

from asa.cli.front import Config, run_command
from asa.data.cohort import read_split, select
from asa.data.datasets import folder
from asa.data.store import MANIFEST, Store
from asa.engine.evaluate import evaluate_folder
from asa.engine.summary import summary_table

Files = dict[str, Path]


def evaluate(config: Config) -> None:
    """Score a folder of label maps, print the table, write the results."""
    truth, out = Path(str(config["truth"])), Path(str(config["out"]))
    if not truth.exists():
        raise FileNotFoundError(f"{truth}: no such folder; truth= is a store or a folder of label maps")
    in_store = (truth / MANIFEST).exists()
    truths, images, labels = _from_store(truth, config) if in_store else _from_folder(truth, config)
    summary = evaluate_folder(
        Path(str(config["predictions"])),
        truths,
        labels,
        config["policy"],
        out,
        images,
        allow_missing=config["allow_missing"],
        workers=config["workers"],
    )
    print(summary_table(summary))
    print(f"wrote cases.csv, summary.json and report.html to {out}")


def _from_store(path: Path, config: Config) -> tuple[Files, Files | None, dict[int, str]]:
    """Source label files and images of a store's scans."""
    store = Store(path)
    records = store.records
    if config["split_file"] is not None:
        split = read_split(config["split_file"])
        if not split.get(config["part"]):
            raise ValueError(f"{config['split_file']} has no subjects under {config['part']}")
        records = select(store.records, split[config["part"]])
    labelled = [record for record in records if "label" in record["sources"]]
    if not labelled:
        raise ValueError(f"{path}: none of the scans has a label map to compare with")
    truths = {record["id"]: Path(record["sources"]["label"]["path"]) for record in labelled}
    images = {record["id"]: Path(record["sources"][store.channels[0]]["path"]) for record in labelled}
    return truths, images, store.labels


def _from_folder(path: Path, config: Config) -> tuple[Files, Files | None, dict[int, str]]:
    """Label files of a folder by the text that the pattern's * stands for."""
    if not isinstance(config["labels"], dict):
        raise ValueError("labels has to be given with a folder of label maps, like labels={1: csf, 2: gm, 3: wm}")
    records = folder.records(path, images={"label": config["pattern"]})
    truths = {record["id"]: Path(record["images"]["label"]) for record in records}
    return truths, None, {int(value): name for value, name in config["labels"].items()}


def main() -> int:
    """Entry point."""
    return run_command(
        "evaluate",
        "Score predicted label maps against true ones: Dice and HD95 in mm, a table, JSON and a report.",
        evaluate,
    )


if __name__ == "__main__":
    sys.exit(main())
