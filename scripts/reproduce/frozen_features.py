"""What frozen features know of people: python -m scripts.reproduce.frozen_features IXI HEADS OASIS OUT

Age, sex, a diagnosis and the scanner, read by a ridge from the features of the encoder that the package brings, and
from those of the same network with its first weights. Beside them what needs no network: the volumes of labelled
regions, and the mean intensities of cubes of 8 mm. Every figure is of people that the ridge has not seen.

IXI: heads with their regions, ID_T1.nii.gz and ID_regions.nii.gz, and ages.csv with the columns id, age and sex.
HEADS: the BIDS folder that the encoder was pretrained on (OpenNeuro's ds002748), with age, gender and group.
OASIS: brains, ID_SS.nii.gz, of a third scanner; nothing else is known of them.
About 10 s of one core per head; what is done is not done again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asa.config import build
from asa.data.io.files import read_json
from asa.data.io.nifti import read_label
from asa.data.io.tables import csv_text, read_rows, write_numbers
from asa.data.store import Store, read_box
from asa.evaluation.probe import predict_by_folds, ridge
from asa.evaluation.scans import score_numbers
from asa.evaluation.tables import matched
from asa.training.checkpoint import list_checkpoints, read_description, save_checkpoint
from scripts.reproduce.commands import asa, interval, parser_of
from scripts.reproduce.shipped_encoder import NAME, PREPARED

SIZE = (160, 192, 160)  # voxels of 1 mm around the middle: a whole brain
CUBE = 8  # mm
COHORTS = {  # how each is read
    "ixi": ("data=folder", "data.images={t1: '*_T1.nii.gz'}"),
    "heads": ("data=bids",),
    "oasis": ("data=folder", "data.images={t1: '*_SS.nii.gz'}"),
}
STRIPPED = "oasis"
FEATURES = {"pretrained": f"features of `asa://{NAME}`", "first_weights": "features of the first weights"}
TABLES = FEATURES | {"volumes": "volumes of the regions", "intensities": "intensities of cubes of 8 mm"}


def prepare(cohort: str, data: Path, out: Path) -> Store:
    """A cohort, prepared as the heads of the encoder were; stripped brains are not stripped again."""
    settings = (*COHORTS[cohort], *PREPARED[1:-1], *(["prepare.strip=none"] if cohort == STRIPPED else []))
    paths: dict[str, Any] = {"data.root": data, "out": out / "store"}
    asa("prepare", *settings, log=out / "prepare.txt", threads=1, **paths)
    return Store(out / "store")


def first_weights(out: Path) -> Path:
    """A checkpoint of the encoder's network as it was before pretraining."""
    if not list_checkpoints(out):
        description = read_description(f"asa://{NAME}")
        torch.manual_seed(0)
        shell = nn.Module()
        shell.model = build(description["model"])
        save_checkpoint(out, 1, shell, description, {}, keep=1)
    return out


def embed(cohort: str, checkpoint: str | Path, data: Path, out: Path, name: str) -> None:
    """The mean token of each head, in OUT/NAME.csv."""
    if (out / f"{name}.csv").exists():
        return
    settings, source = [f"img_size={list(SIZE)}".replace(" ", "")], out / "store"
    if cohort == STRIPPED:  # asa-embed takes no store that was prepared in another way than the encoder's
        settings += [COHORTS[cohort][1].removeprefix("data."), "strip=none"]
        source = data
    paths: dict[str, Any] = {"checkpoint": checkpoint, "input": source, "out": out / f"{name}.csv"}
    asa("embed", *settings, log=out / "embed.txt", threads=1, **paths)


def write_volumes(store: Store, data: Path, table: Path) -> None:
    """The volume of each region of each head, in ml."""
    labels = {record["id"]: read_label(data / f"{record['id']}_regions.nii.gz") for record in store.records}
    values = sorted(set().union(*(np.unique(label.data) for label in labels.values())) - {0})
    ml = {id: abs(np.linalg.det(label.affine[:3, :3])) / 1000 for id, label in labels.items()}
    rows = {id: np.array([(label.data == v).sum() * ml[id] for v in values]) for id, label in labels.items()}
    write_numbers(table, [f"region_{value}" for value in values], rows)


def write_intensities(stores: dict[str, Store], out: Path) -> None:
    """The mean intensity of each cube that is in half of the heads of each cohort or more, in COHORT/intensities.csv.

    Of a cube at the rim of a few heads the SD over the training heads may be near 0, and the features of others huge.
    """
    means: dict[str, dict[str, np.ndarray]] = {}
    for cohort, store in stores.items():
        for record in store.records:
            volume = np.asarray(store.image(record["id"]), dtype=np.float32)
            starts = [(n - size) // 2 for n, size in zip(volume.shape[1:], SIZE, strict=True)]
            box = read_box(volume, starts, SIZE)[0]
            d, h, w = (size // CUBE for size in SIZE)
            cubes = box.reshape(d, CUBE, h, CUBE, w, CUBE).mean(axis=(1, 3, 5)).ravel()
            means.setdefault(cohort, {})[record["id"]] = cubes
    inside = [np.mean([row > 0 for row in rows.values()], axis=0) >= 0.5 for rows in means.values()]
    kept = np.flatnonzero(np.all(inside, axis=0))
    for cohort, rows in means.items():
        own = {id: row[kept] for id, row in rows.items()}
        write_numbers(out / cohort / "intensities.csv", [f"cube_{k}" for k in kept], own)


def probe(table: Path, truth: Path, column: str, out: Path, *settings: str) -> dict[str, Any]:
    """The scores of asa-evaluate policy=probe, in OUT/summary.json."""
    paths: dict[str, Any] = {"predictions": table, "truth": truth, "out": out}
    asa("evaluate", "policy=probe", f"column={column}", *settings, log=out.parent / "probe.txt", threads=1, **paths)
    return dict(read_json(out / "summary.json"))


def in_years(found: dict[str, Any]) -> str:
    """An error with its interval."""
    return f"{found['mean_absolute_error']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


def as_auc(found: dict[str, Any]) -> str:
    """An AUC with its interval."""
    return f"{found['auc']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def errors(folder: Path) -> dict[str, float]:
    """The absolute error of each scan of a probe of ages."""
    rows = read_rows(folder / "predictions.csv")
    return {row["id"]: abs(float(row["predicted"]) - float(row["age"])) for row in rows}


def within(cohort: str, out: Path, truth: Path, classes: dict[str, str]) -> None:
    """Print what is read from each table of one cohort: age, and classes, column -> heading."""
    tables = [name for name in TABLES if (out / f"{name}.csv").exists()]
    headings = ["the encoder's error less this", "R2", *classes.values()]
    print(f"\n{cohort}\n\n| read from | age: mean absolute error (years) | " + " | ".join(headings) + " |")
    print("|---" * (4 + len(classes)) + "|")
    for name in tables:
        age = probe(out / f"{name}.csv", truth, "age", out / f"{name}_age")
        encoder, own = errors(out / "pretrained_age"), errors(out / f"{name}_age")
        less = np.array([encoder[id] - own[id] for id in own])
        gap = "" if name == "pretrained" else interval(less, "+", 1)
        cells = [as_auc(probe(out / f"{name}.csv", truth, column, out / f"{name}_{column}")) for column in classes]
        print(f"| {TABLES[name]} | {in_years(age)} | {gap} | {age['r2']:.2f} | {' | '.join(cells)} |")
    print(f"| nothing: the mean age | {age['of_the_mean']:.1f} | | 0 |{' 0.5 |' * len(classes)}")


def across(out: Path, truths: dict[str, Path]) -> None:
    """Print the error of the ages of each cohort, by a ridge that was fitted on the other one."""
    print("\nAges of one cohort by a ridge fitted on the other\n\n| read from | IXI, by the heads | heads, by IXI |")
    print("|---|---|---|")
    guesses = {}
    for name in (*FEATURES, "intensities"):
        found = {}
        for cohort, truth in truths.items():
            rows, ages, _ = matched(out / cohort / f"{name}.csv", truth, "age")
            numbers = [[float(value) for key, value in row.items() if key != "id"] for row in rows]
            found[cohort] = np.array(numbers), np.array(ages, dtype=float)
        cells = {}
        for k, cohort in enumerate(found):
            features, ages = (np.concatenate([one[part] for one in found.values()]) for part in (0, 1))
            own = np.repeat([0, 1], [len(one[1]) for one in found.values()])
            people = [str(n) for n in range(len(ages))]
            predicted = predict_by_folds(features, ages[:, None], people, own, ridge)[own == k, 0]
            mean = float(ages[own != k].mean())
            scores = score_numbers(predicted, ages[own == k], mean, [str(n) for n in range(len(predicted))])
            cells[cohort] = f"{scores.mae:.1f} ({scores.mae_low:.1f} to {scores.mae_high:.1f})"
            guesses[cohort] = f"{scores.mean_predictor_mae:.1f}"
        print(f"| {TABLES[name]} | {' | '.join(cells.values())} |")
    print(f"| nothing: the mean age of the other cohort | {' | '.join(guesses.values())} |")


def scanners(out: Path) -> None:
    """Print how well the scanner of each scan is told, and whether asa-evaluate warns of it."""
    print("\n| read from | the scanner, of three: AUC | ALARM |\n|---|---|---|")
    for name in (*FEATURES, "intensities"):
        rows, people = {}, []
        for cohort in COHORTS:
            for row in read_rows(out / cohort / f"{name}.csv"):
                id = row.pop("id")
                rows[id] = [float(value) for value in row.values()]
                people.append((id, cohort))
        write_numbers(out / f"{name}.csv", list(row), rows)
        (out / "scanners.csv").write_text(csv_text(["id", "scanner"], people))
        folder = out / f"{name}_scanner"
        found = probe(out / f"{name}.csv", out / "scanners.csv", "scanner", folder, "site=scanner")
        rings = "ALARM" in (folder / "report.html").read_text()
        print(f"| {TABLES[name]} | {as_auc(found['site'])} | {'yes' if rings else 'no'} |")


def main() -> None:
    """Make the tables of features, and print what is read from each."""
    options = {name: path.resolve() for name, path in vars(parser_of(__doc__, *COHORTS, "out").parse_args()).items()}
    out = options.pop("out")
    stores = {cohort: prepare(cohort, data, out / cohort) for cohort, data in options.items()}
    for cohort, data in options.items():
        embed(cohort, f"asa://{NAME}", data, out / cohort, "pretrained")
        embed(cohort, first_weights(out / "first"), data, out / cohort, "first_weights")
    write_intensities(stores, out)
    write_volumes(stores["ixi"], options["ixi"], out / "ixi" / "volumes.csv")
    ixi, heads = options["ixi"] / "ages.csv", options["heads"] / "participants.tsv"
    within("IXI", out / "ixi", ixi, {"sex": "sex: AUC"})
    within("HEADS", out / "heads", heads, {"gender": "sex: AUC", "group": "depression: AUC"})
    across(out, {"ixi": ixi, "heads": heads})
    scanners(out)


if __name__ == "__main__":
    main()
