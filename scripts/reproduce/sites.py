"""Is an encoder of one scanner of use at another? python -m scripts.reproduce.sites IXI OUT --oasis OASIS --heads HEADS

Encoders from 80 heads of IXI, from nine brains of OASIS-1, from the 30 heads of ds002748, and from all of these, at
2 mm and at equal steps. Each is fine-tuned, by a head that reads nothing but its tokens (experiment=structures_light),
with 1 and 3 labelled heads of IXI, tested on 30 others, and with 1 and 3 labelled brains of OASIS-1 (manual labels),
tested on six others; beside it a fine-tuning from scratch. Prints a table. What is done is not done again; OUT can be
that of scripts.reproduce.scale, whose stores and encoder of IXI it then shares. Two hours of one core for each seed.

IXI: see scripts/reproduce/ixi.py. OASIS: see scripts/reproduce/structures.py. HEADS: see
scripts/reproduce/shipped_encoder.py.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from asa.data.splits import write_split
from asa.data.store import Store
from scripts.reproduce.commands import asa, interval, quoted
from scripts.reproduce.few_labels import LIGHT
from scripts.reproduce.ixi import (
    HEADS,
    LABELLED,
    PREPARED,
    SPLIT,
    STEPS,
    TESTED,
    dice_of,
    finetune,
    make_stores,
    pretrain,
    read_options,
)
from scripts.reproduce.scale import Encoder
from scripts.reproduce.structures import LABELS, subjects, write_structures

TRAIN = 9  # brains of OASIS-1, and the others are tested
COUNTS = (1, LABELLED)
SOURCES = {"ixi": ("heads",), "oasis": ("oasis",), "ds002748": ("ds002748",), "all": ("heads", "oasis", "ds002748")}
TARGETS = {"ixi": ("heads", SPLIT), "oasis": ("oasis", "split_oasis")}  # store and split


class Run(NamedTuple):
    """A fine-tuning at a target from the encoder of a source, or from scratch."""

    target: str
    labelled: int
    source: str
    seed: int

    def name(self) -> str:
        """Name of its folders."""
        return f"{self.target}{self.labelled}_from_{self.source}_seed{self.seed}"


def encoder(source: str, seed: int) -> str:
    """Name of an encoder's folder."""
    return Encoder(max(HEADS), STEPS, seed).name() if source == "ixi" else f"{source}_seed{seed}"


def make_others(oasis: Path, heads: Path, out: Path, jobs: int) -> None:
    """The stores of OASIS-1 and ds002748, and the splits of each source."""
    ids = subjects(oasis)
    write_structures(oasis, out / "oasis", ids)
    common = (*(one for one in PREPARED if not one.startswith("data")), f"workers={jobs}")
    files = ("data=folder", "data.images={t1: *_SS.nii.gz}", "data.label=*_structures.nii.gz", LABELS)
    paths = quoted(**{"data.root": out / "oasis", "out": out / "store_oasis"})
    asa("prepare", *files, *common, *paths, log=out / "logs" / "prepare_oasis.txt")
    paths = quoted(**{"data.root": heads.resolve(), "out": out / "store_ds002748"})
    asa("prepare", "data=bids", *common, *paths, log=out / "logs" / "prepare_ds002748.txt")
    ixi, others = ([*Store(out / f"store_{name}").records.ids] for name in ("heads", "ds002748"))
    first = ixi[TESTED:][: max(HEADS)]  # as make_stores splits them
    parts = {
        "oasis": (ids[:TRAIN], ids[TRAIN:]),
        "ds002748": (others, []),
        "all": ([*first, *ids[:TRAIN], *others], [*ixi[:TESTED], *ids[TRAIN:]]),
    }
    for name, (train, test) in parts.items():
        write_split(out / f"split_{name}.json", {"train": train, "validation": [], "test": test})


def report(out: Path, seeds: Sequence[int]) -> None:
    """Print the table: Dice of each source at each target, and the difference from the encoder of the target."""
    print("\n| tested on | labelled | encoder from | Dice | minus scratch, 95 % interval over scans | minus own site |")
    print("|---|---:|---|---:|---|---|")
    for target in TARGETS:
        for labelled in COUNTS:
            rows = {
                source: dice_of(out, [Run(target, labelled, source, seed).name() for seed in seeds])
                for source in ("scratch", *SOURCES)
            }
            for source, row in rows.items():
                gains = [
                    "" if source in ("scratch", base) else interval(row - rows[base], sign="+")
                    for base in ("scratch", target)
                ]
                print(f"| {target} | {labelled} | {source} | {row.mean():.3f} | {' | '.join(gains)} |")


def main() -> None:
    """Run what has not been run, and print the table."""
    options = read_options(__doc__, "oasis", "heads")
    out, device = options.out, options.device
    make_stores(options.data, out, options.jobs)
    make_others(options.oasis, options.heads, out, options.jobs)

    def tune(run: Run) -> None:
        init = None if run.source == "scratch" else out / "pretrained" / encoder(run.source, run.seed)
        store, split = TARGETS[run.target]
        own = {"seed": run.seed, "device": device, "labelled": run.labelled, "store": store, "split": split}
        finetune(out, run.name(), experiment=LIGHT, init=init, **own)

    def encode(seed: int, source: str) -> None:
        split, name = SPLIT if source == "ixi" else f"split_{source}", encoder(source, seed)
        pretrain(out, name, seed=seed, device=device, split=split, stores=SOURCES[source])

    starts = ("scratch", *SOURCES)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda which: encode(*which), itertools.product(options.seeds, SOURCES)))
        list(pool.map(tune, itertools.starmap(Run, itertools.product(TARGETS, COUNTS, starts, options.seeds))))
    report(out, options.seeds)


if __name__ == "__main__":
    main()
