"""How certain a segmentation is: maps of entropy or spread, and the Dice that its probabilities let expect.

Letters: probabilities `K D H W` of K exclusive classes (background first), or `R D H W` of R nested regions.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa.data.io.nifti import Volume, write_image
from asa.data.preprocessing.pipeline import to_native


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

    It is 2 sum(p in the mask) / (size of the mask + sum(p)): the ratio of the expected values, which is close to the
    expected ratio for masks of many voxels. It is the true Dice to the extent that probabilities are calibrated. Both
    are `(D, H, W)`; NaN where there is neither a mask nor any probability.
    """
    both = float((probability * mask).sum(dtype=torch.float64))
    sizes = float(mask.sum()) + float(probability.sum(dtype=torch.float64))
    return 2 * both / sizes if sizes else math.nan
