"""Zero-shot asymmetry of healthy and lesioned phantoms (docs/asymmetry.md): python -m scripts.reproduce.asymmetry OUT

A SA-Swin is pretrained on healthy phantoms at 3 mm. Healthy phantoms and phantoms with a tumour in one hemisphere are
then scored by it, by the same network with its initial weights, and by the plain difference between a scan and its
mirror image, with and without a blur of 2 voxels. Printed are the AUC of the scan's score and of the map's mean, its
top 1 % and its peak, and the fraction of peaks in the lesion or in its mirror image. "by chance" is the fraction of the
head that lesions and their mirror images cover. Rows "beyond healthy" are in standard deviations above the training
scans at each voxel. An hour on a busy core.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from asa.config import build
from asa.data.store import Store
from asa.evaluation.scans import auc
from asa.inference.anomaly import AnomalyMap, AsymmetryScorer, HealthyReference, read_pretrained
from asa.settings import PredictSettings
from asa.training.checkpoint import read_description
from scripts.reproduce.commands import asa, parser_of, quoted

Compare = Callable[[Tensor], AnomalyMap]


def difference(image: Tensor, blur: float = 0.0) -> AnomalyMap:
    """Mean difference between a scan `(C, D, H, W)` and its mirror image, relative to the scan's mean, and its map."""
    unlike = (image - image.flip(-1)).abs().mean(dim=0)
    inside = (image != 0).any(dim=0)
    shown = torch.from_numpy(ndimage.gaussian_filter(unlike.numpy(), blur)) if blur else unlike
    inside = inside | inside.flip(-1)
    return AnomalyMap(shown * inside, inside, float(unlike.mean() / image.mean()))


def volumes(store: Store) -> list[Tensor]:
    """The store's scans."""
    return [torch.from_numpy(np.array(store.image(record["id"]), dtype=np.float32)) for record in store.records]


def measure(healthy: list[AnomalyMap], lesioned: list[AnomalyMap], lesions: list[np.ndarray]) -> list[float]:
    """AUC of score, mean, top and peak, the fraction of peaks in the lesion or its mirror image, and that by chance."""
    both = [*healthy, *lesioned]
    numbers = np.array([(one.score, one.mean, one.top, float(one.map.max())) for one in both])
    truth = np.arange(len(both)) >= len(healthy)
    hits = [lesion.ravel()[int(one.map.argmax())] for one, lesion in zip(lesioned, lesions, strict=True)]
    chance = [lesion[one.inside.numpy()].mean() for one, lesion in zip(lesioned, lesions, strict=True)]
    return [*(auc(numbers[:, k], truth) for k in range(4)), float(np.mean(hits)), float(np.mean(chance))]


def make_stores(out: Path) -> None:
    """Phantoms and their stores."""
    cohorts = (("t1", 48, 1, "train"), ("t1", 24, 2, "healthy"), ("brats", 24, 3, "lesioned"))
    for kind, subjects, seed, cohort in cohorts:
        asa("phantom", f"kind={kind}", f"subjects={subjects}", f"seed={seed}", "resolution=3", out=out / cohort)
    tumour = ("data.images={t1: '*/*_t1.nii.gz'}", "data.label='*/*_seg.nii.gz'")
    readers = {
        "train": ("data=bids",),
        "healthy": ("data=bids",),
        "lesioned": ("data=folder", *tumour, "labels={1: necrotic, 2: oedema, 4: enhancing}"),
    }
    for cohort, reader in readers.items():
        paths = {"data.root": out / cohort, "out": out / f"{cohort}_store"}
        asa("prepare", *reader, "prepare.midway=true", "prepare.crop=64", *quoted(**paths))


def make(out: Path) -> None:
    """Phantoms, stores and the pretrained run."""
    make_stores(out)
    paths = {"data.store": out / "train_store", "out": out / "pretrained"}
    asa("pretrain", "experiment=sa_swin_demo", *quoted(**paths))


def main() -> None:
    """Print two rows for the pretrained network, the initial one, and the plain differences."""
    parser = parser_of(__doc__, "out")
    out = parser.parse_args().out
    make(out)
    stores = [Store(out / f"{cohort}_store") for cohort in ("healthy", "lesioned", "train")]
    healthy, lesioned, reference = (volumes(store) for store in stores)
    labels = [stores[1].label(record["id"]) for record in stores[1].records]
    lesions = [(label[0] > 0) | (label[0] > 0)[..., ::-1] for label in labels if label is not None]
    print(f"{len(healthy)} healthy scans, {len(lesioned)} lesioned on one side; {len(reference)} healthy for reference")
    print(
        f"{'':<42}" + "".join(f"{name:>11}" for name in ("AUC score", "mean", "top", "peak", "peak hits", "by chance"))
    )

    def show(name: str, compare: Compare) -> None:
        found = [[compare(volume) for volume in part] for part in (healthy, lesioned, reference)]
        above = HealthyReference(found[2], found[2][0].map.shape).standardise
        beyond = [[above(one) for one in part] for part in found[:2]]
        for title, (symmetric, asymmetric) in ((name, found[:2]), (f"{name}, beyond healthy", beyond)):
            values = measure(symmetric, asymmetric, lesions)
            print(f"{title:<42}" + "".join(f"{value:>11.3f}" for value in values), flush=True)

    scorer = AsymmetryScorer(*read_pretrained(out / "pretrained"), PredictSettings())
    show("pretrained", scorer.measure)
    torch.manual_seed(0)
    scorer.model = build(read_description(out / "pretrained")["model"]).eval().to(scorer.device)
    show("initial weights", scorer.measure)
    show("plain difference", difference)
    show("plain difference, blurred", partial(difference, blur=2.0))


if __name__ == "__main__":
    main()
