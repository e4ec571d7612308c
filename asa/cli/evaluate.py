"""asa-evaluate: predictions against the truth, and evaluations against each other."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asa.cli import restoration
from asa.cli.front import Config, run_command
from asa.data.datasets import folder
from asa.data.splits import read_split, select
from asa.data.store import MANIFEST, Store
from asa.evaluation.comparison import comparison_table
from asa.evaluation.summary import summary_table
from asa.tasks.comparison import compare_folders
from asa.tasks.evaluation import evaluate_folder


@dataclass
class Cohort:
    """What predictions are compared with.

    `truths` and `images` are files by case id; `labels`, `regions` and `ignored` are as in `evaluate_folder`.
    """

    truths: dict[str, Path]
    images: dict[str, Path] | None
    labels: dict[int, str]
    regions: dict[str, list[int]]
    ignored: list[int]


def evaluate(config: Config) -> None:
    """Score a folder of label maps, or compare evaluations; print the table, write the results."""
    given = [key for key in ("predictions", "truth") if config[key] is not None]
    if config["compare"] is not None:
        if given:
            raise ValueError(f"{given[0]}= and compare= exclude each other: evaluate each run first, then compare them")
        compare(config)
    elif config["policy"] == restoration.TASK:
        restoration.evaluate(config)
    elif len(given) < 2:
        raise ValueError("predictions= and truth= have to be given, or compare=[RUN_A, RUN_B]")
    else:
        score(config)


def compare(config: Config) -> None:
    """Compare folders of earlier evaluations with the first of them."""
    out = Path(str(config["out"]))
    print(comparison_table(compare_folders(_named(config["compare"]), out, allow_missing=config["allow_missing"])))
    print(f"wrote comparison.json, .md, .tex and .html to {out}")


def _named(folders: Any) -> dict[str, Path]:
    """Folders by the name of the run: given, or the folder's own."""
    if isinstance(folders, dict):
        return {str(name): Path(str(folder)) for name, folder in folders.items()}
    if not isinstance(folders, list):
        raise ValueError(f"compare= is a list of folders, like [runs/a, runs/b], got {folders!r}")
    named = {Path(str(folder)).name: Path(str(folder)) for folder in folders}
    if len(named) < len(folders):
        raise ValueError("compare= has two folders of one name: name the runs, like {scratch: FOLDER, asa: FOLDER}")
    return named


def score(config: Config) -> None:
    """Score a folder of label maps."""
    truth, out = Path(str(config["truth"])), Path(str(config["out"]))
    if not truth.exists():
        raise FileNotFoundError(f"{truth}: no such folder; truth= is a store or a folder of label maps")
    if not isinstance(config["regions"], dict | None):
        raise ValueError(f"regions= joins label values, like regions={{core: [1, 4]}}, got {config['regions']!r}")
    cohort = _from_store(truth, config) if (truth / MANIFEST).exists() else _from_folder(truth, config)
    summary = evaluate_folder(
        Path(str(config["predictions"])),
        cohort.truths,
        cohort.labels,
        config["policy"],
        out,
        cohort.images,
        regions=cohort.regions if config["regions"] is None else config["regions"],
        ignored=cohort.ignored,
        allow_missing=config["allow_missing"],
        workers=config["workers"],
    )
    print(summary_table(summary))
    print(f"wrote cases.csv, summary.json and report.html to {out}")


def _from_store(path: Path, config: Config) -> Cohort:
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
    images = {record["id"]: _first_image(record, store.channels) for record in labelled}
    return Cohort(truths, images, store.labels, store.regions, store.ignored)


def _first_image(record: Mapping[str, Any], channels: Sequence[str]) -> Path:
    """The first channel that the scan has: one may be missing in the cohort."""
    return next(Path(record["sources"][channel]["path"]) for channel in channels if channel in record["sources"])


def _from_folder(path: Path, config: Config) -> Cohort:
    """Label files of a folder by the text that the pattern's * stands for."""
    if not isinstance(config["labels"], dict):
        raise ValueError("labels has to be given with a folder of label maps, like labels={1: csf, 2: gm, 3: wm}")
    if not all(isinstance(value, int) for value in config["ignored"]):
        raise ValueError(f"ignored= is a list of label values, like ignored=[2], got {config['ignored']}")
    records = folder.records(path, images={"label": config["pattern"]})
    truths = {record["id"]: Path(str(record["images"]["label"])) for record in records}
    labels = {int(value): name for value, name in config["labels"].items()}
    return Cohort(truths, None, labels, {}, config["ignored"])


def main() -> int:
    """Entry point."""
    return run_command(
        "evaluate",
        "Score predicted label maps against true ones under a named policy, or compare such evaluations.",
        evaluate,
    )


if __name__ == "__main__":
    sys.exit(main())
