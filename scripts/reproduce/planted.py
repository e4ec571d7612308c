"""Lesions in real brains, found without labels (docs/asymmetry.md): python -m scripts.reproduce.planted DATA RUN OUT

Each brain is compared with itself after a lesion was planted (asa-phantom kind=lesions). Four maps are compared: the
difference of the two sides; the asymmetry map of a SA-Swin with its first weights; and how far a masked autoencoder's
prediction of each patch from the others is from the patch, with a quarter or three quarters of the patches masked.
Each is measured as it is, and in standard deviations above the healthy scans of other people at the voxel. Printed are
the AUC of `top` over scans; the mean over the patients of the voxels' AUC and average precision; and the number of
peaks in a lesion. Maps that compare the two sides cannot tell which one is ill, so their truth is the lesion and its
mirror image, whose part of the head is larger ("by chance"). Half an hour of one core.

DATA: skull-stripped T1-weighted brains ID_SS.nii.gz, one per person. RUN: a run of asa-pretrain method=asa or mae
without normalised targets, on brains that are prepared alike, such as scripts.reproduce.shipped_encoder makes.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor

from asa.data.io.nifti import read_image, read_label
from asa.data.io.tables import read_rows
from asa.data.store import Store
from asa.evaluation.scans import auc, voxel_scores
from asa.inference.anomaly import BLUR, AnomalyMap, HealthyReference, PredictedPatches
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.models.sa_swin import sa_swin_tiny
from asa.training.checkpoint import read_model
from scripts.reproduce.commands import asa, parser_of, quoted

SD = BLUR / 2.355  # in voxels of 1 mm


def blurred(volume: Tensor) -> Tensor:
    """A volume `(D, H, W)` after a Gaussian of 6 mm."""
    return torch.from_numpy(ndimage.gaussian_filter(volume.numpy(), SD))


def maps_of_sides() -> dict[str, Callable[[Tensor], Tensor]]:
    """The maps that compare the two sides of a brain `(1, D, H, W)`, by name; they are `(D, H, W)`."""
    torch.manual_seed(0)
    untrained = sa_swin_tiny().eval()
    return {
        "difference of the two sides": lambda image: (blurred(image[0]) - blurred(image[0].flip(-1))).abs(),
        "SA-Swin, first weights": lambda image: untrained.asymmetry(image[None])[1][0],
    }


def maps_of(run: Path) -> dict[str, tuple[bool, Callable[[Tensor], Tensor]]]:
    """By name: whether a map compares the two sides, and a function from a brain `(1, D, H, W)` to it, `(D, H, W)`."""
    model, _ = read_model(run)
    if not isinstance(model, MaskedAutoencoder):
        raise ValueError(f"{run}: not a run of asa-pretrain method=asa or mae")
    window = model.encoder.img_size

    def error(masked: int) -> Callable[[Tensor], Tensor]:
        network = PredictedPatches(model, masked=masked)
        return lambda image: blurred(
            (sliding_window_inference(image[None], window, 1, network, overlap=0.5)[0] - image)[0].abs()
        )

    return {
        **{name: (True, compute) for name, compute in maps_of_sides().items()},
        "predicted, a quarter masked": (False, error(1)),
        "predicted, three quarters masked": (False, error(3)),
    }


def measure(
    healthy: Mapping[str, AnomalyMap], patients: Mapping[str, AnomalyMap], lesions: Mapping[str, np.ndarray]
) -> tuple[float, float, float, float, int]:
    """AUC of `top`; means of the AUC of voxels, average precision, and that by chance; number of peaks in a lesion."""
    tops = np.array([scan.top for scan in [*healthy.values(), *patients.values()]])
    voxels, hits = [], 0
    for id, scan in patients.items():
        inside = scan.inside.numpy()
        scores = voxel_scores(scan.map.numpy()[inside], lesions[id][inside])
        voxels.append([scores[name] for name in ("auc", "average_precision", "by_chance")])
        hits += int(scores["peak_in_lesion"])
    area, precision, chance = np.mean(voxels, axis=0)
    return auc(tops, np.arange(len(tops)) >= len(healthy)), float(area), float(precision), float(chance), hits


def make(data: Path, out: Path) -> None:
    """The store of healthy brains, and a patient of each."""
    alike = ("prepare.midway=true", "prepare.crop=[168,208,160]")
    paths = quoted(**{"data.root": data.resolve(), "out": out / "store"})
    asa("prepare", "data=folder", "data.images={t1: '*_SS.nii.gz'}", *alike, *paths)
    if not (out / "planted" / "health.csv").exists():
        asa("phantom", "kind=lesions", "planted=1", "seed=3", source=out / "store", out=out / "planted")


class Bench(NamedTuple):
    """Brains `(1, D, H, W)` as they were and with a lesion, the lesion `(D, H, W)`, and its kind, each by id."""

    healthy: dict[str, Tensor]
    patients: dict[str, Tensor]
    lesions: dict[str, np.ndarray]
    kinds: dict[str, str]


def read_bench(out: Path) -> Bench:
    """What `make` left in a folder."""
    store, planted = Store(out / "store"), out / "planted"
    kinds = {row["id"]: row["lesion"] for row in read_rows(planted / "health.csv")}
    return Bench(
        {id: torch.from_numpy(np.array(store.image(id), np.float32)) for id in kinds},
        {id: torch.from_numpy(read_image(planted / f"{id}_t1.nii.gz").data.T.copy())[None] for id in kinds},
        {id: read_label(planted / f"{id}_lesions.nii.gz").data.T > 0 for id in kinds},
        kinds,
    )


def rows_of(name: str, sides: bool, compute: Callable[[Tensor], Tensor], bench: Bench) -> Iterator[str]:
    """Rows of the table for a map, as it is and above healthy: of all lesions, and of each kind."""

    def measured(image: Tensor) -> AnomalyMap:
        inside = image[0] != 0
        inside = inside | inside.flip(-1) if sides else inside
        with torch.inference_mode():
            return AnomalyMap(compute(image) * inside, inside)

    found = [{id: measured(image) for id, image in images.items()} for images in (bench.healthy, bench.patients)]
    reference = HealthyReference(found[0].values(), next(iter(found[0].values())).map.shape)
    above = [{id: reference.standardise(scan, [found[0][id]]) for id, scan in scans.items()} for scans in found]
    truth = {id: lesion | lesion[:, :, ::-1] if sides else lesion for id, lesion in bench.lesions.items()}
    for title, (healthy, patients) in ((name, found), (f"{name}, above healthy", above)):
        for kind in ("all", *sorted(set(bench.kinds.values()))):
            ids = [id for id in bench.kinds if kind in ("all", bench.kinds[id])]
            row = measure(healthy, {id: patients[id] for id in ids}, truth)
            numbers = " | ".join(f"{number:.3f}" for number in row[:4])
            yield f"| {title} | {kind} | {numbers} | {row[4]} of {len(ids)} |"


HEADER = """| map | lesions | AUC, scans | AUC, voxels | average precision | by chance | peaks in a lesion |
|---|---|---:|---:|---:|---:|---:|"""


def main() -> None:
    """Print two rows for each map, and one for each kind of lesion."""
    options = parser_of(__doc__, "data", "run", "out").parse_args()
    make(options.data, options.out)
    bench = read_bench(options.out)
    print(HEADER)
    for name, (sides, compute) in maps_of(options.run).items():
        for row in rows_of(name, sides, compute, bench):
            print(row, flush=True)


if __name__ == "__main__":
    main()
