"""Label maps of a folder of images: computed once, in parallel processes, and stored beside them.

OUT/ID.png            the label map, 16 bits
OUT/previews/ID.png   the image with its regions outlined
OUT/regions.json      how the maps were made
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.data.files import read_json, write_json
from asa.data.picture import list_pictures, read_picture, write_picture, write_regions
from asa.data.providers import Provider, make_provider
from asa.data.workers import end_with_parent

SETTINGS = "regions.json"
OUTLINE = np.array([230, 159, 0]) / 255  # Okabe and Ito's orange
Job = tuple[str, str]  # id and path of an image


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
        window: see `asa.data.picture.read_picture`.
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
    provider = make_provider(**settings) if workers == 1 else None  # each worker makes its own
    write_json(out / SETTINGS, made)
    report = Report(kept=[id for id in found if (out / f"{id}.png").is_file()])
    jobs = [(id, str(path)) for id, path in found.items() if id not in report.kept]
    task = partial(_compute, out=out, settings=dict(settings), window=window)
    with tqdm(total=len(jobs), desc="regions", unit="image", disable=not progress) as bar:
        for id, result in _results(jobs, task, provider, workers):
            if isinstance(result, int):
                report.regions[id] = result
            else:
                report.failures[id] = result
            bar.update()
    return report


def _results(
    jobs: list[Job], task: partial[int | str], provider: Provider | None, workers: int
) -> Iterator[tuple[str, int | str]]:
    """Id, and the number of regions or why there are none, of each image."""
    if provider is not None:
        for job in jobs:
            yield job[0], task(job, provider=provider)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(task, job): job[0] for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenExecutor:
                    yield futures[future], "a worker process was killed, out of memory perhaps; run with fewer workers"
        finally:
            pool.shutdown(cancel_futures=True)


_made: dict[str, Provider] = {}  # of a worker process: a network is loaded once


def _compute(
    job: Job,
    *,
    out: Path,
    settings: dict[str, Any],
    window: Sequence[float] | None,
    provider: Provider | None = None,
) -> int | str:
    """Compute and store one label map: the number of its regions, or why there is none."""
    id, path = job
    try:
        if provider is None:
            key = repr(settings)
            provider = _made[key] if key in _made else _made.setdefault(key, make_provider(**settings))
        image = read_picture(path, window)
        labels = provider(id, image)
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
