"""Lesions of the phantom: white-matter hyperintensities, and a tumour with core, enhancing rim and oedema.

Fields are (D, H, W) on the output grid, points (D, H, W, 3) and lengths in mm: x right, y forward, z up.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from asa.data.phantom.warp import grid_points, smooth_noise, to_grid

FLUID = {"t1": 0.32, "t1ce": 0.32, "t2": 1.30, "flair": 0.22}  # intensities of what CSF fills


@dataclass(frozen=True)
class Lesion:
    """One kind of diseased tissue."""

    fraction: Tensor  # of each voxel that the lesion fills, (D, H, W) in [0, 1]
    value: int  # its label
    intensity: dict[str, float]  # its mean in each modality, where white matter of T1 is about 1


@dataclass(frozen=True)
class TumourPlan:
    """Position and size of a tumour in mm; `push` is the displacement of the surrounding tissue."""

    centre: tuple[float, ...]
    radius: float
    core: float
    oedema: float
    push: float

    def velocity(self, shape: tuple[int, ...], extent: tuple[float, ...]) -> Tensor:
        """The mass effect as a velocity (3, d, h, w). It points to the centre: sampling there moves tissue outwards."""
        away = grid_points(shape, extent) - torch.tensor(self.centre)
        reach = self.radius + 6.0
        pull = torch.exp(0.5 - away.square().sum(-1) / (2 * reach**2)) / reach
        return -self.push * (away * pull[..., None]).permute(3, 0, 1, 2)


def hyperintensities(
    maps: dict[str, Tensor], extent: tuple[float, ...], rng: np.random.Generator
) -> tuple[list[Lesion], dict[str, Any]]:
    """White-matter hyperintensities: periventricular caps and bands, and spots in the deep white matter.

    Args:
        maps: the subject's warped maps `lateral`, `horn` (distances in mm) and `white`, `brain` (fractions).
        extent: mm along D, H, W.

    Returns:
        The lesions (value 1; in about every fourth subject also an old infarct, value 2), and the drawn parameters.
    """
    load = float(np.exp(rng.normal(0.0, 0.55)))  # between subjects: from hardly any lesions to confluent ones
    shape = tuple(maps["white"].shape)
    ragged, rough, spots = (to_grid(smooth_noise(rng, extent, width), shape)[0] for width in (5.0, 2.2, 3.0))
    white = torch.sigmoid((maps["white"] - 0.55) / 0.06)
    band = 1.2 + 1.2 * load  # mm from the wall of the ventricle
    cap = 4.0 * load**0.7 * torch.exp(-((maps["horn"] / 11.0) ** 2))
    around = band + cap + 1.6 * ragged + 0.5 * rough - maps["lateral"]
    deep = 3.2 * (spots + 0.3 * rough - (2.75 - 0.3 * min(load, 2.0)))
    deep -= 3.0 * torch.relu(0.9 - maps["white"]) / 0.3  # no spots near the cortex
    fraction = white * torch.maximum(torch.sigmoid(around / 0.45), torch.sigmoid(deep / 0.35)) * (maps["lateral"] > 0.3)
    t1, flair = float(rng.normal(0.72, 0.04)), float(rng.normal(1.12, 0.06))
    lesions = [Lesion(fraction, 1, {"t1": t1, "t1ce": t1, "t2": 0.95, "flair": flair})]
    other = bool(rng.random() < 0.25)
    if other:
        lesions += infarct(maps, extent, rng)
    return lesions, {"lesion_load": round(load, 3), "other_pathology": other}


def infarct(maps: dict[str, Tensor], extent: tuple[float, ...], rng: np.random.Generator) -> list[Lesion]:
    """An old infarct in the white matter (value 2): a cavity with the signal of CSF, and a bright margin on FLAIR."""
    shape = tuple(maps["white"].shape)
    points = grid_points(shape, extent)
    centre = random_point((maps["white"] > 0.7) & (maps["lateral"] > 8) & (maps["brain"] > 0.5), points, rng)
    radius = float(rng.uniform(3.0, 6.0))
    noise = to_grid(smooth_noise(rng, extent, 3.0), shape)[0]
    depth = radius + 0.25 * radius * noise - (points - centre).norm(dim=-1)
    bright = {"t1": 0.70, "t1ce": 0.70, "t2": 0.95, "flair": float(rng.normal(1.05, 0.05))}
    return [Lesion(torch.sigmoid((depth + 2.0) / 0.45), 2, bright), Lesion(torch.sigmoid(depth / 0.45), 2, FLUID)]


def plan_tumour(white: Tensor, extent: tuple[float, ...], rng: np.random.Generator) -> TumourPlan:
    """Draw a tumour in one hemisphere, where the local fraction of white matter in the template is high."""
    points = grid_points(tuple(white.shape), extent)
    # Above the brain stem: the grid's centre is 22 mm above the anterior commissure.
    allowed = (white > 0.75) & (points[..., 0].abs() > 16.0) & (points[..., 2] > -22.0)
    centre = random_point(allowed, points, rng)
    radius = float(rng.uniform(9.0, 19.0))
    return TumourPlan(
        centre=tuple(centre.tolist()),
        radius=radius,
        core=radius * float(rng.uniform(0.45, 0.85)),
        oedema=float(rng.uniform(10.0, 30.0)),
        push=float(rng.uniform(0.35, 0.6)) * radius,
    )


def tumour(
    maps: dict[str, Tensor],
    csf: Tensor,
    plan: TumourPlan,
    extent: tuple[float, ...],
    rng: np.random.Generator,
    values: tuple[int, ...],
) -> list[Lesion]:
    """A tumour: oedema along the white matter, but not in CSF, enhancing rim, necrotic core.

    Maps and extent are as for `hyperintensities`, `csf` is a fraction, and the values are the labels of necrotic core,
    oedema and enhancing tumour.
    """
    shape = tuple(csf.shape)
    distance = (grid_points(shape, extent) - torch.tensor(plan.centre)).norm(dim=-1)
    coarse, fine, inner, finger = (to_grid(smooth_noise(rng, extent, w), shape)[0] for w in (7.0, 2.5, 4.0, 5.0))
    depth = plan.radius * (1 + 0.17 * coarse + 0.05 * fine) - distance
    core = depth - (plan.radius - plan.core) * (1 + 0.3 * inner).clamp_min(0.25)
    along = torch.sigmoid((maps["white"] - 0.5) / 0.12)
    reach = 2.0 + plan.oedema * along * (0.75 + 0.3 * finger).clamp(0.1, 1.4)
    oedema = _connected(torch.sigmoid((depth + reach) / 0.7) * (1 - csf), depth > 0)
    necrotic, swollen, enhancing = values

    def vary(**means: float) -> dict[str, float]:
        return {name: mean * float(rng.normal(1.0, 0.05)) for name, mean in means.items()}

    return [
        Lesion(oedema, swollen, vary(t1=0.80, t1ce=0.79, t2=1.02, flair=1.10)),
        Lesion(torch.sigmoid(depth / 0.6), enhancing, vary(t1=0.72, t1ce=1.50, t2=0.92, flair=0.98)),
        Lesion(torch.sigmoid(core / 0.6), necrotic, vary(t1=0.45, t1ce=0.42, t2=1.15, flair=0.60)),
    ]


def _connected(fraction: Tensor, seed: Tensor) -> Tensor:
    """Keep the components that are connected to the seed, so that oedema does not cross the falx."""
    parts, _ = ndimage.label((fraction > 0.1).numpy())
    kept = np.unique(parts[seed.numpy()])
    return fraction * torch.from_numpy(np.isin(parts, kept[kept > 0]))


def random_point(allowed: Tensor, points: Tensor, rng: np.random.Generator) -> Tensor:
    """One of the allowed points, (3,); a ValueError if there is none."""
    candidates = points[allowed]
    if not len(candidates):
        raise ValueError("no place for a lesion: is this a whole brain, with white matter that is bright on T1?")
    return candidates[int(rng.integers(len(candidates)))]
