"""Label maps of regions for a folder of images: computed once, in parallel processes, and stored.

OUT/ID.png            the label map, 16 bits
OUT/previews/ID.png   the image with its regions outlined
OUT/regions.json      the settings of the maps
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import read_json, write_json
from asa.data.io.images2d import list_pictures, read_picture, write_picture, write_regions
from asa.data.io.parallel import check_workers, each_tried
from asa.data.restoration.superpixels import Provider, make_provider

SETTINGS = "regions.json"
OUTLINE = np.array([230, 159, 0]) / 255  # Okabe and Ito's orange


@dataclass
class RegionReport:
    """The result: id -> number of regions of each new map, ids that had a map, and id -> reason of each failure."""

    regions: dict[str, int] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def store_regions(
    images: str | Path,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    window: Sequence[float] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> RegionReport:
    """Compute the label map of every image in a folder that does not have one yet.

    Args:
        images: folder of images.
        out: folder of the maps.
        settings: keywords of `make_provider`.
        window: see `asa.data.io.images2d.read_picture`.
        workers: number of processes; 1 works in this process.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError, ImportError: no images, invalid settings or a missing package of the provider, or
            a folder with maps of other settings. Images that fail are in the report and do not stop the others.
    """
    out, found = Path(out), list_pictures(images)
    check_workers(workers)
    if out.resolve() == Path(images).resolve():
        raise ValueError(f"{out}: the label maps would replace the images: choose another out=")
    made = {**settings, "window": None if window is None else list(window)}
    if (out / SETTINGS).is_file() and (before := read_json(out / SETTINGS)) != made:
        raise ValueError(f"{out}: holds label maps made with other settings ({before}): choose another out=")
    _provider(tuple(settings.items()))  # invalid settings fail once, not for every image
    write_json(out / SETTINGS, made)
    report = RegionReport(kept=[id for id in found if (out / f"{id}.png").is_file()])
    jobs = [(id, str(path)) for id, path in found.items() if id not in report.kept]
    compute = partial(_compute, out=out, settings=tuple(settings.items()), window=window)
    for (id, _), count, reason in each_tried(compute, jobs, workers, title="regions", unit="image", progress=progress):
        if count is None:
            report.failures[id] = reason
        else:
            report.regions[id] = count
    return report


@cache
def _provider(settings: tuple[tuple[str, Any], ...]) -> Provider:
    return make_provider(**dict(settings))  # cached, so that a worker process loads a network once


def _compute(
    job: tuple[str, str], *, out: Path, settings: tuple[tuple[str, Any], ...], window: Sequence[float] | None
) -> int:
    """Compute and store the label map of an image (id, path); returns its number of regions."""
    id, path = job
    image = read_picture(path, window)
    labels = _provider(settings)(id, image)
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
