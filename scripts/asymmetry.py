"""How well asymmetry tells lesioned from healthy scans: asymmetry.py RUN HEALTHY_STORE LESIONED_STORE REFERENCE_STORE

For a pretrained SA-Swin, for the same network with its first weights, and for the plain difference of a scan and its
mirror image, blurred by 2 voxels or not: the AUC of the scan's score and of the map's mean, its highest hundredth and
its peak, and how often the peak lies in the lesion or in its mirror image. Rows "beyond healthy" are in spreads above
what the scans of REFERENCE_STORE show at each place: healthy ones, none of them among the two stores that are compared.
"by chance" is the share of the head that lesions and their mirror images take.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from asa.config import build
from asa.data.store import Store
from asa.evaluation.classification import auc
from asa.inference.asymmetry import Asymmetry, AsymmetryScorer, HealthyReference
from asa.inference.segmentation import PredictSettings
from asa.training.checkpoint import read_description

Compare = Callable[[Tensor], Asymmetry]


def difference(image: Tensor, blur: float = 0.0) -> Asymmetry:
    """The mean difference of a scan `(C, D, H, W)` and its mirror image, relative to the scan's mean, and its map."""
    unlike = (image - image.flip(-1)).abs().mean(dim=0)
    inside = (image != 0).any(dim=0)
    shown = torch.from_numpy(ndimage.gaussian_filter(unlike.numpy(), blur)) if blur else unlike
    inside = inside | inside.flip(-1)
    return Asymmetry(float(unlike.mean() / image.mean()), shown * inside, inside)


def volumes(store: Store) -> list[Tensor]:
    """The store's scans."""
    return [torch.from_numpy(np.array(store.image(record["id"]), dtype=np.float32)) for record in store.records]


def measure(healthy: list[Asymmetry], lesioned: list[Asymmetry], lesions: list[np.ndarray]) -> list[float]:
    """AUC of score, mean, top and peak, the share of peaks in the lesion or its mirror, and that by chance."""
    both = [*healthy, *lesioned]
    numbers = np.array([(one.score, one.mean, one.top, float(one.map.max())) for one in both])
    truth = np.arange(len(both)) >= len(healthy)
    hits = [lesion.ravel()[int(one.map.argmax())] for one, lesion in zip(lesioned, lesions, strict=True)]
    chance = [lesion[one.inside.numpy()].mean() for one, lesion in zip(lesioned, lesions, strict=True)]
    return [*(auc(numbers[:, k], truth) for k in range(4)), float(np.mean(hits)), float(np.mean(chance))]


def main() -> None:
    """Print two rows for the trained network, the untrained one, and the plain differences."""
    run, *paths = (Path(argument) for argument in sys.argv[1:5])
    stores = [Store(path) for path in paths]
    healthy, lesioned, reference = (volumes(store) for store in stores)
    labels = [stores[1].label(record["id"]) for record in stores[1].records]
    lesions = [(label[0] > 0) | (label[0] > 0)[..., ::-1] for label in labels if label is not None]
    print(f"{len(healthy)} healthy scans, {len(lesioned)} lesioned on one side; {len(reference)} healthy for reference")
    print(
        f"{'':<42}" + "".join(f"{name:>11}" for name in ("AUC score", "mean", "top", "peak", "peak hits", "by chance"))
    )

    def show(name: str, compare: Compare) -> None:
        found = [[compare(volume) for volume in part] for part in (healthy, lesioned, reference)]
        above = HealthyReference(found[2]).standardise
        beyond = [[above(one) for one in part] for part in found[:2]]
        for title, rows in ((name, found[:2]), (f"{name}, beyond healthy", beyond)):
            print(f"{title:<42}" + "".join(f"{value:>11.3f}" for value in measure(*rows, lesions)), flush=True)

    scorer = AsymmetryScorer(run, PredictSettings())
    show("pretrained", scorer.measure)
    torch.manual_seed(0)
    scorer.model = build(read_description(run)["model"]).eval().to(scorer.device)
    show("first weights", scorer.measure)
    show("plain difference", difference)
    show("plain difference, blurred", partial(difference, blur=2.0))


if __name__ == "__main__":
    main()
