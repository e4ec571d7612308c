"""Label maps of a folder of images: computed once, in parallel processes, and stored beside them.

OUT/ID.png            the label map, 16 bits
OUT/previews/ID.png   the image with its regions outlined
OUT/regions.json      how the maps were made
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.data.io.files import read_json, write_json
from asa.data.io.images2d import list_pictures, read_picture, write_picture, write_regions
from asa.data.io.parallel import KILLED, in_processes
from asa.data.restoration.superpixels import Provider, make_provider

SETTINGS = "regions.json"
OUTLINE = np.array([230, 159, 0]) / 255  # Okabe and Ito's orange


@dataclass
class Report:
    """What became of the images: regions of each new map, ids that had one, and why others failed."""

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
) -> Report:
    """Compute the label map of every image in a folder that has none yet.

    Args:
        images: folder of images.
        out: folder of the maps.
        settings: keywords of `make_provider`.
        window: see `asa.data.io.images2d.read_picture`.
        workers: processes; 1 works in this one.
        progress: show a bar.

    Raises:
        FileNotFoundError, ValueError, ImportError: no images, a provider that lacks what it needs, or a folder with
            maps that were made in another way. Images that fail are in the report, and do not stop the others.
    """
    out, found = Path(out), list_pictures(images)
    if workers < 1:
        raise ValueError(f"workers={workers}: give 1 or more processes")
    if out.resolve() == Path(images).resolve():
        raise ValueError(f"{out}: the label maps would replace the images: choose another out=")
    made = {**settings, "window": None if window is None else list(window)}
    if (out / SETTINGS).is_file() and (before := read_json(out / SETTINGS)) != made:
        raise ValueError(f"{out}: holds label maps made in another way ({before}): choose another out=")
    _provider(tuple(settings.items()))  # what it lacks is said once, not for every image
    write_json(out / SETTINGS, made)
    report = Report(kept=[id for id in found if (out / f"{id}.png").is_file()])
    jobs = {id: (id, str(path)) for id, path in found.items() if id not in report.kept}
    compute = partial(_compute, out=out, settings=tuple(settings.items()), window=window)
    with tqdm(total=len(jobs), desc="regions", unit="image", disable=not progress) as bar:
        for id, result in in_processes(compute, jobs, workers):
            if isinstance(result, int):
                report.regions[id] = result
            else:
                report.failures[id] = result or KILLED
            bar.update()
    return report


@cache
def _provider(settings: tuple[tuple[str, Any], ...]) -> Provider:
    return make_provider(**dict(settings))  # a worker process loads a network once


def _compute(
    job: tuple[str, str], *, out: Path, settings: tuple[tuple[str, Any], ...], window: Sequence[float] | None
) -> int | str:
    """Compute and store the label map of an image, (id, path): the number of its regions, or why there is none."""
    id, path = job
    try:
        image = read_picture(path, window)
        labels = _provider(settings)(id, image)
        write_picture(out / "previews" / f"{id}.png", outlined(image, labels))
        write_regions(out / f"{id}.png", labels)  # last: a map that is there is whole
    except (ValueError, OSError, ImportError) as error:
        return str(error)
    return len(np.unique(labels))


def outlined(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A picture of regions: image `(C, H, W)` in [0, 1] with the borders in `labels` `(H, W)` drawn, `(3, H, W)`."""
    border = np.zeros(labels.shape, dtype=bool)
    border[:-1] |= labels[:-1] != labels[1:]
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    colour: np.ndarray = np.broadcast_to(image, (3, *labels.shape))
    return np.where(border, OUTLINE[:, None, None], colour)
