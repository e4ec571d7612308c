"""From network outputs to label maps on a scan's own grid.

Labels are either exclusive classes, compared by softmax, or nested regions, each with a sigmoid of its own.
Letters: K classes (background first) or R regions; prepared volumes `D H W`; native volumes `(x, y, z)` as in the
scan's file. Probabilities are resampled and compared one at a time, because a native grid may be large.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa.data.io.nifti import Volume, write_image
from asa.data.preprocessing.pipeline import to_native
from asa.ops.nested import paint, painting_order

# Matches a label name that contains a side.
SIDE = re.compile(r"(^|[^a-z])(left|right|lh|rh|l|r)([^a-z]|$)", re.IGNORECASE)


def probabilities_of(logits: Tensor, regions: Mapping[str, Sequence[int]]) -> Tensor:
    """Probabilities `(K or R, D, H, W)` of logits: a sigmoid per region if there are regions, else a softmax."""
    return logits.sigmoid() if regions else logits.softmax(dim=0)


def native_label_map(
    probabilities: Tensor,
    chain: dict[str, Any],
    labels: Mapping[int, str],
    regions: Mapping[str, Sequence[int]],
    like: Volume,
    files: Sequence[Path] | None = None,
) -> np.ndarray:
    """Resample the probabilities of a prepared scan to its own grid and choose the labels there.

    Args:
        probabilities: `(K or R, D, H, W)` on the CPU.
        chain: the preprocessing steps of the scan, to be undone.
        labels: label value -> name.
        regions: name -> label values that it joins; {} for exclusive classes.
        like: the scan as it was read.
        files: where the probability of each of the K classes or R regions is written; None writes none.

    Returns:
        Label values `(x, y, z)`.
    """
    channels = (probabilities if regions else probabilities[1:]).numpy()
    native = (to_native(channel[None], chain, order=1)[0] for channel in channels)
    return labels_from_probabilities(native, labels, regions, like, files)


def labels_from_probabilities(
    probabilities: Iterable[np.ndarray],
    labels: Mapping[int, str],
    regions: Mapping[str, Sequence[int]],
    like: Volume,
    files: Sequence[Path] | None = None,
) -> np.ndarray:
    """Choose the label of each voxel from probabilities on the scan's own grid.

    Args:
        probabilities: `(x, y, z)` of each of R regions, or of the K - 1 classes without the background.
        labels, regions, like, files: as for `native_label_map`.

    Returns:
        Label values `(x, y, z)`: the class of highest probability, or the innermost region above one half.
    """
    if regions:
        written = _written(probabilities, files, like)
        return paint((torch.from_numpy(one) for one in written), painting_order(regions)).numpy()
    return _most_probable(probabilities, labels, like, files)


def _most_probable(
    probabilities: Iterable[np.ndarray], labels: Mapping[int, str], like: Volume, files: Sequence[Path] | None
) -> np.ndarray:
    """The class of highest probability; the background has what the other classes leave, so that all sum to 1."""
    background = np.ones(like.data.shape, np.float32)
    highest, index = np.zeros_like(background), np.zeros(like.data.shape, np.uint8)
    for k, probability in enumerate(_written(probabilities, files and files[1:], like), start=1):
        background -= probability
        higher = probability > highest
        highest[higher], index[higher] = probability[higher], k
    background = background.clip(min=0)
    index[background >= highest] = 0
    if files is not None:
        write_image(files[0], background, like.affine)
    return np.array([0, *sorted(labels)])[index]


def _written(probabilities: Iterable[np.ndarray], files: Sequence[Path] | None, like: Volume) -> Iterator[np.ndarray]:
    """Pass the probabilities on, after writing each to its file if there are files."""
    paired = zip(probabilities, repeat(None)) if files is None else zip(probabilities, files, strict=True)
    for probability, file in paired:
        if file is not None:
            write_image(file, probability, like.affine)
        yield probability


def output_names(labels: Mapping[int, str], regions: Mapping[str, Sequence[int]]) -> list[str]:
    """What the probabilities of a network are of: its regions, or the background and its labels."""
    return list(regions) or ["background", *(labels[value] for value in sorted(labels))]


def probability_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """A file in the folder for each class or region.

    Raises:
        ValueError: two names give the same file.
    """
    files = [re.sub(r"[^\w.-]+", "_", name) + ".nii.gz" for name in names]
    for index, file in enumerate(files):
        if file in files[:index]:
            raise ValueError(
                f"the classes {names[files.index(file)]!r} and {names[index]!r} would both be written to {file}: "
                "rename one of them"
            )
    return [folder / file for file in files]


# ---- left and right: labels are value -> name, pairs are `[left, right]` names of labels exchanged by mirroring ----


def check_lateral_pairs(labels: Mapping[int, str], pairs: Sequence[Sequence[str]]) -> None:
    """Check that every label whose name contains a side has a partner.

    Raises:
        ValueError: a label without a partner.
    """
    paired = {name for pair in pairs for name in pair}
    for name in labels.values():
        if SIDE.search(name) and name not in paired:
            raise ValueError(
                f"mirror=true: the name of the label {name!r} contains a side, but the checkpoint lists no partner for "
                "it: give mirror=false, or fine-tune with data.lateral_pairs"
            )


def mirrored_classes(labels: Mapping[int, str], pairs: Sequence[Sequence[str]]) -> list[int]:
    """For each class, background first, the index of the class that replaces it in the mirror image."""
    index = {labels[value]: k for k, value in enumerate(sorted(labels), start=1)}
    classes = list(range(len(labels) + 1))
    for left, right in pairs:
        classes[index[left]], classes[index[right]] = index[right], index[left]
    return classes


def mirrored_regions(
    regions: Mapping[str, Sequence[int]], labels: Mapping[int, str], pairs: Sequence[Sequence[str]]
) -> list[int]:
    """For each region (name -> label values), the index of the region that replaces it in the mirror image.

    Raises:
        ValueError: no region joins the labels of the other side.
    """
    values = [0, *sorted(labels)]
    partner = {value: values[k] for value, k in zip(values, mirrored_classes(labels, pairs), strict=True)}
    sets = [set(joined) for joined in regions.values()]
    indices = []
    for name, joined in regions.items():
        mirrored = {partner[value] for value in joined}
        if mirrored not in sets:
            raise ValueError(f"the region {name!r} has no partner that joins the labels of the other side: declare one")
        indices.append(sets.index(mirrored))
    return indices
