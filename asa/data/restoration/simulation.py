"""Simulated degradations, for images without a degraded partner. What comes out is not a measurement: say "simulated".

Images are `(H, W)` or `(C, H, W)` float; randomness comes from a numpy Generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from tqdm import tqdm

from asa.data.io.images2d import list_pictures, read_picture, write_picture
from asa.data.io.parallel import KILLED, in_processes
from asa.data.loading.seeds import sample_seed
from asa.errors import require

KINDS = ("ct", "pet", "sr")
Degradation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
WATER = 0.0193  # linear attenuation of water per mm at about 70 keV (NIST XCOM)


def low_dose_ct(
    image: np.ndarray, generator: np.random.Generator, *, photons: float = 1e4, pixel: float = 0.7, views: int = 360
) -> np.ndarray:
    """A CT slice with the quantum noise of fewer photons, simulated.

    HU become attenuation, mu = 0.0193 / mm * (1 + HU / 1000); parallel projections p over 180 degrees; the photons
    that reach the detector are Poisson with mean N exp(-p); the noise of -log(counts / N) is filtered back-projected
    (ramp filter) and added. One energy, no scatter, no electronic noise, no bow-tie filter.

    Args:
        image: `(H, W)` in HU.
        generator: of the noise.
        photons: N that leave the tube along a ray; fewer are noisier, and the noise grows as 1 / sqrt(N).
        pixel: edge of a pixel in mm.
        views: projection angles.

    Returns:
        `(H, W)` in HU.
    """

    def noise(line: np.ndarray) -> np.ndarray:
        counts = generator.poisson(photons * np.exp(-line)).clip(min=1)  # a ray that nothing passes has no logarithm
        return -np.log(counts / photons) - line

    attenuation = WATER * pixel * (1 + image / 1000).clip(min=0)  # a pixel's
    return image + 1000 / (WATER * pixel) * _noise_through_projections(attenuation, noise, views)


def low_count_pet(
    image: np.ndarray, generator: np.random.Generator, *, counts: float = 1e6, views: int = 180
) -> np.ndarray:
    """A PET slice with the noise of fewer counts, simulated.

    Parallel projections of the activity are scaled to a sum of `counts`, become Poisson counts, are scaled back, and
    the noise is filtered back-projected (ramp filter) and added. No attenuation, scatter, randoms or resolution model.

    Args:
        image: `(H, W)` activity or uptake, 0 or more, in any unit.
        generator: of the noise.
        counts: true coincidences in the slice.
        views: projection angles.

    Returns:
        `(H, W)` in the same unit, 0 or more.

    Raises:
        ValueError: negative or no activity.
    """
    if image.min() < 0 or not image.max() > 0:
        raise ValueError(f"activity is 0 or more and not 0 everywhere, got {image.min():g} to {image.max():g}")

    def noise(line: np.ndarray) -> np.ndarray:
        scale = counts / line.sum()
        return generator.poisson(scale * line.clip(min=0)) / scale - line

    return (image + _noise_through_projections(image, noise, views)).clip(min=0)


def _noise_through_projections(image: np.ndarray, noise: Callable[[np.ndarray], np.ndarray], views: int) -> np.ndarray:
    """The image `(H, W)` of noise that depends on the projections, in the image's unit per pixel.

    Back-projection is linear: only the noise goes through it, so the image itself keeps its resolution.
    """
    transform = require("skimage.transform", "restore", "the simulation of projections")
    edge = max(image.shape)
    above, left = ((edge - n) // 2 for n in image.shape)
    square = np.zeros((edge, edge))
    square[above : above + image.shape[0], left : left + image.shape[1]] = image
    angles = np.linspace(0, 180, views, endpoint=False)
    lines = transform.radon(square, angles, circle=False)
    back = transform.iradon(noise(lines), angles, output_size=edge, circle=False, filter_name="ramp")
    return back[above : above + image.shape[0], left : left + image.shape[1]]


def decimated(image: np.ndarray, factor: int, *, blur: float = 0.5) -> np.ndarray:
    """A smaller image for super-resolution, simulated: a Gaussian blur, then one sample a block.

    The samples lie at the centres of blocks of factor x factor pixels, where bilinear upscaling puts them back.

    Args:
        image: `(C, H, W)`.
        factor: 2 or more; H and W are cut to multiples of it.
        blur: standard deviation of the blur over the factor.

    Returns:
        `(C, H // factor, W // factor)`.
    """
    soft = gaussian_filter(image.astype(np.float64), (0, blur * factor, blur * factor), mode="nearest")
    centres = np.meshgrid(*((np.arange(n // factor) + 0.5) * factor - 0.5 for n in image.shape[1:]), indexing="ij")
    return np.stack([map_coordinates(channel, centres, order=1, mode="nearest") for channel in soft])


def make_degradation(
    kind: str,
    *,
    window: Sequence[float] | None = None,
    photons: float = 1e4,
    pixel: float = 0.7,
    counts: float = 1e6,
    factor: int = 2,
    blur: float = 0.5,
) -> Degradation:
    """What makes the degraded partner of an image `(C, H, W)` in [0, 1].

    Args:
        kind: `"ct"` (`low_dose_ct` with `photons` and `pixel`), `"pet"` (`low_count_pet` with `counts`) or `"sr"`
            (`decimated` by `factor` with `blur`).
        window: for ct the HU that are 0 and 1.

    Raises:
        ValueError: an unknown kind, or settings that do not fit.
    """
    if kind == "sr":
        if factor not in (2, 4):
            raise ValueError(f"factor={factor}: super-resolution is by 2 or 4")
        return lambda image, _: decimated(image, factor, blur=blur)
    if kind == "pet":
        return lambda image, generator: low_count_pet(_grey(image), generator, counts=counts)[None]
    if kind != "ct":
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    if window is None:
        raise ValueError("kind=ct computes in HU: say which HU become 0 and 1, like window=[-1000,1000]")
    low, width = window[0], window[1] - window[0]

    def ct(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        noisy = low_dose_ct(_grey(image) * width + low, generator, photons=photons, pixel=pixel)
        return ((noisy - low) / width)[None]

    return ct


def _grey(image: np.ndarray) -> np.ndarray:
    if len(image) != 1:
        raise ValueError("a colour image, and only super-resolution is simulated for colour")
    return image[0]


def simulate_folder(
    images: str | Path,
    out: Path,
    kind: str,
    *,
    window: Sequence[float] | None = None,
    multiple: int = 1,
    seed: int = 0,
    workers: int = 1,
    **physics: Any,
) -> int:
    """Write OUT/high/ID.png and its degraded partner OUT/low/ID.png for every image in a folder.

    Args:
        images: folder of clean images.
        out: folder of the pairs.
        kind: see `make_degradation`.
        window: see `asa.data.io.images2d.read_picture`; the pairs remember it.
        multiple: the sizes are cut to multiples of it.
        seed: of every random draw; an image's do not depend on the others.
        workers: processes; 1 works in this one.
        physics: see `make_degradation`.

    Returns:
        The number of pairs.

    Raises:
        FileNotFoundError, ValueError: no images, settings that do not fit, or an image that cannot be read or degraded;
            the message names it.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: give 1 or more processes")
    settings = {"kind": kind, "window": window, **physics}
    make_degradation(**settings)  # what does not fit is said once, not for every image
    jobs = {id: (id, str(path)) for id, path in list_pictures(images).items()}
    make = partial(_write_pair, out=out, settings=settings, multiple=multiple, seed=seed)
    with tqdm(total=len(jobs), desc="simulate", unit="image") as bar:
        for id, failure in in_processes(make, jobs, workers):
            if failure is None or failure:
                raise ValueError(failure or f"{jobs[id][1]}: {KILLED}")
            bar.update()
    return len(jobs)


def _write_pair(job: tuple[str, str], *, out: Path, settings: dict[str, Any], multiple: int, seed: int) -> str:
    """Read, degrade and write an image, (id, path): why it failed, or nothing."""
    (id, path), window = job, settings["window"]
    try:
        clean = read_picture(path, window)
    except ValueError as error:
        return str(error)
    clean = clean[:, : clean.shape[1] // multiple * multiple, : clean.shape[2] // multiple * multiple]
    try:
        low = make_degradation(**settings)(clean, np.random.default_rng(sample_seed(seed, id)))
    except ValueError as error:
        return f"{path}: {error}"
    write_picture(out / "high" / f"{id}.png", clean, window)
    write_picture(out / "low" / f"{id}.png", low, window)
    return ""
