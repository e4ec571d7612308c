"""Do more unlabelled heads help? python -m scripts.reproduce.scale IXI OUT

At 2 mm, where a run costs minutes: encoders of experiment=structures_pretrain from 5, 15, 40 and 80 heads, at equal
steps and at equal epochs, each fine-tuned on the same three labelled heads (experiment=structures_finetune) and tested
on 30 others. Beside them a fine-tuning from scratch, and the linear probe of the tokens. Each larger set of heads holds
the smaller ones. Prints the table of docs/evidence.md, and the change of the Dice per doubling of the heads with its
interval over the tested heads; draws OUT/scale.png. What is done is not done again. About two hours of one core.

IXI: heads with their regions, ID_T1.nii.gz and ID_regions.nii.gz, in the numbers of scripts/reproduce/structures.py.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from asa.data.splits import write_split
from scripts.reproduce.commands import asa, brain_dice, interval, quoted, score, validations
from scripts.reproduce.few_labels import CPU
from scripts.reproduce.structures import LABELS, STRUCTURES, write_structures

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADS = (5, 15, 40, 80)
TESTED, PROBED, LABELLED = 30, 8, 3
STEPS, TUNED = 3000, 1000  # of a pretraining, and of a fine-tuning
PREPARED = (
    "data=folder",
    "data.images={t1: *_T1.nii.gz}",
    "data.label=*_structures.nii.gz",
    LABELS,
    "prepare.strip=deepbet",
    "prepare.midway=true",
    "prepare.spacing=2",
    "prepare.crop=[96,112,80]",
)
CROP = "crop=[64,64,80]"  # the whole width


class Encoder(NamedTuple):
    """A pretraining."""

    heads: int
    steps: int
    seed: int

    def name(self) -> str:
        """Name of its folders."""
        return f"heads{self.heads}_steps{self.steps}_seed{self.seed}"


def make_stores(data: Path, out: Path, jobs: int) -> list[str]:
    """The store of all heads, one of a few that are tested, for the probe, and the splits; the ids of all heads."""
    ids = sorted(path.name.removesuffix("_regions.nii.gz") for path in data.glob("*_regions.nii.gz"))
    test, train = ids[:TESTED], ids[TESTED:]
    if len(train) < max(HEADS):
        raise ValueError(f"{data}: {len(ids)} heads with regions; {TESTED + max(HEADS)} are needed")
    for name, chosen in (("heads", ids), ("probed", test[:PROBED])):
        write_structures(data, out / name, chosen, image="T1", regions="regions")
        paths = quoted(**{"data.root": out / name, "out": out / f"store_{name}"})
        asa("prepare", *PREPARED, f"workers={jobs}", *paths, log=out / "logs" / f"prepare_{name}.txt")
    for heads in HEADS:
        parts = {"train": train[:heads], "validation": [], "test": test}
        write_split(out / f"split{heads}.json", parts)
    return ids


def pretrain(out: Path, encoder: Encoder) -> None:
    """Pretrain on the first heads."""
    name, every = encoder.name(), f"train.validate_every={encoder.steps}"
    settings = ("experiment=structures_pretrain", CROP, f"train.steps={encoder.steps}", every)
    paths: dict[str, Any] = {"data.store": out / "store_heads", "data.split_file": out / f"split{encoder.heads}.json"}
    paths |= {"data.labelled_store": out / "store_probed", "out": out / "pretrained" / name}
    asa("pretrain", *settings, f"train.seed={encoder.seed}", *CPU, log=out / "logs" / f"{name}.txt", threads=1, **paths)


def finetune(out: Path, name: str, seed: int, **start: Path) -> None:
    """Fine-tune on the labelled heads, and score the tested ones."""
    length = (f"train.steps={TUNED}", f"train.validate_every={TUNED}")
    settings = ("experiment=structures_finetune", CROP, f"data.labelled={LABELLED}", f"train.seed={seed}", *length)
    paths: dict[str, Any] = {"data.store": out / "store_heads", "data.split_file": out / f"split{max(HEADS)}.json"}
    paths |= {"out": out / "finetuned" / name, **start}
    file = out / "logs" / f"{name}.txt"
    asa("finetune", *settings, *CPU, log=file, threads=1, **paths)
    score(out, name, out / "store_heads", log=file, threads=1)
    print(f"{name}: {brain_dice(out, name, STRUCTURES).mean():.3f}", flush=True)


def run(out: Path, encoder: Encoder) -> None:
    """An encoder and its fine-tuning."""
    pretrain(out, encoder)
    finetune(out, encoder.name(), encoder.seed, init=out / "pretrained" / encoder.name())


def dice_of(out: Path, names: Sequence[str]) -> np.ndarray:
    """The mean Dice of each tested head, over the structures and the runs."""
    return np.mean([brain_dice(out, name, STRUCTURES).mean(axis=1) for name in names], axis=0)


def slopes(dice: np.ndarray) -> np.ndarray:
    """The change per doubling of the heads of each tested head, from its Dice by number of heads `(N, tested)`."""
    doublings = np.log2(HEADS)
    centred = doublings - doublings.mean()
    return np.asarray(centred @ dice / (centred**2).sum())


def report(out: Path, kinds: dict[str, dict[int, int]], seeds: Sequence[int]) -> None:
    """Print the table and the slopes, and draw them."""
    scratch = dice_of(out, [f"scratch_seed{seed}" for seed in seeds])
    print(
        "\n| heads | steps | linear probe | Dice | minus scratch, 95 % interval over heads |\n|---:|---:|---:|---:|---|"
    )
    print(f"| from scratch | | | {scratch.mean():.3f} | |")
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes.axhline(scratch.mean(), linestyle="--", color="grey", label="from scratch")
    said = []
    for kind, steps in kinds.items():
        rows = []
        for heads, count in steps.items():
            names = [Encoder(heads, count, seed).name() for seed in seeds]
            probes = [validations(out / "pretrained" / name)[-1]["linear_dice"] for name in names]
            rows.append(dice_of(out, names))
            if kind == next(iter(kinds)) or heads < max(HEADS):  # the largest set is in both
                gain = interval(rows[-1] - scratch, sign="+")
                print(f"| {heads} | {count} | {np.mean(probes):.3f} | {rows[-1].mean():.3f} | {gain} |")
        axes.plot(HEADS, np.mean(rows, axis=1), marker="o", label=f"pretrained, {kind}")
        said.append(f"{kind}: {interval(slopes(np.array(rows)), sign='+')} per doubling of the heads")
    print("\n" + "\n".join(said))
    axes.set_xscale("log")
    axes.set_xticks(HEADS, [str(heads) for heads in HEADS])
    axes.minorticks_off()
    axes.set_xlabel("unlabelled heads")
    axes.set_ylabel(f"mean Dice of eleven structures, {LABELLED} labelled heads")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out / "scale.png")


def main() -> None:
    """Run what has not been run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    options = parser.parse_args()
    out = options.out.resolve()
    make_stores(options.data, out, options.jobs)
    kinds = {
        "equal steps": dict.fromkeys(HEADS, STEPS),
        "equal epochs": {heads: round(STEPS * heads / max(HEADS)) for heads in HEADS},
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in options.seeds:
            encoders = {Encoder(heads, steps, seed) for kind in kinds.values() for heads, steps in kind.items()}
            tasks = [pool.submit(finetune, out, f"scratch_seed{seed}", seed)]
            tasks += [pool.submit(run, out, encoder) for encoder in sorted(encoders)]
            for task in tasks:
                task.result()
    report(out, kinds, options.seeds)


if __name__ == "__main__":
    main()
