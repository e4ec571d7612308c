"""Lesions planted into the scans of a store: patients whose every other voxel is that of the scan.

A tumour with oedema and mass effect, white-matter lesions, an infarct, or a part of one hemisphere that has lost
tissue. The first three are those of the phantom (`asa.data.phantom.lesions`), where tissue is what the T1 shows.

Images are (C, D, H, W) and maps (D, H, W) as in the store; lengths are mm.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from torch import Tensor
from tqdm import tqdm

from asa.data.io.files import write_json, write_whole
from asa.data.io.nifti import spacing_of, write_image
from asa.data.io.tables import csv_text
from asa.data.phantom.anatomy import CONTRAST, blend, ventricle_distances
from asa.data.phantom.cohort import claim
from asa.data.phantom.lesions import FLUID, Lesion, hyperintensities, infarct, plan_tumour, random_point, tumour
from asa.data.phantom.warp import grid_points, sample, smooth_noise, to_grid
from asa.data.preprocessing.resampling import largest_part
from asa.data.store import Store

VALUES = {1: "wmh", 2: "infarct", 3: "tumour", 4: "oedema", 5: "atrophy"}  # of the label maps
T1 = ("t1", "t1ce")  # the first of these channels shows the tissues
LEAST = 0.02  # a smaller fraction of a lesion changes nothing
DEEP = 20.0  # from the surface of the brain: CSF there is that of the ventricles
LARGEST_NOISE = 0.06  # of a lesion, relative to white matter: the scan's own, without its edges
MASS_EFFECT = 3.0  # standard deviations of the displacement around a tumour, where it ends
LOST, WIDENED = 50.0, (1.5, 2.5)  # radius of the part that loses tissue, and how much of it at its centre
TABLE = "health.csv"


class Planted(NamedTuple):
    """A scan with lesions."""

    image: np.ndarray
    label: np.ndarray  # `VALUES`, uint8
    changed: np.ndarray  # bool: where the image may differ from the scan's; around a tumour it is more than the label
    drawn: dict[str, Any]  # plain data


def plant_cohort(
    source: str | Path,
    out: str | Path,
    *,
    lesions: Sequence[str] = ("tumour", "wmh", "infarct", "atrophy"),
    planted: float = 0.5,
    draws: int = 1,
    joined: bool = False,
    seed: int = 0,
    subjects: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write one scan of each subject of a store as NIfTI, with a lesion in a part of them, and their health.

    The files are ID_CHANNEL.nii.gz and ID_lesions.nii.gz in the stored space, whose values are `VALUES`, and
    `health.csv`: id, subject, health (0 with a lesion), lesion, volume in ml, and contrast: the mean of the first
    channel where it is labelled, relative to the same voxels before. A scan without a lesion is as it is in the store.
    Of several draws the ids are ID_draw1, ID_draw2, ...

    Args:
        source: the store; its channels have names of `CONTRAST`, and one of them is a T1.
        lesions: what is planted: "tumour", "wmh", "infarct" or "atrophy"; one kind in each patient, drawn with equal
            probability.
        planted: fraction of the subjects who get one.
        draws: times that each scan is written, each with other lesions.
        joined: whether all lesions have the value 1 in the label maps.
        seed: random seed. What a subject gets depends on it, on the draw and on the subject's number among the sorted.
        subjects: how many of the store's, in the order of their names; None: all.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, ValueError: no store, channels that lesions have no intensity in, options out of range, no
            place for a lesion in a scan, or `out` holds something else.
    """
    store, out = Store(source), Path(out)
    if unknown := [name for name in store.channels if name not in CONTRAST]:
        raise ValueError(f"{source}: lesions have no intensity in {unknown[0]}: only in {', '.join(CONTRAST)}")
    if store.settings.get("normalise") == "zscore":
        raise ValueError(f"{source}: lesions are drawn in intensities of 0 and more: prepare without normalise=zscore")
    if not set(T1) & set(store.channels):
        raise ValueError(f"{source}: its channels are {', '.join(store.channels)}: a T1 has to show the tissues")
    if not lesions or set(lesions) - PLANTERS.keys():
        raise ValueError(f"lesions={list(lesions)}: choose some of {', '.join(PLANTERS)}")
    if type(draws) is not int or draws < 1:
        raise ValueError(f"draws={draws}: give how often each scan is written, a whole number from 1")
    if subjects is not None and (type(subjects) is not int or subjects < 1):
        raise ValueError(f"subjects={subjects}: give how many of the store's, a whole number from 1, or null for all")
    if not 0 < planted <= 1:
        raise ValueError(f"planted={planted}: give the fraction of subjects with a lesion, above 0, at most 1")
    scans = {record["subject"]: record for record in reversed(store.records)}  # the first one of each
    names = sorted(scans)[:subjects]
    orders, count = np.random.default_rng(seed), round(planted * len(names))
    patients = [set(orders.permutation(names)[:count].tolist()) for _ in range(draws)]
    about = {"phantom": True, "kind": "lesions", "lesions": list(lesions)}
    about |= {"planted": planted, "draws": draws, "seed": seed}
    values = {str(value): name for value, name in ({1: "lesion"} if joined else VALUES).items()}
    claim(out, about | {"values": values, "source": str(Path(source).resolve()), "subjects": len(names)})
    written, rows = [out / "phantom.json", out / TABLE], []
    jobs = list(itertools.product(range(draws), enumerate(names)))
    for draw, (number, name) in tqdm(jobs, desc="phantom lesions", unit="scan", disable=not progress):
        stored = scans[name]["id"]
        id = stored if draws == 1 else f"{stored}_draw{draw + 1}"
        before, affine = np.array(store.image(stored), np.float32), np.array(scans[name]["chain"]["stored_affine"])
        nowhere, kind = np.zeros(before.shape[1:], bool), ""
        found = Planted(before, nowhere.astype(np.uint8), nowhere, {})
        if name in patients[draw]:
            rng = np.random.default_rng([seed, number, draw])
            kind = lesions[int(rng.integers(len(lesions)))]
            try:
                found = plant(kind, before, store.channels, spacing_of(affine)[::-1].tolist(), rng)
            except ValueError as error:
                raise ValueError(f"{id}: {error}") from None
        inside = found.label > 0
        label = inside.astype(np.uint8) if joined else found.label
        ml = inside.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
        contrast = found.image[0][inside].mean() / before[0][inside].mean() if inside.any() else 1.0
        rows.append([id, name, int(not kind), kind, f"{ml:.3f}", f"{contrast:.3f}"])
        for what, volume in zip([*store.channels, "lesions"], [*found.image, label], strict=True):
            written.append(out / f"{id}_{what}.nii.gz")
            write_image(written[-1], volume.transpose(2, 1, 0), affine, dtype=volume.dtype)
        written.append(out / f"{id}.json")
        write_json(written[-1], {**about, "lesion": kind, "drawn": found.drawn})
    write_whole(out / TABLE, csv_text(["id", "subject", "health", "lesion", "ml", "contrast"], rows).encode())
    return written


def plant(
    kind: str, image: np.ndarray, channels: Sequence[str], spacing: Sequence[float], rng: np.random.Generator
) -> Planted:
    """A scan `(C, D, H, W)`, 0 outside the brain, with a lesion; a ValueError if it has no place for one.

    The kind is a key of `PLANTERS`, channels are keys of `CONTRAST`, one of them a T1, and spacing is along D, H, W.
    """
    t1 = next(channels.index(name) for name in T1 if name in channels)
    scan = Scan(torch.from_numpy(image), t1, tuple(spacing), rng)
    moved, lesions, drawn = PLANTERS[kind](scan)
    fractions, label = blend(lesions, scan.brain)
    texture = 1 + 0.07 * to_grid(smooth_noise(rng, scan.extent, 3.0), tuple(label.shape))[0]
    parts = [fraction * (fraction > LEAST) for fraction in fractions]
    result, changed = moved.clone(), (moved != scan.image).any(dim=0) | torch.stack(parts).any(dim=0)
    if not (pure := scan.white > 0.9).any():
        raise ValueError("no white matter to compare a lesion with: is this a T1, with voxels of 4 mm at most?")
    for k in np.flatnonzero(image.any(axis=(1, 2, 3))).tolist():  # the channels that this scan has
        name = channels[k]
        unit = float(scan.image[k][pure].mean()) / CONTRAST[name][2][0]  # the phantom's intensities are relative
        noise = moved[k] - torch.from_numpy(ndimage.gaussian_filter(moved[k].numpy(), 1.0))
        noise = noise.clamp(-LARGEST_NOISE * unit, LARGEST_NOISE * unit)
        for lesion, part in zip(lesions, parts, strict=True):
            result[k] += part * (lesion.intensity[name] * unit * texture + noise - moved[k])
    result = torch.where(changed, result.clamp(min=0), scan.image)
    return Planted(result.numpy(), label, changed.numpy(), drawn)


class Scan:
    """A scan, the tissues that its T1, the channel of that index, shows, and the random numbers of its lesion.

    Tissues are three classes of intensity (k-means), from the darkest on CSF, grey and white matter. An empty T1 is a
    ValueError.
    """

    def __init__(self, image: Tensor, t1: int, spacing: tuple[float, ...], rng: np.random.Generator) -> None:
        self.image, self.t1, self.spacing, self.rng = image, t1, spacing, rng
        self.shape = tuple(image.shape[1:])
        self.extent = tuple((n - 1) * float(edge) for n, edge in zip(self.shape, spacing, strict=True))
        self.brain = torch.from_numpy(ndimage.binary_fill_holes((image[t1] != 0).numpy()))
        values = image[t1][self.brain].numpy().astype(np.float64)
        if not values.any():
            raise ValueError("its T1 is empty")
        means, _ = kmeans2(values, np.quantile(values, [0.05, 0.4, 0.9]), minit="matrix")
        low, middle, high = np.sort(means)
        self.csf = (image[t1] < (low + middle) / 2) & self.brain
        white = (image[t1] > (middle + high) / 2) & self.brain
        self.white = torch.from_numpy(ndimage.gaussian_filter(white.numpy().astype(np.float32), 1.5))

    def maps(self) -> dict[str, Tensor]:
        """The maps that lesions are drawn in, see `hyperintensities`; a ValueError where there are no ventricles."""
        depth = ndimage.distance_transform_edt(self.brain.numpy(), sampling=self.spacing)
        ventricles = largest_part(self.csf.numpy() & (depth > DEEP))
        if not ventricles.any():
            raise ValueError(f"no CSF deeper than {DEEP:g} mm, where the ventricles are: is this a whole brain?")
        distances = ventricle_distances(ventricles, self.spacing)
        lateral, horn = (torch.from_numpy(each.astype(np.float32)) for each in distances)
        return {"white": self.white, "brain": self.brain.float(), "lateral": lateral, "horn": horn}

    def moved(self, displacement: Tensor) -> Tensor:
        """The image read at displaced points, mm `(D, H, W, 3)`, inside the brain."""
        read = sample(self.image, grid_points(self.shape, self.extent) + displacement, self.extent)
        return torch.where(displacement.any(dim=-1) & self.brain, read, self.image)


Drawn = tuple[Tensor, list[Lesion], dict[str, Any]]  # the image, where tissue has moved; its lesions; what was drawn


def _tumour(scan: Scan) -> Drawn:
    plan = plan_tumour(scan.white, scan.extent, scan.rng)
    away = (grid_points(scan.shape, scan.extent) - torch.tensor(plan.centre)).norm(dim=-1, keepdim=True)
    fading = (1 - (away / (MASS_EFFECT * (plan.radius + 6.0))).square()).clamp(min=0)
    moved = scan.moved(plan.velocity(scan.shape, scan.extent).permute(1, 2, 3, 0) * fading)
    pushed = Scan(moved, scan.t1, scan.spacing, scan.rng)
    found = tumour(pushed.maps(), pushed.csf.float(), plan, scan.extent, scan.rng, (3, 4, 3))
    return moved, found, asdict(plan)


def _atrophy(scan: Scan) -> Drawn:
    """Around a point of one hemisphere, CSF takes the place of tissue that it touches: sulci and ventricle widen."""
    points = grid_points(scan.shape, scan.extent)
    centre = random_point((scan.white > 0.75) & (points[..., 0].abs() > 20.0), points, scan.rng)
    width = float(scan.rng.uniform(*WIDENED))
    near = (1 - ((points - centre).norm(dim=-1) / LOST).square()).clamp(min=0) * (points[..., 0] * centre[0] > 0)
    tissue = scan.brain & ~scan.csf
    depth = ndimage.distance_transform_edt(tissue.numpy(), sampling=scan.spacing) - min(scan.spacing) / 2
    fraction = torch.sigmoid((width * near - torch.from_numpy(depth.astype(np.float32))) / 0.45) * tissue * (near > 0)
    drawn = {"centre": centre.tolist(), "width": width}
    return scan.image, [Lesion(fraction, 5, FLUID)], drawn


PLANTERS: Mapping[str, Callable[[Scan], Drawn]] = {
    "tumour": _tumour,
    "wmh": lambda scan: (scan.image, *hyperintensities(scan.maps(), scan.extent, scan.rng)),
    "infarct": lambda scan: (scan.image, infarct(scan.maps(), scan.extent, scan.rng), {}),
    "atrophy": _atrophy,
}
