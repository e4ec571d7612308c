"""From network outputs to label maps on a scan's own grid, and how certain these are.

Labels are either exclusive classes, compared by softmax, or nested regions, each with a sigmoid of its own.
Letters: K classes (background first) or R regions; prepared volumes `D H W`; native volumes `(x, y, z)` as in the
scan's file. Probabilities are resampled and compared one at a time, because a native grid may be large.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa.data.io.nifti import Volume, write_image, write_label
from asa.data.preprocessing.midsagittal import distance_to_the_right
from asa.data.preprocessing.pipeline import to_native
from asa.ops.labels import joined_sides, side_of
from asa.ops.nested import paint, painting_order


@dataclass(frozen=True)
class Outputs:
    """What the output channels of a segmentation network stand for, and how they become a label map."""

    labels: dict[int, str]  # value -> name
    regions: dict[str, list[int]] = field(default_factory=dict)  # name -> values that it joins; {}: exclusive classes
    lateral_pairs: Sequence[Sequence[str]] = ()  # `[left, right]` names of labels that are exchanged by mirroring
    join_sides: bool = False  # each such pair has one channel, which the mid-sagittal plane divides

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Outputs":
        """Those of a checkpoint's metadata of its training scans."""
        labels = {int(value): name for value, name in data["labels"].items()}
        pairs, joined = data.get("lateral_pairs", []), bool(data.get("join_sides", False))
        return cls(labels, dict(data.get("regions", [])), pairs, joined)

    @property
    def names(self) -> list[str]:
        """The regions, or the background and the labels in the order of their values."""
        return list(self.regions) or self._classes

    @property
    def channels(self) -> list[int]:
        """The channel of each class, the background first: its own, or that of its pair."""
        classes = self._classes
        pairs = [(classes.index(left), classes.index(right)) for left, right in self.lateral_pairs if self.join_sides]
        return joined_sides(len(classes), pairs)

    @property
    def channel_names(self) -> list[str]:
        """Of each channel: a region, a class, or both classes of a pair with a + between them."""
        named: dict[int, list[str]] = {}
        for name, channel in zip(self._classes, self.channels, strict=True):
            named.setdefault(channel, []).append(name)
        return list(self.regions) or ["+".join(names) for names in named.values()]

    @property
    def _classes(self) -> list[str]:
        return ["background", *(self.labels[value] for value in sorted(self.labels))]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities `(K or R, D, H, W)` of logits."""
        return logits.sigmoid() if self.regions else logits.softmax(dim=0)

    def native_label_map(
        self, probabilities: Tensor, chain: dict[str, Any], like: Volume, files: Sequence[Path] | None = None
    ) -> np.ndarray:
        """Resample the probabilities of a prepared scan to its own grid and choose the label values `(x, y, z)` there.

        A ValueError where sides are joined, and the scan has no mid-sagittal plane.

        Args:
            probabilities: `(K or R, D, H, W)` on the CPU; where sides are joined, K counts a pair once.
            chain, like: the preprocessing steps of the scan, to be undone; and the scan as it was read.
            files: where the probability of each of `names` is written; None writes none.
        """

        def native(volume: np.ndarray) -> np.ndarray:
            return to_native(volume[None], chain)[0]

        if self.regions:
            return self.label_map(map(native, probabilities.numpy()), like, files)
        right = native(self._distances(probabilities, chain)) > 0 if self.join_sides else None
        parts = (
            self._on_its_side(k, native(probabilities[channel].numpy()), right)
            for k, channel in enumerate(self.channels)
            if k > 0
        )
        return self.label_map(parts, like, files)

    def _distances(self, probabilities: Tensor, chain: dict[str, Any]) -> np.ndarray:
        """Distance of each prepared voxel from the surface that separates the sides, in mm; positive on the right."""
        channels = self.channels
        paired = torch.tensor([channel for channel in set(channels) if channels.count(channel) > 1])
        return distance_to_the_right(chain, torch.isin(probabilities.argmax(dim=0), paired).numpy())

    def _on_its_side(self, k: int, volume: Any, right: Any) -> Any:
        """A class's probabilities or mask, 0 on the other side if it shares a channel; `right`: None without sides."""
        sides = {name: side for pair in self.lateral_pairs for name, side in zip(pair, (False, True), strict=True)}
        side = sides.get(self._classes[k])
        return volume if right is None or side is None else volume * (right == side)

    def label_map(
        self, probabilities: Iterable[np.ndarray], like: Volume, files: Sequence[Path] | None = None
    ) -> np.ndarray:
        """The label value of each voxel: the class of highest probability, or the innermost region above one half.

        Probabilities `(x, y, z)` are of each of R regions, or of the K - 1 classes without the background.
        """
        if self.regions:
            written = _written(probabilities, files, like)
            return paint((torch.from_numpy(one) for one in written), painting_order(self.regions)).numpy()
        # The background has what the other classes leave, so that all sum to 1.
        background = np.ones(like.data.shape, np.float32)
        highest, index = np.zeros_like(background), np.zeros(like.data.shape, np.uint8)
        for k, probability in enumerate(_written(probabilities, files and files[1:], like), start=1):
            background -= probability
            higher = probability > highest
            highest[higher], index[higher] = probability[higher], k
        background = background.clip(min=0)
        index[background >= highest] = 0
        if files is not None:
            write_image(files[0], background, like.affine, make_folder=False)
        return np.array([0, *sorted(self.labels)])[index]

    def write(
        self, out: Path, probabilities: Tensor, chain: dict[str, Any], like: Volume, files: Sequence[Path] | None
    ) -> dict[str, float]:
        """Write the `native_label_map`, with the scan's header, into folders that exist; returns its `volumes`."""
        label_map = self.native_label_map(probabilities, chain, like, files)
        write_label(out, label_map, like, make_folder=False)
        return self.volumes(label_map, like.affine)

    def volumes(self, label_map: np.ndarray, affine: np.ndarray) -> dict[str, float]:
        """Volume of each label and region in a label map (x, y, z), in ml."""
        ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
        parts = {name: [value] for value, name in self.labels.items()} | self.regions
        return {name: int(np.isin(label_map, values).sum()) * ml for name, values in parts.items()}

    def expected_dice(self, probabilities: Tensor, chain: dict[str, Any]) -> dict[str, float]:
        """Of each label, or each region if there are regions, from the probabilities of a prepared scan."""
        if self.regions:
            painted = paint(probabilities, painting_order(self.regions))
            masks = (torch.isin(painted, torch.tensor(values)) for values in self.regions.values())
            return {name: expected_dice(p, m) for name, p, m in zip(self.regions, probabilities, masks, strict=True)}
        chosen = probabilities.argmax(dim=0)
        right = torch.from_numpy(self._distances(probabilities, chain) > 0) if self.join_sides else None
        return {
            name: expected_dice(
                self._on_its_side(k, probabilities[channel], right), self._on_its_side(k, chosen == channel, right)
            )
            for k, (name, channel) in enumerate(zip(self.names, self.channels, strict=True))
            if k > 0
        }

    def mirrored(self) -> list[int]:
        """For each channel, the one that replaces it in the mirror image; a ValueError if one has no partner."""
        partner = {name: pair[1 - k] for pair in self.lateral_pairs for k, name in enumerate(pair)}
        for name in self.labels.values():
            if side_of(name) and name not in partner:
                raise ValueError(
                    f"mirror=true: the name of the label {name!r} contains a side, but the checkpoint lists no partner "
                    "for it: give mirror=false, or fine-tune with data.lateral_pairs"
                )
        if not self.regions:
            classes, channels = self._classes, self.channels
            mirrored = [channels[classes.index(partner.get(name, name))] for name in classes]
            return [mirrored[channels.index(channel)] for channel in range(max(channels) + 1)]
        labels, indices = {0: "background"} | self.labels, []
        sets = [{labels[value] for value in joined} for joined in self.regions.values()]
        for name, joined in zip(self.regions, sets, strict=True):
            if (others := {partner.get(label, label) for label in joined}) not in sets:
                raise ValueError(
                    f"the region {name!r} has no partner that joins the labels of the other side: declare one"
                )
            indices.append(sets.index(others))
        return indices

    def files(self, folder: Path) -> list[Path]:
        """A file in the folder for the probability of each class or region; a ValueError if two have the same."""
        files: dict[str, str] = {}
        for name in self.names:
            file = re.sub(r"[^\w.-]+", "_", name) + ".nii.gz"
            if file in files:
                raise ValueError(
                    f"the classes {files[file]!r} and {name!r} would both be written to {file}: rename one of them"
                )
            files[file] = name
        return [folder / file for file in files]


def _written(probabilities: Iterable[np.ndarray], files: Sequence[Path] | None, like: Volume) -> Iterator[np.ndarray]:
    """Pass the probabilities on, after writing each to its file if there are files."""
    paired = zip(probabilities, repeat(None)) if files is None else zip(probabilities, files, strict=True)
    for probability, file in paired:
        if file is not None:
            write_image(file, probability, like.affine, make_folder=False)
        yield probability


# ---- uncertainty ----


def entropy_map(probabilities: Tensor, *, regions: bool) -> Tensor:
    """Entropy of each voxel's label, divided by its maximum: `(K or R, D, H, W)` -> `(D, H, W)` from 0 to 1.

    Regions are yes or no each: of theirs the largest counts.
    """
    p = probabilities.clamp(0, 1)
    if regions:
        return ((torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)).amax(dim=0)
    return torch.special.entr(p).sum(dim=0) / math.log(len(p))


def write_map(path: Path, values: Tensor, chain: dict[str, Any], like: Volume) -> np.ndarray:
    """Write a map `(D, H, W)` of a prepared scan on the scan's own grid `(x, y, z)`, and return what was written."""
    native: np.ndarray = to_native(values[None].numpy(), chain)[0]
    write_image(path, native, like.affine, make_folder=False)
    return native


class RunningSpread:
    """Mean, and standard deviation over the members of an ensemble, of probabilities that are added one by one."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, probabilities: Tensor) -> None:
        """Add a member's `(K or R, D, H, W)` (Welford, Technometrics 1962)."""
        self.count += 1
        difference = probabilities - self.mean
        self.mean = self.mean + difference / self.count
        self.squares = self.squares + difference * (probabilities - self.mean)

    def map(self) -> Tensor:
        """Standard deviation over the members, of the class or region where it is largest: `(D, H, W)`, 0 to 0.5."""
        return (self.squares / self.count).sqrt().amax(dim=0)


def expected_dice(probability: Tensor, mask: Tensor) -> float:
    """The Dice that a predicted mask would have on average with a truth drawn from its probability, voxel by voxel.

    It is 2 sum(p in the mask) / (size of the mask + sum(p)), the ratio of the expected values, which is close to the
    expected ratio for masks of many voxels; and the true Dice to the extent that probabilities are calibrated. Both are
    `(D, H, W)`; NaN where there is neither a mask nor any probability.
    """
    both = float((probability * mask).sum(dtype=torch.float64))
    sizes = float(mask.sum()) + float(probability.sum(dtype=torch.float64))
    return 2 * both / sizes if sizes else math.nan
