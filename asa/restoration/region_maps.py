"""Label maps of regions for a folder of images: computed once, in parallel processes, and stored.

Regions are superpixels by Felzenszwalb or SLIC, masks by Segment Anything, or stored label maps. Images are `C H W` in
[0, 1], label maps `H W` int64.

OUT/ID.png            the label map, 16 bits
OUT/previews/ID.png   the image with its regions outlined
OUT/regions.json      the settings of the maps
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.datasets.record import NIFTI, find_file
from asa.data.io.files import read_json, write_json
from asa.data.io.parallel import each_tried
from asa.errors import require
from asa.restoration.images import list_pictures, read_picture, read_regions, write_picture, write_regions

Provider = Callable[[str, np.ndarray], np.ndarray]  # id and image -> label map
PROVIDERS = ("felzenszwalb", "slic", "sam", "stored")
SETTINGS = "regions.json"
OUTLINE = np.array([230, 159, 0]) / 255  # Okabe and Ito's orange


def regions(config: dict[str, Any]) -> None:
    """asa-regions: compute the label map of every image in a folder that does not have one yet."""
    images, out, window = config["input"], Path(str(config["out"])), config["window"]
    settings_of: dict[str, dict[str, Any]] = {
        "felzenszwalb": {"scale": config["scale"]},
        "slic": {"regions": config["regions"]},
        "sam": {"weights": config["weights"], "model": config["sam"], "device": config["device"]},
        "stored": {"folder": config["stored"]},
    }
    settings = {"name": config["provider"], **settings_of.get(config["provider"], {})}
    found = list_pictures(images)
    if out.resolve() == Path(images).resolve():
        raise ValueError(f"{out}: the label maps would replace the images: choose another out=")
    made = {**settings, "window": None if window is None else list(window)}
    if (out / SETTINGS).is_file() and (before := read_json(out / SETTINGS)) != made:
        raise ValueError(f"{out}: holds label maps made with other settings ({before}): choose another out=")
    _provider(**settings)  # invalid settings fail once, not for every image
    write_json(out / SETTINGS, made)
    jobs = [(id, str(path)) for id, path in found.items() if not (out / f"{id}.png").is_file()]
    compute = partial(_compute, out=out, settings=settings, window=window)
    tried = list(each_tried(compute, jobs, config["workers"], title="regions", unit="image"))
    failures = {id: reason for (id, _), _, reason in tried if reason}
    for id, reason in sorted(failures.items()):
        print(f"{id}: failed: {reason}")
    if counts := sorted(count for _, count, _ in tried if count is not None):
        print(f"{len(counts)} label maps with {counts[0]} to {counts[-1]} regions, median {counts[len(counts) // 2]}")
    if len(jobs) < len(found):
        print(f"{len(found) - len(jobs)} label maps existed already")
    if failures:
        raise ValueError(f"{len(failures)} images failed, listed above")
    print(f"wrote label maps to {out}, and previews to {out}/previews")


def _compute(job: tuple[str, str], *, out: Path, settings: dict[str, Any], window: Sequence[float] | None) -> int:
    """Compute and store the label map of an image (id, path); returns its number of regions."""
    id, path = job
    image = read_picture(path, window)
    labels = _provider(**settings)(id, image)
    write_picture(out / "previews" / f"{id}.png", outlined(image, labels))
    write_regions(out / f"{id}.png", labels)  # last, so that an existing map has its preview
    return len(np.unique(labels))


def outlined(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """An image `(C, H, W)` in [0, 1] with the borders of the regions in `labels` `(H, W)`: `(3, H, W)`."""
    border = np.zeros(labels.shape, dtype=bool)
    border[:-1] |= labels[:-1] != labels[1:]
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    colour: np.ndarray = np.broadcast_to(image, (3, *labels.shape))
    return np.where(border, OUTLINE[:, None, None], colour)


def make_provider(
    name: str,
    *,
    regions: int = 40,
    scale: float = 100.0,
    weights: str | Path | None = None,
    model: str = "vit_h",
    folder: str | Path | None = None,
    device: str = "cpu",
) -> Provider:
    """The function that computes the label map of an image.

    Args:
        name: `"felzenszwalb"` (graph-based, IJCV 2004), `"slic"` (PAMI 2012), `"sam"` (Segment Anything, ICCV 2023) or
            `"stored"`.
        regions: approximate number of regions, for slic.
        scale: larger values give larger regions, for felzenszwalb.
        weights, model, device: for sam, a local file and its model (vit_h, vit_l, vit_b); nothing is downloaded.
        folder: for stored, label maps ID.png, ID.nii or ID.nii.gz.
    """
    for key, value in (("scale", scale), ("regions", regions)):
        if not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{key}={value}: give a number above 0")
    if name == "felzenszwalb":
        return partial(_superpixels, method=name, scale=scale, sigma=0.8)
    if name == "slic":
        return partial(_superpixels, method=name, n_segments=regions, start_label=0)
    if name == "sam":
        return _sam(weights, model, device)
    if name == "stored":
        if folder is None:
            raise ValueError("provider=stored needs the folder of the label maps: give stored=")
        return partial(_stored, folder=Path(folder))
    raise ValueError(f"provider={name!r}: choose one of {', '.join(PROVIDERS)}")


_provider = cache(make_provider)  # so that a worker process loads a network once


def _superpixels(_: str, image: np.ndarray, *, method: str, **settings: Any) -> np.ndarray:
    if method == "slic":  # compares colour in Lab with lightness up to 100, grey in [0, 1]
        settings["compactness"] = 10.0 if len(image) == 3 else 0.1
    else:  # pixels: a few features at a quarter of the resolution
        settings["min_size"] = max(20, image[0].size // 2000)
    compute = getattr(require("skimage.segmentation", "restore", "superpixels"), method)
    return compute(image.transpose(1, 2, 0).astype(np.float64), channel_axis=-1, **settings).astype(np.int64)


def _stored(id: str, image: np.ndarray, *, folder: Path) -> np.ndarray:
    path = find_file(folder / id, (".png", *NIFTI))
    if path is None:
        raise FileNotFoundError(f"{folder}: no label map of {id} (.png, .nii.gz or .nii)")
    labels = read_regions(path)
    if labels.shape != image.shape[1:]:
        raise ValueError(f"{path}: the label map is {labels.shape}, its image {image.shape[1:]} (rows, columns)")
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def _sam(weights: str | Path | None, model: str, device: str) -> Provider:
    if weights is None or not Path(weights).is_file():
        raise ValueError(f"provider=sam needs weights=, a local file of Segment Anything weights, got {weights}")
    segment_anything = require("segment_anything", None, "provider=sam")
    network = segment_anything.sam_model_registry[model](checkpoint=str(weights)).to(device)
    generator = segment_anything.SamAutomaticMaskGenerator(network)

    def compute(_: str, image: np.ndarray) -> np.ndarray:
        colour = np.rint(255 * np.broadcast_to(image, (3, *image.shape[1:]))).astype(np.uint8).transpose(1, 2, 0)
        masks: Sequence[dict[str, Any]] = generator.generate(np.ascontiguousarray(colour))
        return paint([mask["segmentation"] for mask in masks], image.shape[1:])

    return compute


def paint(masks: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """One label map (H, W) from bool masks, which may overlap: painted from large to small, so that small ones stay.

    Labels are 1, 2, ... in the order of painting; 0, one more region, where there is no mask.
    """
    labels = np.zeros(tuple(shape), dtype=np.int64)
    by_size = sorted(masks, key=np.count_nonzero, reverse=True)
    for label, mask in enumerate(by_size, start=1):
        labels[mask] = label
    return labels
