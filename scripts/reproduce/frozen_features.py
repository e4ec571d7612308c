"""What frozen features know of people: python -m scripts.reproduce.frozen_features DATA OUT

Age and sex of the IXI heads, read by a ridge from the features of the encoder that the package brings, and from those
of the same network with its first weights. Beside them what needs no network: the volumes of the labelled regions, and
the mean intensities of cubes of 8 mm. Every figure is of scans that the ridge has not seen.

DATA: heads with their regions, ID_T1.nii.gz and ID_regions.nii.gz, and ages.csv with the columns id, age and sex.
About 10 s of one core per head; what is done is not done again.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asa.config import build
from asa.data.io.files import read_json
from asa.data.io.nifti import read_label
from asa.data.io.tables import write_numbers
from asa.data.store import Store, read_box
from asa.training.checkpoint import list_checkpoints, read_description, save_checkpoint
from scripts.reproduce.commands import asa
from scripts.reproduce.shipped_encoder import NAME, PREPARED

SIZE = (160, 192, 160)  # voxels of 1 mm around the middle: a whole brain
CUBE = 8  # mm


def prepare(data: Path, out: Path) -> Store:
    """The heads, prepared as those of the encoder."""
    settings = ("data=folder", "data.images={t1: '*_T1.nii.gz'}", *PREPARED[1:])
    paths: dict[str, Any] = {"data.root": data, "out": out / "store"}
    asa("prepare", *settings, log=out / "prepare.txt", **paths)
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


def embed(checkpoint: str | Path, out: Path, name: str) -> None:
    """The mean token of each head."""
    size = f"img_size={list(SIZE)}".replace(" ", "")
    asa("embed", size, log=out / "embed.txt", checkpoint=checkpoint, input=out / "store", out=out / name)


def write_volumes(store: Store, data: Path, table: Path) -> None:
    """The volume of each region of each head, in ml."""
    labels = {record["id"]: read_label(data / f"{record['id']}_regions.nii.gz") for record in store.records}
    values = sorted(set().union(*(np.unique(label.data) for label in labels.values())) - {0})
    ml = {id: abs(np.linalg.det(label.affine[:3, :3])) / 1000 for id, label in labels.items()}
    rows = {id: np.array([(label.data == v).sum() * ml[id] for v in values]) for id, label in labels.items()}
    write_numbers(table, [f"region_{value}" for value in values], rows)


def write_intensities(store: Store, table: Path) -> None:
    """The mean intensity of each cube of each prepared head; those that are empty in all heads are left out."""
    means = {}
    for record in store.records:
        volume = np.asarray(store.image(record["id"]), dtype=np.float32)
        starts = [(n - size) // 2 for n, size in zip(volume.shape[1:], SIZE, strict=True)]
        box = read_box(volume, starts, SIZE)[0]
        d, h, w = (size // CUBE for size in SIZE)
        means[record["id"]] = box.reshape(d, CUBE, h, CUBE, w, CUBE).mean(axis=(1, 3, 5)).ravel()
    kept = np.flatnonzero(np.any(list(means.values()), axis=0))
    write_numbers(table, [f"cube_{k}" for k in kept], {id: row[kept] for id, row in means.items()})


def main() -> None:
    """Make the tables of features, and print what is read from each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    store = prepare(data, out)
    embed(f"asa://{NAME}", out, "pretrained")
    embed(first_weights(out / "first"), out, "first_weights")
    write_volumes(store, data, out / "volumes.csv")
    write_intensities(store, out / "intensities.csv")
    tables = {
        f"features of asa://{NAME}": out / "pretrained",
        "features of the first weights": out / "first_weights",
        "volumes of the regions": out / "volumes.csv",
        "intensities of cubes of 8 mm": out / "intensities.csv",
    }
    print("| read from | age: mean absolute error (years) | R2 | sex: AUC |\n|---|---|---:|---|")
    for k, (name, table) in enumerate(tables.items()):
        scores = {}
        for column in ("age", "sex"):
            found = out / f"{column}_{k}"
            paths: dict[str, Any] = {"predictions": table, "truth": data / "ages.csv", "out": found}
            asa("evaluate", "policy=probe", f"column={column}", log=out / "probe.txt", **paths)
            scores[column] = read_json(found / "summary.json")
        age, sex = scores["age"], scores["sex"]
        error = f"{age['mean_absolute_error']:.2f} ({age['low']:.2f} to {age['high']:.2f})"
        print(f"| {name} | {error} | {age['r2']:.2f} | {sex['auc']:.2f} ({sex['low']:.2f} to {sex['high']:.2f}) |")
        guessed = age["of_the_mean"]
    print(f"| nothing: the mean age | {guessed:.2f} | 0 | 0.5 |")


if __name__ == "__main__":
    main()
