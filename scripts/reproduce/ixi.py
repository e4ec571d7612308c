"""IXI's heads at 2 mm, where a run costs minutes: stores, pretraining and fine-tuning for the scripts beside this.

The folder of the data holds heads with their regions, ID_T1.nii.gz and ID_regions.nii.gz, in the numbers of
scripts/reproduce/structures.py; eleven structures of them are the labels.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.splits import write_split
from scripts.reproduce.commands import asa, brain_dice, parser_of, quoted, quoted_path, score
from scripts.reproduce.few_labels import CPU
from scripts.reproduce.structures import LABELS, STRUCTURES, write_structures

HEADS = (5, 15, 40, 80)  # to pretrain on; each set holds the smaller ones
TESTED, PROBED, LABELLED = 30, 8, 3
STEPS, TUNED = 3000, 1000  # of a pretraining, and of a fine-tuning
PREPARED = (
    "data=folder",
    "data.images={t1: *_T1.nii.gz}",
    "prepare.strip=deepbet",
    "prepare.midway=true",
    "prepare.spacing=2",
    "prepare.crop=[96,112,80]",
)
CROP = "crop=[64,64,80]"  # the whole width
SPLIT = f"split{max(HEADS)}"
DEVICES = {"cpu": CPU, "cuda": ("train.device=cuda", "loader.workers=0")}


def read_options(description: str | None, *others: str) -> argparse.Namespace:
    """The options of the scripts: data, out, seeds, jobs and device, and folders of other data."""
    parser = parser_of(description, "data")
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu", help="for training")
    for name in others:
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def read_ids(data: Path) -> list[str]:
    """The ids of the heads with regions in a folder, sorted."""
    return sorted(path.name.removesuffix("_regions.nii.gz") for path in data.glob("*_regions.nii.gz"))


def make_stores(data: Path, out: Path, jobs: int) -> None:
    """The store of all heads, one of a few that are tested, for the linear probe, and a split for each set of heads.

    Raises:
        ValueError: fewer heads than are needed.
    """
    ids = read_ids(data)
    test, train = ids[:TESTED], ids[TESTED:]
    if len(train) < max(HEADS):
        raise ValueError(f"{data}: {len(ids)} heads with regions; {TESTED + max(HEADS)} are needed")
    for name, chosen in (("heads", ids), ("probed", test[:PROBED])):
        write_structures(data, out / name, chosen, image="T1", regions="regions")
        paths = quoted(**{"data.root": out / name, "out": out / f"store_{name}"})
        labels, log = ("data.label=*_structures.nii.gz", LABELS), out / "logs" / f"prepare_{name}.txt"
        asa("prepare", *PREPARED, *labels, f"workers={jobs}", *paths, log=log)
    for heads in HEADS:
        write_split(out / f"split{heads}.json", {"train": train[:heads], "validation": [], "test": test})


def pretrain(
    out: Path,
    name: str,
    *settings: str,
    seed: int,
    device: str,
    split: str = SPLIT,
    steps: int = STEPS,
    stores: Sequence[str] = ("heads",),
) -> None:
    """Pretrain OUT/pretrained/NAME on the training part of a split, and probe it at the end.

    It has the settings of experiment=structures_pretrain, and the stores are those of OUT/store_*.
    """
    warmup = min(200, steps // 5)  # that of the experiment, but for a short run
    length = (f"train.steps={steps}", f"train.validate_every={steps}", f"train.seed={seed}", f"optim.warmup={warmup}")
    paths: dict[str, Any] = {"data.split_file": out / f"{split}.json", "data.labelled_store": out / "store_probed"}
    if len(stores) == 1:
        paths["data.store"] = out / f"store_{stores[0]}"
    else:
        settings += (f"data.stores=[{','.join(quoted_path(out / f'store_{store}') for store in stores)}]",)
    first = ("experiment=structures_pretrain", CROP, *length, *DEVICES[device])
    log = out / "logs" / f"{name}.txt"
    asa("pretrain", *first, *settings, log=log, threads=1, out=out / "pretrained" / name, **paths)


def finetune(
    out: Path,
    name: str,
    *settings: str,
    seed: int,
    device: str,
    experiment: str,
    init: Path | None = None,
    labelled: int = LABELLED,
    split: str = SPLIT,
    store: str = "heads",
) -> None:
    """Fine-tune OUT/finetuned/NAME on the first labelled scans of a split, and score those of its test part."""
    length = (f"train.steps={TUNED}", f"train.validate_every={TUNED}", f"train.seed={seed}")
    paths: dict[str, Any] = {"data.store": out / f"store_{store}", "data.split_file": out / f"{split}.json"}
    paths |= {"out": out / "finetuned" / name} | ({} if init is None else {"init": init})
    first = (f"experiment={experiment}", CROP, f"data.labelled={labelled}", *length, *DEVICES[device])
    file = out / "logs" / f"{name}.txt"
    asa("finetune", *first, *settings, log=file, threads=1, **paths)
    score(out, name, out / f"store_{store}", log=file, threads=1)
    print(f"{name}: {brain_dice(out, name, STRUCTURES).mean():.3f}", flush=True)


def dice_of(out: Path, names: Sequence[str]) -> np.ndarray:
    """The mean Dice of each tested scan, over the structures and the runs."""
    return np.mean([brain_dice(out, name, STRUCTURES).mean(axis=1) for name in names], axis=0)
