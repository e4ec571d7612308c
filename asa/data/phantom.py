"""The embedded cohort: made-up people with a real anatomy, written in the layouts of the real benchmarks.

Each person is the ICBM 2009a symmetric template (T1, GM and WM maps, as nilearn's wheel ships them) under a random
diffeomorphism, with folds, tissue contrast, bias field and noise of their own. Nothing here is a patient: every
folder holds a JSON that says "phantom". Arrays are (D, H, W) in RAS+ axes, lengths are mm.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from asa.data.files import read_json, write_json
from asa.data.lesions import Lesion, TumourPlan, hyperintensities, plan_tumour, tumour
from asa.data.volume import write_image
from asa.data.warp import displacement_of, grid_points, random_velocity, sample, smooth_noise, to_grid

KINDS = ("t1", "ibsr", "wmh", "brats")  # a kind's place here goes into its seeds: append only
SITES = ("Utrecht", "Singapore", "Amsterdam/GE3T")  # of the WMH challenge
TISSUES = {1: "csf", 2: "gm", 3: "wm"}

# Mean and standard deviation between people of each modality's CSF, GM and WM, where WM of T1 is about 1.
CONTRAST: dict[str, tuple[tuple[float, float], ...]] = {
    "t1": ((0.28, 0.04), (0.70, 0.04), (1.00, 0.03)),
    "t1ce": ((0.28, 0.04), (0.72, 0.04), (0.98, 0.03)),
    "t2": ((1.30, 0.08), (0.72, 0.04), (0.52, 0.03)),
    "flair": ((0.18, 0.04), (0.78, 0.04), (0.62, 0.03)),
}
RAISED = 16  # slices of 1 mm
TEXTURE = {"t1": 1.0, "t1ce": 1.0, "t2": -0.6, "flair": -0.3}  # how the template's own T1 detail shows


@dataclass(frozen=True)
class Template:
    """The template's maps on its own 1 mm grid, exactly mirror-symmetric about the middle of W.

    Args:
        maps: (channel, D, H, W) float32, named by `names`.
        names: channel of `maps` by name.
        extent: distance between the first and the last voxel's centres along D, H, W in mm.
        centre: of the grid in MNI mm (x, y, z).
    """

    maps: Tensor
    names: dict[str, int]
    extent: tuple[float, ...]
    centre: tuple[float, ...]


@dataclass
class Person:
    """One made-up anatomy on the output grid.

    Args:
        tissue: fractions of CSF, GM, WM (3, D, H, W), summing to 1 in the brain and 0 outside.
        spread: the same, times how far each place's signal is from its tissue's mean in standard deviations.
        brain: bool (D, H, W).
        maps: warped template maps (channel, D, H, W), by the template's names.
        extent: of the field of view along D, H, W in mm.
        rng: the person's own random numbers.
    """

    tissue: Tensor
    spread: Tensor
    brain: Tensor
    maps: dict[str, Tensor]
    extent: tuple[float, ...]
    rng: np.random.Generator


def make_cohort(
    kind: str,
    subjects: int,
    seed: int,
    out: str | Path,
    *,
    resolution: float = 1.0,
    rim: bool = False,
    asymmetry: float = 0.25,
    names: int = 2021,
    progress: bool = True,
) -> list[Path]:
    """Write a cohort of made-up people, skull-stripped unless `rim` is set.

    A person depends on (seed, number, kind) and the options only: the same call writes the same bytes, and more
    subjects leave the first ones as they are.

    Args:
        kind: "t1" (BIDS, unlabelled), "ibsr" (IBSR_18 with CSF, GM, WM), "wmh" (WMH challenge: T1 and FLAIR, labels
            1 lesion, 2 other pathology), or "brats" (T1, T1Gd, T2, FLAIR and a tumour).
        subjects: how many people.
        seed: another seed, other people.
        out: folder of the cohort.
        resolution: isotropic voxel size in mm, from 0.7 to 8.
        rim: add a skull-like rim around the brain, and noise in the air.
        asymmetry: size of the deformation's left-right asymmetric part, relative to its symmetric part.
        names: year of BraTS whose names and label values "brats" writes: 2021 (1, 2, 4) or 2023 (1, 2, 3).
        progress: show a bar.

    Returns:
        The files written.

    Raises:
        ImportError: nilearn, which carries the template, is not installed.
        ValueError: an option outside its range, or `out` holds another phantom cohort.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    if subjects < 1 or seed < 0 or not 0.7 <= resolution <= 8 or asymmetry < 0 or names not in (2021, 2023):
        raise ValueError(
            f"subjects={subjects} seed={seed} resolution={resolution} asymmetry={asymmetry} names={names}: give at "
            "least 1 subject, a seed from 0, a resolution from 0.7 to 8 mm, an asymmetry from 0, names 2021 or 2023"
        )
    out = Path(out)
    options = {"resolution": resolution, "rim": rim, "asymmetry": asymmetry, "names": names}
    about = {
        "phantom": True,
        "description": "asa phantom cohort: made-up people, not patients",
        "kind": kind,
        "seed": seed,
        "template": "ICBM 152 nonlinear 2009a symmetric",
        **options,
    }
    _claim(out, about)
    written: list[Path] = []
    for number in tqdm(range(1, subjects + 1), desc=f"phantom {kind}", unit="subject", disable=not progress):
        written += _write_person(out, number, seed, about)
    return written


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Say what the folder holds, and refuse to mix two cohorts in it."""
    path = out / "phantom.json"
    if path.is_file():
        there = read_json(path)
        if there != about:
            differ = [key for key in about if not isinstance(there, dict) or there.get(key) != about[key]]
            raise ValueError(
                f"{out}: holds another phantom cohort (other {', '.join(differ)}); choose another out="
            )
    write_json(path, about)
    if about["kind"] == "t1":
        write_json(
            out / "dataset_description.json",
            {
                "Name": "asa phantom cohort (made-up people, not patients)",
                "BIDSVersion": "1.8.0",
                "DatasetType": "raw",
                "GeneratedBy": [{"Name": "asa-phantom"}],
            },
        )


# ---------------------------------------------------------------------------------------------- anatomy


@lru_cache(maxsize=1)
def load_template(rim: bool = False, ventricles: bool = False) -> Template:
    """The template's maps and what is derived from them once.

    Channels: csf, gm, wm (log fractions), texture (T1 that the tissue fractions do not explain), brain (0 or 1),
    white (share of white matter nearby).

    Args:
        rim: also outside, the distance from the brain in mm.
        ventricles: also ventricle and horn, the distances from the lateral ventricles and from their horns' tips.

    Raises:
        ImportError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError:
        raise ImportError(
            'the phantom needs nilearn, which carries its template: pip install "asa[phantom]"'
        ) from None
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    images = [load(resolution=1) for load in loaders]
    t1, gm, wm = (_raised(np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)) for image in images)
    middle = np.array([(size - 1) / 2 for size in t1.shape[::-1]]) - (0, 0, RAISED)
    centre = images[0].affine[:3, :3] @ middle + images[0].affine[:3, 3]
    brain = ndimage.binary_fill_holes(t1 > 0)
    fractions = np.stack([np.zeros_like(gm), gm * brain, wm * brain])
    fractions[0] = np.clip(brain - fractions[1] - fractions[2], 0, 1)
    means = np.array([(t1 * part).sum() / part.sum() for part in fractions**4])  # nearly pure voxels decide
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
        maps["ventricle"], maps["horn"] = _ventricle_distances(fractions[0], centre)
    stacked = torch.from_numpy(np.stack([part.astype(np.float32) for part in maps.values()]))
    extent = tuple(float(size - 1) for size in t1.shape)
    return Template(stacked, {name: k for k, name in enumerate(maps)}, extent, tuple(centre.tolist()))


def _raised(array: np.ndarray) -> np.ndarray:
    """Room below the brain, which the template's own grid does not have: slices go from the top to the bottom."""
    return np.concatenate([np.zeros_like(array[:RAISED]), array[:-RAISED]])


def _ventricle_distances(csf: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from the lateral ventricles, and from the tips of their frontal and occipital horns."""
    z, y, x = (np.arange(size) - (size - 1) / 2 for size in csf.shape)
    x, y, z = (axis + middle for axis, middle in zip((x, y, z), centre, strict=True))
    inside = (
        (abs(x) < 40)[None, None]
        & ((y > -75) & (y < 45))[None, :, None]
        & ((z > -10) & (z < 32))[:, None, None]
    )
    parts, _ = ndimage.label((csf > 0.5) & inside)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    lateral = parts == sizes.argmax()
    lateral |= lateral[..., ::-1]  # the two are parts of their own where the septum divides them
    forward = np.flatnonzero(lateral.any(axis=(0, 2)))
    tips = np.zeros_like(lateral)
    for row in (forward[0], forward[-1]):
        tips[:, row] = lateral[:, row]
    return ndimage.distance_transform_edt(~lateral), ndimage.distance_transform_edt(~tips)


def make_person(
    template: Template,
    rng: np.random.Generator,
    resolution: float,
    asymmetry: float,
    plan: TumourPlan | None = None,
) -> Person:
    """Draw an anatomy: the template under a random affine map and diffeomorphism, with folds of its own.

    Args:
        template: the anatomy that all people vary.
        rng: the person's random numbers.
        resolution: voxel size in mm.
        asymmetry: of the deformation.
        plan: a tumour, whose mass effect goes into the deformation.
    """
    extent = template.extent
    shape = tuple(int(side / resolution + 1e-6) + 1 for side in extent)
    velocity = random_velocity(rng, extent, asymmetry)
    if plan is not None:
        velocity = velocity + plan.velocity(tuple(velocity.shape[1:]), extent)
    covered = tuple(
        (size - 1) * resolution for size in shape
    )  # a little less than the extent where it does not divide
    points = grid_points(shape, covered)
    moved = points + to_grid(displacement_of(velocity, extent), shape).permute(1, 2, 3, 0)
    scale = rng.normal(1.0, 0.03) * rng.normal(1.0, 0.03, 3)
    angles, shift = np.deg2rad(rng.normal(0, 1.0, 3)), rng.normal(0, 1.0, 3)
    matrix = torch.tensor(_rotation(angles) * (1 / scale), dtype=torch.float32)
    moved = moved @ matrix.T + torch.tensor(shift, dtype=torch.float32)
    warped = sample(template.maps, moved, extent)
    maps = {name: warped[k] for name, k in template.names.items()}
    brain = maps["brain"] > 0.5
    fold = to_grid(smooth_noise(rng, extent, 2.3), shape)[0].abs()
    doubt = to_grid(smooth_noise(rng, extent, 4.0, channels=3), shape)
    atrophy = float(rng.uniform(0.0, 0.9))
    logits = torch.stack([maps[name] for name in TISSUES.values()]) + 0.2 * doubt
    logits[0] += (
        1.6 * torch.exp(-((fold / 0.4) ** 2)) - 0.5 + atrophy
    )  # sulci run where the noise changes its sign
    logits[2] += 0.8 * (fold - 0.9)  # and gyri between them carry white matter
    tissue = torch.softmax(2.0 * logits, dim=0) * brain
    spread = to_grid(smooth_noise(rng, extent, 7.0, channels=3), shape)
    return Person(tissue, tissue * spread, brain, maps, extent, rng)


def _tissue_label(person: Person) -> np.ndarray:
    """The largest of the fractions in each voxel of the brain: 1 CSF, 2 GM, 3 WM, (D, H, W)."""
    csf, gm, wm = person.tissue
    label = 1 + (gm > csf).to(torch.uint8)
    label[wm > torch.maximum(csf, gm)] = 3
    return (label * person.brain).numpy()


def _rotation(angles: np.ndarray) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def blend(lesions: list[Lesion], brain: Tensor) -> tuple[list[Tensor], np.ndarray]:
    """Shares of the lesions in each voxel, the later ones over the earlier ones, and their label map (D, H, W)."""
    left = brain.float()
    shares: list[Tensor] = []
    for lesion in reversed(lesions):
        shares.insert(0, lesion.share * left)
        left = left * (1 - lesion.share)
    label = np.zeros(tuple(brain.shape), np.uint8)
    if lesions:
        values = torch.tensor([0] + [lesion.value for lesion in lesions], dtype=torch.uint8)
        diseased = torch.stack(shares)
        winner = values[1:][diseased.argmax(dim=0)]
        label = torch.where(diseased.sum(dim=0) > 0.5, winner, values[0]).numpy()
    return shares, label


def take_image(
    person: Person,
    modality: str,
    lesions: list[Lesion],
    shares: list[Tensor],
    *,
    rim: bool,
    quality: float = 1.0,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scan a person: draw contrast, bias field and noise of one modality.

    Args:
        person: the anatomy.
        modality: key of `CONTRAST`.
        lesions, shares: as `blend` gives them.
        rim: put a skull-like rim around the brain, and noise in the air.
        quality: factor on the noise, of a site.

    Returns:
        (D, H, W) float32 in scanner units (white matter of T1 at some hundreds), and what was drawn.
    """
    rng, extent, shape = person.rng, person.extent, tuple(person.brain.shape)
    means = [float(rng.normal(mean, sd)) for mean, sd in CONTRAST[modality]]
    spread = float(rng.uniform(0.01, 0.03))
    image = torch.zeros(shape)
    for mean, share, deviation in zip(means, person.tissue, person.spread, strict=True):
        image += mean * share + spread * mean * deviation
    image += float(rng.uniform(0.4, 0.7)) * TEXTURE[modality] * person.maps["texture"] * person.brain
    if lesions:
        mottled = 1 + 0.07 * to_grid(smooth_noise(rng, extent, 3.0), shape)[0]
        image *= 1 - sum(shares)
        for lesion, share in zip(lesions, shares, strict=True):
            image += lesion.intensity[modality] * share * mottled
    if rim:
        image += _rim(person.maps["outside"], modality, rng) * ~person.brain
    image = image.clamp_min(0)
    bias = float(rng.uniform(0.03, 0.12))
    image *= torch.exp(bias * to_grid(smooth_noise(rng, extent, 45.0), shape)[0].clamp(-2.5, 2.5))
    noise = quality * float(rng.uniform(0.015, 0.035))
    real, imaginary = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))
    image = torch.hypot(image + noise * real, noise * imaginary)
    gain = float(rng.uniform(400, 900))
    image = (gain * image).round()
    if not rim:
        image = image.clamp_min(1) * person.brain  # exactly 0 outside the brain, and nowhere in it
    drawn = {
        "csf_gm_wm": [round(mean, 4) for mean in means],
        "bias": round(bias, 4),
        "noise": round(noise, 4),
    }
    return image.numpy(), {**drawn, "gain": round(gain, 2)}


def _rim(outside: Tensor, modality: str, rng: np.random.Generator) -> Tensor:
    """Shells around the brain by distance in mm: fluid, bone, scalp; then air."""
    fluid, bone, scalp = (float(rng.uniform(low, high)) for low, high in ((1.5, 3.0), (4.0, 7.0), (4.0, 8.0)))
    bright = {"t1": 1.15, "t1ce": 1.15, "t2": 0.85, "flair": 0.6}[modality]
    shells = (
        (0.0, CONTRAST[modality][0][0]),
        (fluid, 0.12),
        (fluid + bone, bright),
        (fluid + bone + scalp, 0.0),
    )
    rim = torch.zeros_like(outside)
    before = 0.0
    for start, level in shells:
        rim += (level - before) * torch.sigmoid((outside - start) / 0.4)
        before = level
    return rim


# ---------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class _Files:
    """Where a person's images (by modality), label map and JSON go."""

    images: dict[str, Path]
    label: Path | None
    note: Path


def _files(out: Path, kind: str, number: int, names: int) -> _Files:
    if kind == "t1":
        stem = f"sub-{number:03d}/anat/sub-{number:03d}_T1w"
        return _Files({"t1": out / f"{stem}.nii.gz"}, None, out / f"{stem}.json")
    if kind == "ibsr":
        name = f"IBSR_{number:02d}"
        folder = out / name
        label = folder / f"{name}_segTRI_fill_ana.nii.gz"
        return _Files({"t1": folder / f"{name}_ana_strip.nii.gz"}, label, folder / "phantom.json")
    if kind == "wmh":
        folder = out / SITES[(number - 1) % len(SITES)] / str(number)
        images = {
            name: folder / "pre" / f"{file}.nii.gz" for name, file in (("t1", "T1"), ("flair", "FLAIR"))
        }
        return _Files(images, folder / "wmh.nii.gz", folder / "phantom.json")
    if names == 2021:
        name, endings, label_ending = f"BraTS2021_{number:05d}", ("_t1", "_t1ce", "_t2", "_flair"), "_seg"
    else:
        name, endings, label_ending = f"BraTS-GLI-{number:05d}-000", ("-t1n", "-t1c", "-t2w", "-t2f"), "-seg"
    folder = out / name
    modalities = ("t1", "t1ce", "t2", "flair")
    images = {key: folder / f"{name}{ending}.nii.gz" for key, ending in zip(modalities, endings, strict=True)}
    return _Files(images, folder / f"{name}{label_ending}.nii.gz", folder / "phantom.json")


def _write_person(out: Path, number: int, seed: int, about: dict[str, Any]) -> list[Path]:
    """Make one person, scan it, write it."""
    kind, resolution = about["kind"], about["resolution"]
    rng = np.random.default_rng([seed, KINDS.index(kind), number])
    files = _files(out, kind, number, about["names"])
    template, drawn = load_template(about["rim"], kind == "wmh"), {}
    plan = (
        plan_tumour(template.maps[template.names["white"]], template.extent, rng) if kind == "brats" else None
    )
    person = make_person(template, rng, resolution, about["asymmetry"], plan)
    lesions: list[Lesion] = []
    if kind == "wmh":
        lesions, drawn = hyperintensities(person.maps, template.extent, rng)
    elif plan is not None:
        values = (1, 2, 4) if about["names"] == 2021 else (1, 2, 3)
        lesions, drawn = (
            tumour(person.maps, person.tissue[0], plan, template.extent, rng, values),
            {"tumour": asdict(plan)},
        )
    shares, label = blend(lesions, person.brain)
    if kind == "ibsr":
        label = _tissue_label(person)
    quality = {"wmh": (0.8, 1.0, 1.5)[(number - 1) % len(SITES)]}.get(kind, 1.0)

    affine = np.diag([resolution, resolution, resolution, 1.0])
    affine[:3, 3] = np.array(template.centre) - resolution * (np.array(label.shape[::-1]) - 1) / 2
    for modality, path in files.images.items():
        image, drawn[modality] = take_image(
            person, modality, lesions, shares, rim=about["rim"], quality=quality
        )
        write_image(path, image.transpose(2, 1, 0), affine, dtype=np.int16)
    if files.label is not None:
        write_image(files.label, label.transpose(2, 1, 0), affine, dtype=np.uint8)
    write_json(files.note, {**about, "number": number, "drawn": drawn})
    return [*files.images.values(), *([files.label] if files.label else []), files.note]
