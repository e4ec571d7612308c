"""A fine-tuning whose labels have sides, on real brains: python -m scripts.reproduce.joined_sides DATA OUT

Eleven structures of OASIS-1 brains, ten of them left and right, are learnt from one labelled brain with the encoder of
the package (experiment=structures_finetune, in which a symmetric network joins the sides), and predicted in brains of
other people, where the mid-sagittal surface separates them. Printed are the rate of voxels with the wrong side, the
Dice of the separated labels, and that of the same label maps with their sides joined. Half an hour of one core.

DATA: as of scripts/reproduce/structures.py.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from asa.data.io.nifti import read_label
from asa.data.splits import write_split
from asa.evaluation.metrics import dice
from scripts.reproduce.commands import asa, declared, parser_of, quoted, score
from scripts.reproduce.few_labels import CPU, TESTED
from scripts.reproduce.structures import STRUCTURES, subjects, write_structures

PARTS = STRUCTURES | {"cerebellum_gm": (38, 39), "vermis": (71, 72, 73)}
# Names of labels with the values in ID_glm of each: right before left where a structure has two.
LABELS = {
    name: (value,)
    for part, values in PARTS.items()
    if len(values) == 2
    for name, value in zip((f"right_{part}", f"left_{part}"), values, strict=True)
} | {part: values for part, values in PARTS.items() if len(values) != 2}


def measure(truth: np.ndarray, found: np.ndarray, labels: Collection[str]) -> tuple[float, float, float]:
    """Rate of the wrong side where both maps have one; mean Dice of the labels, and of them with their sides joined.

    Args:
        truth, found: label maps with the values 1, 2, ...
        labels: their names, where the left one of a pair follows the right one.
    """
    side = np.array([0, *({"right": 1, "left": 2}.get(name.partition("_")[0], 0) for name in labels)])
    structure = np.arange(len(side)) - (side == 2)
    both = (side[truth] > 0) & (side[found] > 0)
    wrong = float((side[truth] != side[found])[both].mean())
    return wrong, mean_dice(truth, found), mean_dice(structure[truth], structure[found])


def mean_dice(truth: np.ndarray, found: np.ndarray) -> float:
    """The mean over the values of the truth."""
    return float(np.mean([dice(found == value, truth == value) for value in np.unique(truth[truth > 0])]))


def report(out: Path, ids: Sequence[str], truths: Path, labels: Collection[str]) -> str:
    """A row of `measure` for each scan of OUT/predicted/sides, and the means."""
    rows = []
    for id in ids:
        truth = read_label(truths / f"{id}_sides.nii.gz").data
        rows.append(measure(truth, read_label(out / "predicted" / "sides" / f"{id}.nii.gz").data, labels))
    shown = [*zip(ids, rows, strict=True), ("mean", np.mean(rows, axis=0))]
    lines = [f"| {id} | " + " | ".join(f"{value:.4f}" for value in row) + " |" for id, row in shown]
    return "\n".join(["| brain | wrong side | Dice | Dice, sides joined |", "|---|---:|---:|---:|", *lines])


def main() -> None:
    """Run what has not been run, and print the table."""
    parser = parser_of(__doc__, "data", "out")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    out, ids = options.out.resolve(), subjects(options.data)
    first, last = TESTED[0]
    store, log, split = out / "store", out / "log.txt", out / "split.json"
    write_structures(options.data, out / "brains", ids, labels=LABELS, name="sides")
    write_split(split, {"train": ids[:first] + ids[last:], "validation": [], "test": ids[first:last]})
    names = declared(dict(enumerate(LABELS, start=1)))
    files = ("data=folder", "data.images={t1: *_SS.nii.gz}", "data.label=*_sides.nii.gz", names)
    asa("prepare", *files, *quoted(**{"data.root": out / "brains", "out": store}), log=log)
    length = (f"train.steps={options.steps}", f"train.validate_every={options.steps}", "data.labelled=1", *CPU)
    paths = {"data.store": store, "data.split_file": split, "out": out / "finetuned" / "sides"}
    asa("finetune", "experiment=structures_finetune", "init=asa://tiny-t1", *length, log=log, threads=1, **paths)
    score(out, "sides", store, log=log, threads=1)
    print(report(out, ids[first:last], out / "brains", LABELS))


if __name__ == "__main__":
    main()
