"""Lesions found by a network that never saw a patient: python -m scripts.reproduce.detector HEADS BRAINS MS OUT

Lesions are planted into healthy heads of one site, four times into each, and a segmentation network learns them
(docs/asymmetry.md), from the encoder of the package and from scratch. No label of a real lesion is used. Its map, the
probability of a lesion, is measured as those of scripts/reproduce/planted.py: on brains of another site, with and
without planted lesions. And on patients with multiple sclerosis, whose lesions raters have drawn, beside the maps that
compare the two sides. What is done is not done again; an hour and a half of one core.

HEADS: the BIDS folder of scripts/reproduce/shipped_encoder.py. BRAINS: see scripts/reproduce/planted.py.
MS: skull-stripped ID_T1.nii.gz with ID_lesions.nii.gz, 1 mm.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asa.data.splits import write_split
from asa.data.store import Store
from asa.evaluation.scans import voxel_scores
from asa.inference.anomaly import LabelScorer
from asa.inference.segmentation import Segmenter
from scripts.reproduce.commands import asa, parser_of, quoted
from scripts.reproduce.few_labels import CPU
from scripts.reproduce.planted import HEADER, make, maps_of_sides, read_bench, rows_of
from scripts.reproduce.shipped_encoder import NAME, PREPARED

ALIKE = ("prepare.midway=true", "prepare.spacing=1")


def make_stores(heads: Path, ms: Path, out: Path) -> None:
    """OUT/train: the heads with lesions; OUT/ms: the patients."""
    log = out / "log.txt"
    asa("prepare", *PREPARED, *quoted(**{"data.root": heads.resolve(), "out": out / "heads"}), log=log)
    if not (out / "planted" / "health.csv").exists():
        lesions = ("kind=lesions", "planted=1", "draws=4", "joined=true")
        asa("phantom", *lesions, log=log, source=out / "heads", out=out / "planted")
    for store, data, image, *subject in (
        ("train", out / "planted", "t1", "data.subject='(.*)_draw'"),
        ("ms", ms.resolve(), "T1"),
    ):
        files = (f"data.images={{t1: '*_{image}.nii.gz'}}", "data.label=*_lesions.nii.gz", "labels={1: lesion}")
        paths = quoted(**{"data.root": data, "out": out / store})
        asa("prepare", "data=folder", *files, *subject, *ALIKE, *paths, log=log)


def train(out: Path, name: str, **init: str) -> None:
    """Fine-tune OUT/finetuned/NAME on all of OUT/train."""
    split = out / "split.json"
    write_split(split, {"train": sorted(set(Store(out / "train").records.subjects)), "validation": [], "test": []})
    paths = {"data.store": out / "train", "data.split_file": split, "out": out / "finetuned" / name}
    asa("finetune", "experiment=planted_lesions", *CPU, log=out / "log.txt", threads=1, **paths, **init)


def map_of(run: Path) -> Callable[[Tensor], Tensor]:
    """The probability of a lesion `(D, H, W)` by a network, from a brain `(1, D, H, W)`."""
    scorer = LabelScorer(Segmenter(run))
    return lambda image: scorer.compute(image).map


def rows_of_patients(name: str, sides: bool, compute: Callable[[Tensor], Tensor], store: Store) -> Iterator[str]:
    """A row for each scan of a store; maps that compare the sides find a lesion or its mirror image."""
    for record in store.records:
        image = torch.from_numpy(np.array(store.image(record["id"]), np.float32))
        lesion = np.array(store.label(record["id"]))[0] > 0
        inside = (image[0] != 0).numpy()
        if sides:
            inside, lesion = inside | inside[:, :, ::-1], lesion | lesion[:, :, ::-1]
        with torch.inference_mode():
            values = compute(image).numpy()[inside]
        scores = voxel_scores(values, lesion[inside])
        shown = (f"{scores[score]:.3f}" for score in ("auc", "average_precision", "by_chance"))
        yield f"| {name} | {record['id']} | {' | '.join(shown)} |"


def main() -> None:
    """Train what has not been trained, and print the tables."""
    parser = parser_of(__doc__, "heads", "brains", "ms")
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    options = parser.parse_args()
    out = options.out
    make_stores(options.heads, options.ms, out)
    make(options.brains, out / "tested")
    maps = {name: (True, compute) for name, compute in maps_of_sides().items()}
    bench, patients = read_bench(out / "tested"), Store(out / "ms")
    print(HEADER)
    for name, init in (("pretrained", {"init": f"asa://{NAME}"}), ("scratch", {})):
        train(out, name, **init)
        maps[name] = False, map_of(out / "finetuned" / name)
        for row in rows_of(name, *maps[name], bench):
            print(row, flush=True)
    print("\n| map | patient | AUC, voxels | average precision | by chance |\n|---|---|---:|---:|---:|")
    for name, (sides, compute) in maps.items():
        for row in rows_of_patients(name, sides, compute, patients):
            print(row, flush=True)


if __name__ == "__main__":
    main()
