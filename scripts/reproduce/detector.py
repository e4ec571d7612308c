"""Lesions found by networks that were trained on planted ones: python -m scripts.reproduce.detector HEADS BRAINS MS OUT

Lesions are planted into healthy heads of one site, four times into each, and a segmentation network learns them, from
the encoder of the package and from scratch (docs/asymmetry.md). No label of a real lesion is used. The map of a scan is
1 minus the probability of no lesion. It is measured as those of scripts/reproduce/planted.py are, on brains of another
site with and without planted lesions, and on patients with multiple sclerosis, whose lesions were drawn by raters. Then
the same from few labelled scans: 1, 2 and 10 planted ones, and one of the patients, tested on the other. What is done
is not done again; three hours of one core.

HEADS: the BIDS folder of scripts/reproduce/shipped_encoder.py. BRAINS: see scripts/reproduce/planted.py.
MS: skull-stripped ID_T1.nii.gz with ID_lesions.nii.gz, 1 mm.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score

from asa.data.io.nifti import read_image, read_label
from asa.data.io.tables import read_rows
from asa.data.phantom.planted import VALUES
from asa.data.splits import write_split
from asa.data.store import Store
from asa.evaluation.lesions import lesion_f1
from asa.evaluation.metrics import dice
from asa.evaluation.scans import auc
from asa.inference.asymmetry import Asymmetry
from scripts.reproduce.commands import asa, declared, quoted
from scripts.reproduce.few_labels import CPU
from scripts.reproduce.planted import make, maps_of_sides, measure
from scripts.reproduce.shipped_encoder import NAME, PREPARED

DRAWS, FEW = 4, (1, 2, 10)  # of lesions into each head; labelled heads
STEPS, FEW_STEPS = 2000, 400
TOUCHING = np.ones((3, 3, 3))
PLANTED_FILES = ("data=folder", "data.images={t1: '*_t1.nii.gz'}", "data.label=*_lesions.nii.gz", declared(VALUES))
MS_FILES = ("data=folder", "data.images={t1: '*_T1.nii.gz'}", "data.label=*_lesions.nii.gz", declared({1: "wmh"}))
ALIKE = ("prepare.midway=true", "prepare.spacing=1")
SUBJECT = "data.subject='(.*)_draw'"


class Training(NamedTuple):
    """A fine-tuning: the store in OUT, the ids that are labelled (all of the store's if empty), and its start."""

    store: str
    labelled: tuple[str, ...] = ()
    init: str | None = None
    steps: int = FEW_STEPS


def make_stores(heads: Path, brains: Path, ms: Path, out: Path) -> None:
    """OUT/train: the heads with each draw of lesions; OUT/few: some, once; OUT/tested: see planted.make; OUT/ms."""
    log = out / "log.txt"
    asa("prepare", *PREPARED, *quoted(**{"data.root": heads.resolve(), "out": out / "heads"}), log=log)
    for store, settings in (("train", (f"draws={DRAWS}",)), ("few", ("seed=1", f"subjects={max(FEW)}"))):
        files = out / f"planted_{store}"
        if not (files / "health.csv").exists():
            asa("phantom", "kind=lesions", "planted=1", *settings, log=log, source=out / "heads", out=files)
        paths = quoted(**{"data.root": files, "out": out / store})
        subject = (SUBJECT,) if store == "train" else ()
        asa("prepare", *PLANTED_FILES, *subject, *ALIKE, *paths, log=log)
    make(brains, out / "tested")
    asa("prepare", *MS_FILES, *ALIKE, *quoted(**{"data.root": ms.resolve(), "out": out / "ms"}), log=log)


def trainings(out: Path) -> dict[str, Training]:
    """All fine-tunings by name, in an order in which each finds its start."""
    encoder, detector = f"asa://{NAME}", str(out / "finetuned" / "detector")
    found = {"detector": Training("train", init=encoder, steps=STEPS)}
    for record in Store(out / "ms").records:
        for start, init in (("scratch", None), ("encoder", encoder), ("detector", detector)):
            found[f"ms_{record['id']}_{start}"] = Training("ms", (record["id"],), init)
    found["detector_scratch"] = Training("train", steps=STEPS)
    heads = tuple(record["id"] for record in Store(out / "few").records)
    for count in FEW:
        for start, init in (("scratch", None), ("encoder", encoder)):
            found[f"planted{count}_{start}"] = Training("few", heads[:count], init)
    return found


def train(out: Path, name: str, training: Training) -> None:
    """Fine-tune OUT/finetuned/NAME."""
    store, paths = out / training.store, {"data.store": out / training.store, "out": out / "finetuned" / name}
    subjects = {record["id"]: record["subject"] for record in Store(store).records}
    chosen = sorted({subjects[id] for id in training.labelled or subjects})
    split = out / "splits" / f"{name}.json"
    write_split(split, {"train": chosen, "validation": [], "test": []})
    start = {} if training.init is None else {"init": training.init}
    settings = (
        "experiment=structures_finetune",
        f"train.steps={training.steps}",
        f"train.validate_every={training.steps}",
    )
    asa("finetune", *settings, *CPU, log=out / "log.txt", threads=1, **paths, **start, **{"data.split_file": split})


class Found(NamedTuple):
    """What a network finds in a scan, on the scan's own grid."""

    map: Asymmetry  # of no asymmetry: 1 minus the probability of no lesion, inside the brain
    label: np.ndarray  # bool: a lesion of any kind


def predict(
    out: Path, name: str, folder: str, source: Path, images: dict[str, Path], *settings: str
) -> dict[str, Found]:
    """What OUT/finetuned/NAME finds in scans, by id; their label maps are in OUT/predicted/NAME/FOLDER."""
    predicted, found = out / "predicted" / name / folder, {}
    if not all((predicted / f"{id}.nii.gz").exists() for id in images):
        paths = {"checkpoint": out / "finetuned" / name, "input": source, "out": predicted}
        asa("predict", "probabilities=true", *settings, log=out / "log.txt", threads=1, **paths)
    for id, path in images.items():
        inside = torch.from_numpy(read_image(path).data.T != 0)
        nothing = read_image(predicted / "probabilities" / id / "background.nii.gz").data.T
        found[id] = Found(
            Asymmetry(0.0, torch.from_numpy(1 - nothing) * inside, inside),
            read_label(predicted / f"{id}.nii.gz").data.T > 0,
        )
    return found


def voxels_row(scans: dict[str, Found], truth: dict[str, np.ndarray]) -> str:
    """Means over patients of the AUC of voxels, average precision, Dice and F1 of lesions."""
    rows = []
    for id, scan in scans.items():
        inside = scan.map.inside.numpy()
        values, lesion = scan.map.map.numpy()[inside], truth[id][inside]
        scores = auc(values, lesion), average_precision_score(lesion, values)
        rows.append((*scores, dice(scan.label, truth[id]), lesion_f1(scan.label, truth[id])))
    return " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))


def compared_sides(path: Path) -> list[str]:
    """Rows of the maps that compare the two sides, whose truth is the lesions and their mirror image."""
    store, rows = Store(path), []
    for name, compute in maps_of_sides().items():
        for record in store.records:
            image = torch.from_numpy(np.array(store.image(record["id"]), np.float32))
            lesion = np.array(store.label(record["id"]))[0] > 0
            inside = ((image[0] != 0) | (image[0] != 0).flip(-1)).numpy()
            with torch.inference_mode():
                values = compute(image).numpy()[inside]
            truth = (lesion | lesion[:, :, ::-1])[inside]
            scores = f"{auc(values, truth):.3f} | {average_precision_score(truth, values):.3f}"
            rows.append(f"| {name} | {record['id']} | {scores} | | |")
    return rows


def main() -> None:
    """Run what has not been run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("heads", "brains", "ms"):
        parser.add_argument(name, type=Path)
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    options = parser.parse_args()
    out, tested = options.out, options.out / "tested"
    make_stores(options.heads, options.brains, options.ms, out)
    kinds = {row["id"]: row["lesion"] for row in read_rows(tested / "planted" / "health.csv")}
    planted = {id: tested / "planted" / f"{id}_t1.nii.gz" for id in kinds}
    healthy = {id: options.brains.resolve() / f"{id}_SS.nii.gz" for id in kinds}
    ill = {path.name.removesuffix("_T1.nii.gz"): path.resolve() for path in options.ms.glob("*_T1.nii.gz")}
    lesions = {id: read_label(tested / "planted" / f"{id}_lesions.nii.gz").data.T > 0 for id in kinds}
    drawn = {id: read_label(options.ms / f"{id}_lesions.nii.gz").data.T > 0 for id in ill}
    tables: dict[str, list[str]] = {"planted": [], "few": [], "ms": []}
    tables["ms"] += compared_sides(out / "ms")
    for name, training in trainings(out).items():
        train(out, name, training)
        if training.store != "ms":
            people = predict(out, name, "healthy", options.brains, healthy, "images={t1: '*_SS.nii.gz'}")
            patients = predict(out, name, "planted", tested / "planted", planted, "images={t1: '*_t1.nii.gz'}")
            maps = {id: scan.map for id, scan in people.items()}
            false = np.mean([ndimage.label(scan.label, TOUCHING)[1] for scan in people.values()])
            ml = np.mean([scan.label.sum() / 1000 for scan in people.values()])
            for kind in ("all", *sorted(set(kinds.values()))):
                ids = [id for id in kinds if kind in ("all", kinds[id])]
                row = measure(maps, {id: patients[id].map for id in ids}, lesions)
                numbers = " | ".join(f"{number:.3f}" for number in row[:4])
                tables["planted"].append(f"| {name} | {kind} | {numbers} | {row[4]} of {len(ids)} |")
            tables["few"].append(f"| {name} | {voxels_row(patients, lesions)} | {false:.1f} | {ml:.2f} |")
        unseen = {id: path for id, path in ill.items() if id not in training.labelled}
        found = predict(out, name, "ms", options.ms, unseen, "images={t1: '*_T1.nii.gz'}")
        for id, scan in found.items():
            tables["ms"].append(f"| {name} | {id} | {voxels_row({id: scan}, drawn)} |")
        print(f"{name}: {tables['ms'][-1]}", flush=True)
    scores = ("AUC, voxels", "average precision")
    columns = {
        "planted": ("network", "lesions", "AUC, scans", *scores, "by chance", "peaks in a lesion"),
        "few": ("network", *scores, "Dice", "F1 of lesions", "lesions in a healthy brain", "ml"),
        "ms": ("network", "patient", *scores, "Dice", "F1 of lesions"),
    }
    for name, header in columns.items():
        rule = "|" + "---|" * len(header)
        print("\n".join(["", f"| {' | '.join(header)} |", rule, *tables[name]]))


if __name__ == "__main__":
    main()
