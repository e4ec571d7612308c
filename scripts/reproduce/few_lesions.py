"""Few labelled lesions, and three first weights: python -m scripts.reproduce.few_lesions BRAINS MS DETECTOR OUT

White-matter lesions are planted into each of 15 brains, five of which are tested (docs/asymmetry.md). Networks are
fine-tuned on 1, 2 and 10 of the others, for equal steps: from scratch, from the encoder of the package, and from the
encoder of a network that has learnt planted lesions of all kinds. Printed are Dice and lesion-wise F1 (of the WMH
challenge) on the tested brains and on two patients with multiple sclerosis, and what is found in the tested brains
without a lesion. What is done is not done again; half an hour of one core for each number of labelled brains.

BRAINS, MS: see scripts/reproduce/planted.py and detector.py. DETECTOR: OUT/finetuned/pretrained of detector.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from asa.data.io.nifti import read_label
from asa.data.io.tables import read_rows
from asa.data.splits import write_split
from asa.data.store import Store
from asa.evaluation.comparison import read_run
from scripts.reproduce.commands import asa, interval, parser_of, quoted
from scripts.reproduce.detector import ALIKE
from scripts.reproduce.few_labels import CPU
from scripts.reproduce.shipped_encoder import NAME

TESTED, STEPS = 5, 400
HEADER = """| labelled | from | Dice | less scratch | F1 of lesions | healthy brains: lesions, ml | Dice, MS | F1, MS |
|---:|---|---:|---|---:|---:|---:|---:|"""


def make_stores(brains: Path, ms: Path, out: Path) -> None:
    """OUT/labelled, OUT/tested: brains with lesions; OUT/healthy: the tested ones without; OUT/ms: the patients."""
    log = out / "log.txt"

    def prepare(store: str, data: Path, image: str, *labels: str) -> None:
        paths = quoted(**{"data.root": data.resolve(), "out": out / store})
        images = f"data.images={{t1: '*_{image}.nii.gz'}}"
        asa("prepare", "data=folder", images, *labels, *ALIKE, *paths, log=log)

    prepare("brains", brains, "SS")
    for folder, planted in (("lesions", 1), ("unplanted", 0.01)):  # of fifteen a hundredth are none
        if not (out / folder / "health.csv").exists():
            lesions = ("kind=lesions", "lesions=[wmh]", f"planted={planted}", "joined=true", "seed=5")
            asa("phantom", *lesions, log=log, source=out / "brains", out=out / folder)
    marked = ("data.label=*_lesions.nii.gz", "labels={1: lesion}")
    ids = sorted(Store(out / "brains").records.ids)
    for store, chosen, folder, labels in (
        ("labelled", ids[TESTED:], "lesions", marked),
        ("tested", ids[:TESTED], "lesions", marked),
        ("healthy", ids[:TESTED], "unplanted", ()),
    ):
        links = out / f"{store}_files"
        links.mkdir(exist_ok=True)
        for file in (file for id in chosen for file in (out / folder).glob(f"{id}_*.nii.gz")):
            if not (links / file.name).exists():
                (links / file.name).symlink_to(file)
        prepare(store, links, "t1", *labels)
    prepare("ms", ms, "T1", *marked)
    write_split(out / "split.json", {"train": ids[TESTED:], "validation": [], "test": []})


def measured(out: Path, name: str, checkpoint: Path) -> dict[str, np.ndarray]:
    """Predict all that a network is tested on. Dice and F1 of the tested brains and of the patients; what is found in
    healthy brains, in number and in ml."""
    log = out / "log.txt"
    found: dict[str, np.ndarray] = {}
    for store in ("tested", "healthy", "ms"):
        predicted, scores = out / "predicted" / f"{name}_{store}", out / "evaluated" / f"{name}_{store}"
        table = predicted / "volumes.csv"
        if not table.exists() or len(read_rows(table)) < len(Store(out / store).records):
            asa("predict", log=log, threads=1, checkpoint=checkpoint, input=out / store, out=predicted)
        if store == "healthy":
            rows = read_rows(table)
            counts = [ndimage.label(read_label(predicted / f"{row['id']}.nii.gz").data)[1] for row in rows]
            found[store] = np.array([counts, [float(row["lesion_ml"]) for row in rows]])
            continue
        if not (scores / "digests.json").exists():
            asa("evaluate", "policy=wmh2017", log=log, predictions=predicted, truth=out / store, out=scores)
        values = [case for _, case in sorted(read_run(name, scores).values.items())]
        found[store] = np.array([[case[score] for case in values] for score in ("dice", "lesion_f1")])
    return found


def row(labelled: int, arm: str, found: dict[str, np.ndarray], scratch: dict[str, np.ndarray] | None = None) -> str:
    """A row of the table: means, and the paired difference from scratch in Dice with its interval over brains."""
    difference = "" if scratch is None else interval(found["tested"][0] - scratch["tested"][0], "+")
    dice, f1 = found["tested"].mean(axis=1)
    count, ml = found["healthy"].mean(axis=1)
    of_patients = " | ".join(" and ".join(f"{value:.3f}" for value in scores) for scores in found["ms"])
    return f"| {labelled} | {arm} | {dice:.3f} | {difference} | {f1:.3f} | {count:.0f}, {ml:.0f} ml | {of_patients} |"


def main() -> None:
    """Train what has not been trained, and print the table."""
    parser = parser_of(__doc__)
    for name in ("brains", "ms", "detector", "out"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    parser.add_argument("--labelled", nargs="+", type=int, default=[1, 2, 10], help="numbers of labelled brains")
    options = parser.parse_args()
    out = options.out
    make_stores(options.brains, options.ms, out)
    print(f"{HEADER}\n{row(0, 'the detector', measured(out, 'detector', options.detector))}", flush=True)
    inits: dict[str, dict[str, Any]] = {
        "scratch": {},
        "encoder": {"init": f"asa://{NAME}"},
        "detector": {"init": options.detector},
    }
    length = (f"train.steps={STEPS}", f"train.validate_every={STEPS}")
    for labelled in options.labelled:
        scratch = None
        for arm, init in inits.items():
            name = f"{arm}{labelled}"
            paths = {"data.store": out / "labelled", "data.split_file": out / "split.json", **init}
            network = out / "finetuned" / name
            tuned = ("experiment=planted_lesions", *length, f"data.labelled={labelled}", *CPU)
            asa("finetune", *tuned, log=out / "log.txt", threads=1, **paths, out=network)
            found = measured(out, name, network)
            print(row(labelled, arm, found, scratch), flush=True)
            scratch = scratch or found


if __name__ == "__main__":
    main()
