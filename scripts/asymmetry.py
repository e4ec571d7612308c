"""How well asymmetry tells lesioned from healthy scans: asymmetry.py RUN HEALTHY_STORE LESIONED_STORE

For a pretrained SA-Swin, for the same network with its first weights, and for the plain difference of a scan and its
mirror image: the AUC of the score, of the map's mean and of its peak, and how often the peak lies in the lesion or in
its mirror image. "by chance" is the share of the head that these take.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asa.config import build
from asa.data.store import Store
from asa.engine.asymmetry import AsymmetryScorer
from asa.engine.checkpoint import read_description
from asa.engine.classification import auc
from asa.engine.predict import PredictSettings


def difference(image: Tensor) -> tuple[float, Tensor]:
    """The mean difference of a scan `(C, D, H, W)` and its mirror image, relative to the scan's mean, and its map."""
    found = (image - image.flip(-1)).abs().mean(dim=0)
    return float(found.mean() / image.mean()), found


def measure(compare, healthy: Store, lesioned: Store) -> list[float]:
    """AUC of score, mean and peak, the share of peaks in the lesion or its mirror, and that by chance."""
    numbers: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    hits, chance = [], []
    for store in (healthy, lesioned):
        for record in store.records:
            image = torch.from_numpy(np.array(store.image(record["id"]), dtype=np.float32))
            score, found = compare(image)
            numbers[store is lesioned].append((score, float(found[found > 0].mean()), float(found.max())))
            label = store.label(record["id"]) if store is lesioned else None
            if label is not None:
                lesion = (label[0] > 0) | (label[0] > 0)[..., ::-1]
                hits.append(bool(lesion.ravel()[int(found.argmax())]))
                chance.append(lesion.sum() / max(int((found > 0).sum()), 1))
    both = np.array([*numbers[False], *numbers[True]])
    truth = np.arange(len(both)) >= len(numbers[False])
    return [*(auc(both[:, k], truth) for k in range(3)), float(np.mean(hits)), float(np.mean(chance))]


def main() -> None:
    """Print a row for the trained network, the untrained one, and the plain difference."""
    run, healthy, lesioned = (Path(argument) for argument in sys.argv[1:4])
    scorer = AsymmetryScorer(run, PredictSettings())
    stores = Store(healthy), Store(lesioned)
    print(f"{len(stores[0])} healthy scans, {len(stores[1])} with a lesion on one side")
    print(f"{'':<20}{'AUC score':>10}{'map mean':>10}{'map peak':>10}{'peak hits':>10}{'by chance':>10}")

    def show(name: str, compare) -> None:
        print(f"{name:<20}" + "".join(f"{value:>10.3f}" for value in measure(compare, *stores)), flush=True)

    show("pretrained", scorer.compare)
    torch.manual_seed(0)
    scorer.model = build(read_description(run)["model"]).eval().to(scorer.device)
    show("first weights", scorer.compare)
    show("plain difference", difference)


if __name__ == "__main__":
    main()
