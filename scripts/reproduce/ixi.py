"""IXI's heads at 2 mm, where a run costs minutes: stores, pretraining and fine-tuning for scale.py and windows.py.

The folder of the data holds heads with their regions, ID_T1.nii.gz and ID_regions.nii.gz, in the numbers of
scripts/reproduce/structures.py; eleven structures of them are the labels.
"""

import argparse
from pathlib import Path
from typing import Any

from asa.data.splits import write_split
from scripts.reproduce.commands import asa, brain_dice, quoted, score
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
DEVICES = {"cpu": CPU, "cuda": ("train.device=cuda", "loader.workers=0")}


def read_options(description: str | None) -> argparse.Namespace:
    """The options of scale.py and of windows.py: data, out, seeds, jobs and device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu", help="for training")
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
    out: Path, name: str, *settings: str, seed: int, device: str, heads: int = max(HEADS), steps: int = STEPS
) -> None:
    """Pretrain OUT/pretrained/NAME on the first heads by experiment=structures_pretrain, and probe it at the end."""
    warmup = min(200, steps // 5)  # that of the experiment, but for a short run
    length = (f"train.steps={steps}", f"train.validate_every={steps}", f"train.seed={seed}", f"optim.warmup={warmup}")
    paths: dict[str, Any] = {"data.store": out / "store_heads", "data.split_file": out / f"split{heads}.json"}
    paths |= {"data.labelled_store": out / "store_probed", "out": out / "pretrained" / name}
    first = ("experiment=structures_pretrain", CROP, *length, *DEVICES[device])
    asa("pretrain", *first, *settings, log=out / "logs" / f"{name}.txt", threads=1, **paths)


def finetune(
    out: Path, name: str, *settings: str, seed: int, device: str, experiment: str, init: Path | None = None
) -> None:
    """Fine-tune OUT/finetuned/NAME on the labelled heads, and score the tested ones."""
    length = (f"train.steps={TUNED}", f"train.validate_every={TUNED}", f"train.seed={seed}")
    paths: dict[str, Any] = {"data.store": out / "store_heads", "data.split_file": out / f"split{max(HEADS)}.json"}
    paths |= {"out": out / "finetuned" / name} | ({} if init is None else {"init": init})
    first = (f"experiment={experiment}", CROP, f"data.labelled={LABELLED}", *length, *DEVICES[device])
    file = out / "logs" / f"{name}.txt"
    asa("finetune", *first, *settings, log=file, threads=1, **paths)
    score(out, name, out / "store_heads", log=file, threads=1)
    print(f"{name}: {brain_dice(out, name, STRUCTURES).mean():.3f}", flush=True)
