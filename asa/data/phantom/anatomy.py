"""The phantom's subjects: the anatomy of a template under a random diffeomorphism, and simulated images of it.

Arrays are (D, H, W) in RAS+ axes, lengths are mm. Intensities are relative to white matter on T1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from asa.data.datasets.freesurfer import SIDED
from asa.data.phantom.lesions import Lesion, TumourPlan
from asa.data.phantom.warp import displacement_of, grid_points, random_velocity, sample, smooth_noise, to_grid
from asa.data.preprocessing.registration import load_map
from asa.data.preprocessing.resampling import largest_part

TISSUES = {1: "csf", 2: "gm", 3: "wm"}

# Mean and standard deviation between subjects of CSF, GM and WM in each modality, where WM of T1 is about 1.
CONTRAST: dict[str, tuple[tuple[float, float], ...]] = {
    "t1": ((0.28, 0.04), (0.70, 0.04), (1.00, 0.03)),
    "t1ce": ((0.28, 0.04), (0.72, 0.04), (0.98, 0.03)),
    "t2": ((1.30, 0.08), (0.72, 0.04), (0.52, 0.03)),
    "flair": ((0.18, 0.04), (0.78, 0.04), (0.62, 0.03)),
}
ASYMMETRY = 0.25  # size of the deformation's left-right asymmetric part, relative to its symmetric part
ADDED_BELOW = 16  # slices of 1 mm
TEXTURE = {"t1": 1.0, "t1ce": 1.0, "t2": -0.6, "flair": -0.3}  # factor of the template's T1 texture


class Ellipsoid(NamedTuple):
    """An ellipsoid and its mirror image, in MNI mm."""

    centre: tuple[float, float, float]  # along (|x|, y, z)
    radii: tuple[float, float, float]
    slope: float = 0.0  # mm of z per mm of y along its long axis


# Drawn by eye on the template: where they lie, and whether white matter belongs to them as well as grey.
ELLIPSOIDS: dict[str, tuple[bool, tuple[Ellipsoid, ...]]] = {
    "thalamus": (True, (Ellipsoid((11, -18, 7), (10, 14, 10)),)),
    "caudate": (False, (Ellipsoid((12, 13, 6), (8, 11, 13)), Ellipsoid((15, -2, 19), (6, 16, 6)))),
    "putamen": (False, (Ellipsoid((26, 3, 1), (8, 19, 12)),)),
    "hippocampus": (False, (Ellipsoid((27, -23, -14), (9, 20, 9), slope=-0.35),)),
    "brainstem": (True, (Ellipsoid((0, -26, -30), (15, 16, 32), slope=0.35),)),
}
STRUCTURES = dict(enumerate(("ventricle", *ELLIPSOIDS), start=1))

# FreeSurfer's values on the left of the structures, and of CSF, GM and WM elsewhere.
_ASEG = np.array([0, 4, 10, 11, 12, 17, 16], np.uint8)
_ASEG_TISSUES = np.array([0, 24, 3, 2], np.uint8)


@dataclass(frozen=True)
class Template:
    """The template's maps on its own 1 mm grid, exactly mirror-symmetric about the middle of W."""

    maps: Tensor  # (channel, D, H, W) float32
    names: dict[str, int]  # channel of `maps` by name
    extent: tuple[float, ...]  # distance between the first and the last voxel's centres along D, H, W in mm
    centre: tuple[float, ...]  # of the grid in MNI mm (x, y, z)


@dataclass
class Subject:
    """The anatomy of one synthetic subject on the output grid."""

    tissue: Tensor  # fractions of CSF, GM, WM (3, D, H, W), summing to 1 in the brain and 0 outside
    deviation: Tensor  # the same, times the deviation of the local signal from the tissue mean, in standard deviations
    brain: Tensor  # bool (D, H, W)
    maps: dict[str, Tensor]  # warped template maps (D, H, W), by the template's names
    extent: tuple[float, ...]  # of the field of view along D, H, W in mm
    rng: np.random.Generator


@lru_cache(maxsize=2)
def load_template(*, rim: bool = False, ventricles: bool = False, structures: bool = False) -> Template:
    """The maps of the template, and maps derived from them; an ImportError without nilearn.

    Channels: csf, gm, wm (log fractions), texture (T1 that the tissue fractions do not explain), brain (0 or
    1), white (local fraction of white matter).

    Args:
        rim: also outside, the distance from the brain in mm.
        ventricles: also lateral and horn, the distances from the lateral ventricles and from the tips of their horns.
        structures: also the masks of `STRUCTURES`, by their names.
    """
    # Below the brain, the template's grid lacks space; at the top, it has more than enough.
    up = ((ADDED_BELOW, 0), (0, 0), (0, 0))
    t1, gm, wm = (np.pad(load_map(kind)[0][:-ADDED_BELOW], up) for kind in ("t1", "gm", "wm"))
    affine = load_map("t1")[1]
    centre_voxel = np.array([(size - 1) / 2 for size in t1.shape[::-1]]) - (0, 0, ADDED_BELOW)
    centre = affine[:3, :3] @ centre_voxel + affine[:3, 3]
    brain = ndimage.binary_fill_holes(t1 > 0)
    fractions = np.stack([np.zeros_like(gm), gm * brain, wm * brain])
    fractions[0] = np.clip(brain - fractions[1] - fractions[2], 0, 1)
    means = np.array([(t1 * part).sum() / part.sum() for part in fractions**4])  # weighted towards nearly pure voxels
    texture = np.clip(t1 - np.tensordot(means, fractions, 1), -0.12, 0.12) / (means[2] - means[0]) * brain
    maps = {
        **{name: np.log(part + 0.02) for name, part in zip(TISSUES.values(), fractions, strict=True)},
        "texture": texture,
        "brain": brain,
        "white": ndimage.gaussian_filter(fractions[2], 1.5),
    }
    if rim:
        maps["outside"] = ndimage.distance_transform_edt(~brain)
    if ventricles:
        maps["lateral"], maps["horn"] = ventricle_distances(lateral_ventricles(fractions[0], centre))
    if structures:
        maps |= structure_maps(fractions, centre)
    stacked = torch.from_numpy(np.stack([part.astype(np.float32) for part in maps.values()]))
    extent = tuple(float(size - 1) for size in t1.shape)
    return Template(stacked, {name: k for k, name in enumerate(maps)}, extent, tuple(centre.tolist()))


def ventricle_distances(lateral: np.ndarray, spacing: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from lateral ventricles, bool (D, H, W), and from the tips of their frontal and occipital horns.

    The spacing is along D, H, W; None: 1 mm.
    """
    forward = np.flatnonzero(lateral.any(axis=(0, 2)))
    tips = np.zeros_like(lateral)
    for row in (forward[0], forward[-1]):
        tips[:, row] = lateral[:, row]
    lateral_mm, tips_mm = (ndimage.distance_transform_edt(~mask, sampling=spacing) for mask in (lateral, tips))
    return lateral_mm, tips_mm


def structure_maps(fractions: np.ndarray, centre: np.ndarray) -> dict[str, np.ndarray]:
    """The structures' bool masks (D, H, W), by name, which do not overlap; both sides of one are in one mask.

    The fractions (3, D, H, W) are of CSF, GM and WM in voxels of 1 mm, the centre is that of their grid in MNI mm.
    """
    csf, gm, wm = fractions
    x, y, z = _mni(csf.shape, centre)
    free = ~lateral_ventricles(csf, centre)
    maps = {"ventricle": ~free}
    for name, (with_white, ellipsoids) in ELLIPSOIDS.items():
        inside = np.zeros(csf.shape, bool)
        for (cx, cy, cz), (rx, ry, rz), slope in ellipsoids:
            height = z - cz - slope * (y - cy)
            inside |= ((abs(x) - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + (height / rz) ** 2 < 1
        maps[name] = inside & (gm + with_white * wm > 0.5) & free
        free = free & ~maps[name]
    return maps


def lateral_ventricles(csf: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Bool mask of the lateral ventricles: the largest connected region of CSF in a box around them."""
    x, y, z = _mni(csf.shape, centre)
    box = (abs(x) < 40) & (y > -75) & (y < 45) & (z > -10) & (z < 32)
    lateral = largest_part((csf > 0.5) & box)
    return lateral | lateral[..., ::-1]  # the septum may separate the two


def _mni(shape: tuple[int, ...], centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MNI coordinates of a 1 mm grid: x (1, 1, W), y (1, H, 1), z (D, 1, 1)."""
    z, y, x = np.ix_(*(np.arange(n) - (n - 1) / 2 + at for n, at in zip(shape, centre[::-1], strict=True)))
    return x, y, z


def make_subject(
    template: Template, rng: np.random.Generator, resolution: float, plan: TumourPlan | None = None
) -> Subject:
    """Draw an anatomy: the template under a random affine map and diffeomorphism, with its own cortical folds.

    The resolution is the voxel size in mm; the mass effect of a tumour is added.
    """
    from monai.transforms.utils import create_rotate  # imported here: takes seconds

    extent = template.extent
    shape = tuple(int(side / resolution + 1e-6) + 1 for side in extent)
    velocity = random_velocity(rng, extent, ASYMMETRY)
    if plan is not None:
        velocity += plan.velocity(tuple(velocity.shape[1:]), extent)
    points = grid_points(shape, tuple((size - 1) * resolution for size in shape))  # at most over the extent
    moved = points + to_grid(displacement_of(velocity, extent), shape).permute(1, 2, 3, 0)
    scale = rng.normal(1.0, 0.03) * rng.normal(1.0, 0.03, 3)
    (d, h, w), shift = np.deg2rad(rng.normal(0, 1.0, 3)), rng.normal(0, 1.0, 3)
    rotation = np.asarray(create_rotate(3, (d, -h, w)))[:3, :3]  # about D, H and W
    matrix = torch.tensor(rotation * (1 / scale), dtype=torch.float32)
    warped = sample(template.maps, moved @ matrix.T + torch.tensor(shift, dtype=torch.float32), extent)
    maps = {name: warped[k] for name, k in template.names.items()}
    brain = maps["brain"] > 0.5
    fold = to_grid(smooth_noise(rng, extent, 2.3), shape)[0].abs()
    variation = to_grid(smooth_noise(rng, extent, 4.0, channels=3), shape)
    atrophy = float(rng.uniform(0.0, 0.9))
    logits = torch.stack([maps[name] for name in TISSUES.values()]) + 0.2 * variation
    logits[0] += 1.6 * torch.exp(-((fold / 0.4) ** 2)) - 0.5 + atrophy  # sulci lie where the noise changes its sign
    logits[2] += 0.8 * (fold - 0.9)  # gyri between them contain white matter
    tissue = torch.softmax(2.0 * logits, dim=0) * brain
    deviation = to_grid(smooth_noise(rng, extent, 7.0, channels=3), shape)
    return Subject(tissue, tissue * deviation, brain, maps, extent, rng)


def tissue_label(subject: Subject) -> np.ndarray:
    """The largest of the fractions in each voxel of the brain: 1 CSF, 2 GM, 3 WM, (D, H, W)."""
    csf, gm, wm = subject.tissue
    label = 1 + (gm > csf).to(torch.uint8)
    label[wm > torch.maximum(csf, gm)] = 3
    return (label * subject.brain).numpy()


def structure_label(maps: dict[str, Tensor], brain: Tensor) -> np.ndarray:
    """Label map (D, H, W) of the values of `STRUCTURES`, from the structures' warped masks."""
    label = np.zeros(tuple(brain.shape), np.uint8)
    for value, name in STRUCTURES.items():
        label[((maps[name] > 0.5) & brain).numpy()] = value
    return label


def aseg_label(structures: np.ndarray, tissues: np.ndarray) -> np.ndarray:
    """Label map (D, H, W) of FreeSurfer's values, from those of `STRUCTURES` and of tissues (1 CSF, 2 GM, 3 WM).

    The sides are those of the middle of the volume.
    """
    left = np.where(structures > 0, _ASEG[structures], _ASEG_TISSUES[tissues])
    right = left.copy()
    for value, (other, _) in SIDED.items():
        right[left == value] = other
    middle = structures.shape[2] // 2
    return np.concatenate([left[..., :middle], right[..., middle:]], axis=2)


def blend(lesions: list[Lesion], brain: Tensor) -> tuple[list[Tensor], np.ndarray]:
    """Fraction of each lesion in each voxel, later lesions over earlier ones, and their label map (D, H, W)."""
    remaining = brain.float()
    fractions: list[Tensor] = []
    for lesion in reversed(lesions):
        fractions.insert(0, lesion.fraction * remaining)
        remaining = remaining * (1 - lesion.fraction)
    label = np.zeros(tuple(brain.shape), np.uint8)
    if lesions:
        values = torch.tensor([lesion.value for lesion in lesions], dtype=torch.uint8)
        diseased = torch.stack(fractions)
        label = torch.where(diseased.sum(dim=0) > 0.5, values[diseased.argmax(dim=0)], 0).numpy()
    return fractions, label


def take_image(
    subject: Subject, modality: str, lesions: list[Lesion], fractions: list[Tensor], *, rim: bool, quality: float = 1.0
) -> tuple[np.ndarray, dict[str, Any]]:
    """Simulate an image: draw contrast, bias field and noise of one modality.

    Args:
        modality: key of `CONTRAST`.
        fractions: of the lesions, from `blend`.
        rim: add a skull-like rim around the brain, and noise in the air.
        quality: factor of the noise, for a site.

    Returns:
        (D, H, W) float32 in scanner units (some hundreds in white matter on T1), and the drawn parameters.
    """
    rng, extent, shape = subject.rng, subject.extent, tuple(subject.brain.shape)
    means = [float(rng.normal(mean, sd)) for mean, sd in CONTRAST[modality]]
    sd = float(rng.uniform(0.01, 0.03))  # relative to the tissue mean
    image = torch.zeros(shape)
    for mean, fraction, deviation in zip(means, subject.tissue, subject.deviation, strict=True):
        image += mean * fraction + sd * mean * deviation
    image += float(rng.uniform(0.4, 0.7)) * TEXTURE[modality] * subject.maps["texture"] * subject.brain
    if lesions:
        texture = 1 + 0.07 * to_grid(smooth_noise(rng, extent, 3.0), shape)[0]
        image *= 1 - sum(fractions)
        for lesion, fraction in zip(lesions, fractions, strict=True):
            image += lesion.intensity[modality] * fraction * texture
    if rim:
        image += _rim(subject.maps["outside"], modality, rng) * ~subject.brain
    image = image.clamp_min(0)
    bias = float(rng.uniform(0.03, 0.12))
    image *= torch.exp(bias * to_grid(smooth_noise(rng, extent, 45.0), shape)[0].clamp(-2.5, 2.5))
    noise = quality * float(rng.uniform(0.015, 0.035))
    real, imaginary = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))
    image = torch.hypot(image + noise * real, noise * imaginary)
    gain = float(rng.uniform(400, 900))
    image = (gain * image).round()
    if not rim:
        image = image.clamp_min(1) * subject.brain  # 0 outside the brain, and above 0 inside it
    drawn = {"csf_gm_wm": [round(mean, 4) for mean in means], "bias": round(bias, 4), "noise": round(noise, 4)}
    return image.numpy(), {**drawn, "gain": round(gain, 2)}


def _rim(outside: Tensor, modality: str, rng: np.random.Generator) -> Tensor:
    """Shells around the brain by distance in mm: fluid, bone, scalp; then air."""
    fluid, bone, scalp = (float(rng.uniform(low, high)) for low, high in ((1.5, 3.0), (4.0, 7.0), (4.0, 8.0)))
    bright = {"t1": 1.15, "t1ce": 1.15, "t2": 0.85, "flair": 0.6}[modality]
    shells = ((0.0, CONTRAST[modality][0][0]), (fluid, 0.12), (fluid + bone, bright), (fluid + bone + scalp, 0.0))
    rim = torch.zeros_like(outside)
    before = 0.0
    for start, level in shells:
        rim += (level - before) * torch.sigmoid((outside - start) / 0.4)
        before = level
    return rim
