"""Labels with a side on real brains, the second table of docs/asymmetry.md: python -m scripts.reproduce.sides DATA OUT

A SA-Swin is pretrained on 12 OASIS-1 brains at 3 mm; its scores of scans and of their mirror images are compared. Small
networks then learn six labels (cortex, white and deep grey matter, left and right), with and without SACA and with
several position encodings. Printed are Dice and the rate of voxels that get the label of the wrong side. Some 40
minutes on one core.

DATA: skull-stripped OASIS-1 brains, ID_SS.nii.gz, with the manual regions of the MICCAI 2012 multi-atlas challenge,
ID_glm.nii.gz; the R package malf.templates carries 15.
"""

from pathlib import Path

import numpy as np
import torch

from asa.data.io.nifti import read_image, write_label
from asa.data.store import Store
from asa.evaluation.metrics import dice
from asa.inference.anomaly import AsymmetryScorer, read_pretrained
from asa.settings import PredictSettings
from scripts.reproduce.commands import asa, declared, parser_of
from scripts.reproduce.plane import CORTEX, DEEP

WHITE = (45, 44)  # of that challenge, (left, right)
NAMES = ("cortex", "white", "deep")  # labels 1 and 2, 3 and 4, 5 and 6: left is odd
# Steps and settings of each network, and an augmentation that does nothing.
NETWORKS = {
    "unet": (100, ["model=unet_tiny"]),
    "unet_saca": (100, ["model=unet_tiny", "model.symmetry=true"]),
    "unet_sincos": (100, ["model=unet_tiny", "model.position=sincos"]),
    "unet_sincos_saca": (100, ["model=unet_tiny", "model.position=sincos", "model.symmetry=true"]),
    "sa_swin": (100, ["model=sa_swin_unet_tiny"]),
    "sa_swin_position": (100, ["model=sa_swin_unet_tiny", "model.position=true"]),
    "unet_longer": (400, ["model=unet_tiny"]),
    "unet_saca_longer": (400, ["model=unet_tiny", "model.symmetry=true"]),
}
PLAIN = ["augment.mirror_probability=0", "augment.rotation=0", "augment.scale=[1,1]", "augment.gamma=[1,1]"]


def side_table() -> np.ndarray:
    """Value of a manual region -> label, uint8 `(256,)`; other regions are background."""
    table = np.zeros(256, dtype=np.uint8)
    for first, pairs in zip((1, 3, 5), (CORTEX, [WHITE], DEEP), strict=True):
        for pair in pairs:
            table[list(pair)] = first, first + 1
    return table


def make_labels(data: Path, out: Path) -> None:
    """Write the labels of all scans, and links to their images."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(data.glob("*_glm.nii.gz")):
        id, regions = path.name.removesuffix("_glm.nii.gz"), read_image(path)
        write_label(out / f"{id}_sides.nii.gz", side_table()[regions.data.astype(np.uint8)], regions)
        link = out / f"{id}_SS.nii.gz"
        link.unlink(missing_ok=True)
        link.symlink_to((data / link.name).resolve())


def confusion(truth: np.ndarray, found: np.ndarray) -> list[float]:
    """Rate of the wrong side, mean Dice of the six labels, and Dice of each tissue with its sides joined.

    The rate is over the voxels that are labelled in both truth and prediction.
    """
    both = (truth > 0) & (found > 0)
    wrong = float((truth[both] % 2 != found[both] % 2).mean())
    sided = float(np.mean([dice(truth == label, found == label) for label in range(1, 7)]))
    joined = [(truth + 1) // 2, (found + 1) // 2]
    return [wrong, sided, *(dice(joined[0] == k, joined[1] == k) for k in (1, 2, 3))]


def score(truths: Path, folders: list[Path]) -> None:
    """Print a row for each folder of predictions: means over its scans, and the largest rate."""
    head = ("wrong side", "worst scan", "Dice, sided", *(f"{name}, joined" for name in NAMES))
    print(f"{'':<20}" + "".join(f"{name:>15}" for name in head))
    for folder in folders:
        rows = []
        for path in sorted(folder.glob("*.nii.gz")):
            id = path.name.removesuffix(".nii.gz")
            truth = read_image(truths / f"{id}_sides.nii.gz")
            rows.append(confusion(truth.data.astype(np.uint8), read_image(path).data.astype(np.uint8)))
        mean = np.mean(rows, axis=0)
        shown = [mean[0], max(row[0] for row in rows), *mean[1:]]
        print(f"{folder.name:<20}" + "".join(f"{value:>15.4f}" for value in shown))


def compare_flipped(run: Path, store: Store) -> None:
    """Print the largest differences between a scan's score and map and those of its mirror image."""
    scorer = AsymmetryScorer(*read_pretrained(run), PredictSettings())
    scores, differences = [], []
    for record in store.records:
        image = torch.from_numpy(np.array(store.image(record["id"]), dtype=np.float32))
        one, other = scorer.measure(image), scorer.measure(image.flip(-1))
        scores.append((one.score, one.top))
        differences.append((abs(one.score - other.score), float((one.map.flip(-1) - other.map).abs().max())))
    (score, top), (apart, unlike) = np.median(scores, axis=0), np.max(differences, axis=0)
    print(f"{len(scores)} scans, median score {score:.3g}, median top of the map {top:.3g}")
    print(f"flipped: scores differ by {apart:.1e} at most, maps from the flipped map by {unlike:.1e}")


def main() -> None:
    """Run all stages, and print the table."""
    options = parser_of(__doc__, "data", "out").parse_args()
    out, store = options.out, options.out / "store"
    make_labels(options.data, out / "sides")
    files = ("data.images={t1: '*_SS.nii.gz'}", "data.label='*_sides.nii.gz'")
    names = (f"{side}_{name}" for name in NAMES for side in ("left", "right"))
    labels = declared(dict(enumerate(names, start=1)))
    grid = ("prepare.midway=true", "prepare.spacing=3", "prepare.crop=[48,64,64]")
    asa("prepare", "data=folder", *files, labels, *grid, **{"data.root": out / "sides", "out": store})
    split = ("data.split.validation=0", "data.split.test=3", "train.log_every=10")
    steps = ("train.batch_size=2", "train.steps=100", "optim.warmup=10", "train.validate_every=0")
    run = {"data.store": store, "out": out / "pretrained"}
    asa("pretrain", "experiment=sa_swin_demo", *split, *steps, **run)
    compare_flipped(out / "pretrained", Store(store))
    for name, (length, model) in NETWORKS.items():
        steps = (f"train.steps={length}", "train.batch_size=1", "optim.lr=2e-3", "optim.warmup=5")
        run = {"data.store": store, "out": out / name}
        asa("finetune", *model, *split, "crop=[32,32,64]", *steps, *PLAIN, **run)
        asa("predict", "part=test", checkpoint=out / name, input=store, out=out / "predictions" / name)
    score(out / "sides", sorted((out / "predictions").iterdir()))


if __name__ == "__main__":
    main()
