"""From probabilities on a scan's own grid to its label map: of classes that compete, or of regions that are painted.

Letters: K classes, background first, or R regions; volumes (x, y, z) as in the scan's file. Probabilities come one at
a time, since a scan's grid may be large.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from asa.data.io.nifti import Volume, write_image
from asa.ops.nested import paint, painting_order

Shares = Iterable[np.ndarray]


def winning_labels(
    shares: Shares,
    labels: Mapping[int, str],
    regions: Mapping[str, Sequence[int]],
    like: Volume,
    folder: Path | None = None,
) -> np.ndarray:
    """Label values from probabilities on the scan's own grid.

    Args:
        shares: of R regions, or of K - 1 classes, that of the background left out.
        labels: label value -> name.
        regions: name -> label values that it joins; {} where classes compete.
        like: the scan.
        folder: for each probability in a file of its own; None writes none.

    Returns:
        Label values, of the scan's shape.
    """
    if regions:
        return _paint_regions(shares, regions, like, folder)
    return _compare_classes(shares, labels, like, folder)


def _compare_classes(shares: Shares, labels: Mapping[int, str], like: Volume, folder: Path | None) -> np.ndarray:
    """The class of the largest probability at each voxel.

    What no class claims is background, so the probabilities sum to 1 everywhere.
    """
    values = sorted(labels)
    files = share_files(["background", *(labels[value] for value in values)])
    rest = np.ones(like.data.shape, np.float32)
    best, winner = np.zeros_like(rest), np.zeros(like.data.shape, np.uint8)
    for index, share in enumerate(_written(shares, files[1:], like, folder), start=1):
        rest -= share
        better = share > best
        best[better], winner[better] = share[better], index
    rest = rest.clip(min=0)
    winner[rest >= best] = 0
    if folder is not None:
        write_image(folder / files[0], rest, like.affine)
    return np.array([0, *values])[winner]


def _paint_regions(
    shares: Shares, regions: Mapping[str, Sequence[int]], like: Volume, folder: Path | None
) -> np.ndarray:
    """The label of the innermost region that claims a voxel with more than one half, see `asa.ops.nested`."""
    written = _written(shares, share_files(list(regions)), like, folder)
    return paint((torch.from_numpy(share) for share in written), painting_order(regions)).numpy()


def _written(shares: Shares, files: Sequence[str], like: Volume, folder: Path | None) -> Iterator[np.ndarray]:
    """Hand the probabilities on, each written if there is a folder."""
    for share, file in zip(shares, files, strict=True):
        if folder is not None:
            write_image(folder / file, share, like.affine)
        yield share


def share_files(names: Sequence[str]) -> list[str]:
    """A file name for each class or region.

    Raises:
        ValueError: two would share one.
    """
    files = [re.sub(r"[^\w.-]+", "_", name) + ".nii.gz" for name in names]
    for index, file in enumerate(files):
        if file in files[:index]:
            raise ValueError(f"the classes {names[files.index(file)]!r} and {names[index]!r} would share {file}")
    return files


def mirrored_classes(labels: Mapping[int, str], pairs: Sequence[Sequence[str]]) -> list[int]:
    """For each class, background first, the one whose place it takes in a mirror.

    Args:
        labels: label value -> name.
        pairs: names of labels that change places, `[left, right]`.
    """
    index = {labels[value]: place for place, value in enumerate(sorted(labels), start=1)}
    classes = list(range(len(labels) + 1))
    for left, right in pairs:
        classes[index[left]], classes[index[right]] = index[right], index[left]
    return classes


def mirrored_regions(
    regions: Mapping[str, Sequence[int]], labels: Mapping[int, str], pairs: Sequence[Sequence[str]]
) -> list[int]:
    """For each region, the one whose place it takes in a mirror: that which joins the labels of the other side.

    Args:
        regions: name -> label values that it joins.
        labels, pairs: as for `mirrored_classes`.

    Raises:
        ValueError: there is none.
    """
    values = [0, *sorted(labels)]
    partner = {value: values[place] for value, place in zip(values, mirrored_classes(labels, pairs), strict=True)}
    sets = [set(joined) for joined in regions.values()]
    places = []
    for name, joined in regions.items():
        mirrored = {partner[value] for value in joined}
        if mirrored not in sets:
            raise ValueError(f"the region {name!r} has no partner that joins the labels of the other side: declare one")
        places.append(sets.index(mirrored))
    return places
