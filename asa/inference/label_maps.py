"""From network outputs to label maps on a scan's own grid.

Labels are either exclusive classes, compared by softmax, or nested regions, each with a sigmoid of its own.
Letters: K classes (background first) or R regions; prepared volumes `D H W`; native volumes `(x, y, z)` as in the
scan's file. Probabilities are resampled and compared one at a time, because a native grid may be large.
"""

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
from asa.data.preprocessing.pipeline import distance_to_the_right, to_native
from asa.inference.uncertainty import expected_dice
from asa.ops.labels import joined_sides, side_of
from asa.ops.nested import paint, painting_order


@dataclass(frozen=True)
class Outputs:
    """What the output channels of a segmentation network stand for, and how they become a label map.

    Args:
        labels: label value -> name.
        regions: name -> label values that it joins; {} for exclusive classes.
        lateral_pairs: `[left, right]` names of labels that are exchanged by mirroring.
        join_sides: the classes of each such pair have one channel, and are separated by the mid-sagittal plane.
    """

    labels: dict[int, str]
    regions: dict[str, list[int]] = field(default_factory=dict)
    lateral_pairs: Sequence[Sequence[str]] = ()
    join_sides: bool = False

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
        """Probabilities `(K or R, D, H, W)` of logits: a sigmoid per region if there are regions, else a softmax."""
        return logits.sigmoid() if self.regions else logits.softmax(dim=0)

    def native_label_map(
        self, probabilities: Tensor, chain: dict[str, Any], like: Volume, files: Sequence[Path] | None = None
    ) -> np.ndarray:
        """Resample the probabilities of a prepared scan to its own grid and choose the labels there.

        Args:
            probabilities: `(K or R, D, H, W)` on the CPU; where sides are joined, K counts a pair once.
            chain: the preprocessing steps of the scan, to be undone.
            like: the scan as it was read.
            files: where the probability of each of `names` is written; None writes none.

        Returns:
            Label values `(x, y, z)`.

        Raises:
            ValueError: sides are joined, and the scan has no mid-sagittal plane.
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
        """A class's probabilities or mask (array or tensor), 0 on the other side if it shares a channel with a partner.

        `right`: bool, the voxels right of the mid-sagittal plane; None without joined sides.
        """
        sides = {name: side for pair in self.lateral_pairs for name, side in zip(pair, (False, True), strict=True)}
        side = sides.get(self._classes[k])
        return volume if right is None or side is None else volume * (right == side)

    def label_map(
        self, probabilities: Iterable[np.ndarray], like: Volume, files: Sequence[Path] | None = None
    ) -> np.ndarray:
        """Choose the label of each voxel from probabilities on the scan's own grid.

        Args:
            probabilities: `(x, y, z)` of each of R regions, or of the K - 1 classes without the background.

        Returns:
            Label values `(x, y, z)`: the class of highest probability, or the innermost region above one half.
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
        """Write the label map of a prepared scan on the scan's own grid, with its header; returns its `volumes`.

        Arguments as of `native_label_map`; the folders of `out` and of the files exist.
        """
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
        """For each channel, the one that replaces it in the mirror image.

        Raises:
            ValueError: a label whose name contains a side and has no partner, or a region without a partner.
        """
        paired = {name for pair in self.lateral_pairs for name in pair}
        for name in self.labels.values():
            if side_of(name) and name not in paired:
                raise ValueError(
                    f"mirror=true: the name of the label {name!r} contains a side, but the checkpoint lists no partner "
                    "for it: give mirror=false, or fine-tune with data.lateral_pairs"
                )
        value_of = {name: value for value, name in self.labels.items()}
        partner = {value: value for value in (0, *sorted(self.labels))}
        for left, right in self.lateral_pairs:
            partner[value_of[left]], partner[value_of[right]] = value_of[right], value_of[left]
        if not self.regions:
            classes, channels = [list(partner).index(value) for value in partner.values()], self.channels
            return [channels[classes[channels.index(channel)]] for channel in range(max(channels) + 1)]
        sets, indices = [set(joined) for joined in self.regions.values()], []
        for name, joined in self.regions.items():
            if (others := {partner[value] for value in joined}) not in sets:
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
