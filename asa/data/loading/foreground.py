"""Random voxels of the classes of a label map, drawn without looking through the volume each time."""

from collections.abc import Sequence

import numpy as np

from asa.data.store import IGNORED


class Foreground:
    """Where the classes of one label map lie: how many voxels of each there are in every slice.

    That takes one look through the volume and some kilobytes; a draw then reads the slice that it falls into. What is
    ignored is no class, nor is the background.

    Args:
        label: class indices `(1, D, H, W)` uint8, memory-mapped or not.
    """

    def __init__(self, label: np.ndarray) -> None:
        counts = np.stack([np.bincount(part.ravel(), minlength=IGNORED + 1) for part in label[0]])
        self.classes = [int(index) for index in np.flatnonzero(counts.sum(axis=0)) if 0 < index != IGNORED]
        self.reached = counts[:, self.classes].cumsum(axis=0)  # up to and with each slice: (D, classes)

    def draw(self, label: np.ndarray, draws: Sequence[float]) -> tuple[int, int, int] | None:
        """A voxel of a class: each class that is there as likely as another, and each of its voxels.

        Args:
            label: the label map again.
            draws: two numbers in [0, 1).

        Returns:
            (d, h, w), or None where there is no class.
        """
        if not self.classes:
            return None
        column = int(draws[0] * len(self.classes))
        reached = self.reached[:, column]
        number = int(draws[1] * reached[-1])
        depth = int(np.searchsorted(reached, number, side="right"))
        before = int(reached[depth - 1]) if depth else 0
        places = np.flatnonzero(label[0, depth] == self.classes[column])
        height, width = divmod(int(places[number - before]), label.shape[3])
        return depth, height, width
