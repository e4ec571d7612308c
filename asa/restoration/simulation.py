"""Simulated degradations of images without a degraded partner. Results are not measurements: report them as simulated.

Images are `(H, W)` or `(C, H, W)` float; random numbers come from a numpy Generator.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from asa.data.io.files import read_json, write_json
from asa.data.io.parallel import each_tried
from asa.data.loading.crops import sample_seed
from asa.data.store import read_box
from asa.errors import require
from asa.restoration.images import in_window, list_pictures, read_values, stored_window, write_picture

KINDS = ("ct", "pet", "sr")
SETTINGS = ("kind", "window", "photons", "pixel", "counts", "factor", "blur", "seed")  # stored with the pairs
Degradation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
WATER = 0.0193  # linear attenuation of water per mm at about 70 keV (NIST XCOM)


def low_dose_ct(
    image: np.ndarray, generator: np.random.Generator, *, photons: float = 1e4, pixel: float = 0.7, views: int = 360
) -> np.ndarray:
    """A CT slice with the quantum noise of fewer photons, simulated.

    HU are converted to attenuation, mu = 0.0193 / mm * (1 + HU / 1000), and to parallel projections p over 180 degrees.
    The photons at the detector are Poisson with mean N exp(-p). The noise of -log(counts / N) is back-projected with a
    ramp filter and added. The simulation is monoenergetic, without scatter, electronic noise or bow-tie filter.

    Args:
        image: `(H, W)` in HU, as is the result; its pixels have an edge of `pixel` mm.
        photons: N emitted along a ray; the noise is proportional to 1 / sqrt(N).
        views: number of projection angles.
    """

    def noise(line: np.ndarray) -> np.ndarray:
        counts = generator.poisson(photons * np.exp(-line)).clip(min=1)  # log(0) is not finite
        return -np.log(counts / photons) - line

    attenuation = WATER * pixel * (1 + image / 1000).clip(min=0)  # of a pixel
    return image + 1000 / (WATER * pixel) * _noise_through_projections(attenuation, noise, views)


def low_count_pet(
    image: np.ndarray, generator: np.random.Generator, *, counts: float = 1e6, views: int = 180
) -> np.ndarray:
    """A PET slice with the noise of fewer counts, simulated.

    Parallel projections of the activity are scaled to a sum of `counts`, drawn as Poisson counts and scaled back. The
    noise is back-projected with a ramp filter and added. Without attenuation, scatter, randoms or resolution model.

    Args:
        image: `(H, W)` activity or uptake in any unit, as is the result; a ValueError for a negative one, or none.
        counts: true coincidences in the slice.
        views: number of projection angles.
    """
    if image.min() < 0 or not image.max() > 0:
        raise ValueError(f"activity must be 0 or more, and not 0 everywhere, got {image.min():g} to {image.max():g}")

    def noise(line: np.ndarray) -> np.ndarray:
        scale = counts / line.sum()
        return generator.poisson(scale * line.clip(min=0)) / scale - line

    return (image + _noise_through_projections(image, noise, views)).clip(min=0)


def _noise_through_projections(image: np.ndarray, noise: Callable[[np.ndarray], np.ndarray], views: int) -> np.ndarray:
    """The image `(H, W)` of noise that depends on the projections, in the image's unit per pixel."""
    # Back-projection is linear: only the noise is back-projected, so that the image keeps its resolution.
    transform = require("skimage.transform", "restore", "the simulation of projections")
    edge = max(image.shape)
    above, left = ((edge - n) // 2 for n in image.shape)
    square = read_box(image[None].astype(np.float64), (-above, -left), (edge, edge))[0]
    angles = np.linspace(0, 180, views, endpoint=False)
    projections = transform.radon(square, angles, circle=False)
    back = transform.iradon(noise(projections), angles, output_size=edge, circle=False, filter_name="ramp")
    return read_box(back[None], (above, left), image.shape)[0]


def decimated(image: np.ndarray, factor: int, *, blur: float = 0.5) -> np.ndarray:
    """A smaller image for super-resolution, simulated: `(C, H, W)` -> `(C, H // factor, W // factor)`.

    After a Gaussian blur, whose standard deviation is `blur` in units of the factor, samples are taken at the centres
    of blocks of factor x factor pixels, as bilinear upscaling assumes.
    """
    soft = gaussian_filter(image.astype(np.float64), (0, blur * factor, blur * factor), mode="nearest")
    centres = np.meshgrid(*((np.arange(n // factor) + 0.5) * factor - 0.5 for n in image.shape[1:]), indexing="ij")
    return np.stack([map_coordinates(channel, centres, order=1, mode="nearest") for channel in soft])


def make_degradation(
    kind: str, *, photons: float = 1e4, pixel: float = 0.7, counts: float = 1e6, factor: int = 2, blur: float = 0.5
) -> Degradation:
    """The function that degrades an image `(C, H, W)` in its own units; a ValueError for settings without a meaning.

    `kind` is `"ct"` (`low_dose_ct` with `photons` and `pixel`; HU), `"pet"` (`low_count_pet` with `counts`) or `"sr"`
    (`decimated` by `factor` with `blur`).
    """
    for name, value in (("photons", photons), ("pixel", pixel), ("counts", counts), ("blur", blur)):
        least = "0 or more" if name == "blur" else "above 0"
        if type(value) not in (int, float) or not (value > 0 or (value == 0 and name == "blur")):
            raise ValueError(f"{name}={value}: has to be a number, {least}")
    if kind == "sr":
        if type(factor) is not int or factor not in (2, 4):
            raise ValueError(f"factor={factor}: choose 2 or 4")
        return lambda image, _: decimated(image, factor, blur=blur)
    if kind == "pet":
        return lambda image, generator: low_count_pet(_grey(image).clip(min=0), generator, counts=counts)[None]
    if kind != "ct":
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    return lambda image, generator: low_dose_ct(_grey(image), generator, photons=photons, pixel=pixel)[None]


def _grey(image: np.ndarray) -> np.ndarray:
    if len(image) != 1:
        raise ValueError("a colour image, but only super-resolution can be simulated in colour")
    return image[0]


def simulate(config: dict[str, Any]) -> None:
    """asa-simulate: write OUT/high/ID.png and the degraded OUT/low/ID.png for every image in a folder.

    Noise is simulated from all values of an image, also of those that the window clips afterwards. For super-resolution
    the clipped image is made smaller, and the sizes are cropped to multiples of the factor. The window is stored in the
    PNG files, as is that of a source which stores one. The draws of an image do not depend on the others.
    """
    window, seed, out = config["window"], config["seed"], Path(str(config["out"]))
    made, file = {key: config[key] for key in SETTINGS}, out / "simulated.json"
    if file.exists() and (before := read_json(file)) != made:
        other = next((key for key in made if before.get(key) != made[key]), "them")
        raise ValueError(f"{out}: holds pairs simulated with other settings ({other}): choose another out=")
    settings = {key: value for key, value in made.items() if key not in ("window", "seed")}
    make_degradation(**settings)  # invalid settings fail once, not for every image
    if config["kind"] == "ct" and window is None:
        raise ValueError("kind=ct needs HU: give the values that become 0 and 1, like window=[-1000,1000]")
    jobs = [(id, str(path)) for id, path in list_pictures(config["input"]).items()]
    make = partial(_write_pair, out=out, settings=settings, window=window, seed=seed)
    write_json(file, made)  # first, so that pairs of an interrupted call have their settings
    tried = each_tried(make, jobs, config["workers"], title="simulate", unit="image")
    failures = {id: reason for (id, _), _, reason in tried if reason}
    if len(failures) == len(jobs) and not (out / "low").exists():
        file.unlink()
    for id, reason in sorted(failures.items()):
        print(f"{id}: failed: {reason}")
    if failures:
        raise ValueError(f"{len(failures)} images failed, listed above")
    print(f"wrote {len(jobs)} simulated pairs to {out}")


def _write_pair(
    job: tuple[str, str], *, out: Path, settings: dict[str, Any], window: Sequence[float] | None, seed: int
) -> None:
    id, path = job
    values, ends = read_values(path, window)
    if settings["kind"] == "sr":
        multiple = settings["factor"]
        values = values[:, : values.shape[1] // multiple * multiple, : values.shape[2] // multiple * multiple]
        values = values.clip(*ends)
    try:
        low = make_degradation(**settings)(values, np.random.default_rng(sample_seed(seed, id)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    note = window if window is not None else stored_window(path)
    write_picture(out / "high" / f"{id}.png", in_window(values, ends), note)
    write_picture(out / "low" / f"{id}.png", in_window(low, ends), note)
