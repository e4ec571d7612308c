"""All 145 regions of a head at once, left and right apart: python -m scripts.reproduce.regions DATA OUT

A network is fine-tuned from scratch on the regions of 20 heads at 2 mm, with their sides joined (vit_conv_tiny with the
settings of experiment=structures_finetune), and predicts 8 others, where the mid-sagittal surface separates the sides.
Printed are the rows of scripts/reproduce/joined_sides.py, the seconds of a step, and the memory of the process. One to
two hours of one core.

DATA: heads ID_T1.nii.gz with regions in MUSE's numbers, ID_regions.nii.gz, as of scripts/reproduce/ixi.py.
"""

import json
import resource
from pathlib import Path

import numpy as np

from asa.data.io.nifti import read_label
from asa.data.splits import write_split
from scripts.reproduce.commands import asa, declared, parser_of, quoted, score
from scripts.reproduce.few_labels import CPU
from scripts.reproduce.ixi import CROP, PREPARED, read_ids
from scripts.reproduce.joined_sides import report
from scripts.reproduce.plane import PAIRS
from scripts.reproduce.structures import write_structures

TRAINED, TESTED = 20, 8  # heads


def write_labels(data: Path, out: Path, ids: list[str]) -> list[str]:
    """Write ID_sides.nii.gz with the values 1, 2, ... and a link to each image; returns the names of the values.

    The left value of a pair follows the right one.
    """
    found = [np.unique(read_label(data / f"{id}_regions.nii.gz").data) for id in ids]
    held = set(np.concatenate(found).tolist()) - {0}
    named = {
        value: f"{side}_{left}"
        for left, right in PAIRS
        for side, value in (("right", right), ("left", left))
        if {left, right} <= held
    }
    named |= {value: f"region_{value}" for value in sorted(held - named.keys())}
    write_structures(data, out, ids, "T1", "regions", {name: (value,) for value, name in named.items()}, "sides")
    return list(named.values())


def main() -> None:
    """Run what has not been run, and print the table."""
    parser = parser_of(__doc__, "data", "out")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    out, ids = options.out.resolve(), read_ids(options.data)[: TRAINED + TESTED]
    store, log, split, test = out / "store", out / "log.txt", out / "split.json", ids[:TESTED]
    labels = write_labels(options.data, out / "heads", ids)
    write_split(split, {"train": ids[TESTED:], "validation": [], "test": test})
    names = declared(dict(enumerate(labels, start=1)))
    paths = quoted(**{"data.root": out / "heads", "out": store})
    asa("prepare", *PREPARED, "data.label=*_sides.nii.gz", names, *paths, log=log)
    settings = ("experiment=structures_finetune", CROP, "method.background_weight=1", "optim.encoder_lr=1", *CPU)
    length = (f"train.steps={options.steps}", f"train.validate_every={options.steps}")
    run = out / "finetuned" / "sides"
    places = {"data.store": store, "data.split_file": split, "out": run}
    asa("finetune", *settings, *length, log=log, threads=1, **places)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    score(out, "sides", store, log=log, threads=1)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    speeds = [row["volumes_per_second"] for row in rows if "volumes_per_second" in row]
    print(report(out, test, out / "heads", labels))
    print(f"{len(labels)} labels; {1 / np.median(speeds):.1f} s a step of one crop; {memory:.1f} GiB at most")


if __name__ == "__main__":
    main()
