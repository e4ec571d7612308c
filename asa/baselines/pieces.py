"""Pieces of a volume: one from each cell of a 3 x 3 x 3 grid, at a random place inside it, and orders of them.

Letters: volume `C D H W`, 27 cells in raster order (W fastest), pieces `C d h w`.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from asa.ops.patches import triple

SIDE = 3  # cells along each axis
CELLS = SIDE**3
PLACES = np.array(list(product(range(SIDE), repeat=3)))  # of the cells, 27 3
CENTRE = CELLS // 2
ORDERS = (CELLS - 1) * CELLS  # of `distant_permutations`


def cell_size(spatial: Sequence[int]) -> tuple[int, int, int]:
    """Size of a cell of a volume in voxels; up to two voxels at the end of an axis belong to no cell."""
    d, h, w = triple(spatial)
    return d // SIDE, h // SIDE, w // SIDE


def piece_size(spatial: Sequence[int], patch_size: int, jitter: int) -> tuple[int, int, int]:
    """Size of the pieces in voxels: as many whole patches as a cell holds with `jitter` voxels to spare on each axis.

    Raises:
        ValueError: a negative jitter, or cells that hold no patch.
    """
    if type(jitter) is not int or jitter < 0:
        raise ValueError(f"method.jitter={jitter}: must be a whole number of voxels from 0")
    d, h, w = ((n - jitter) // patch_size * patch_size for n in cell_size(spatial))
    if min(d, h, w) <= 0:
        least = -(-SIDE * (patch_size + jitter) // patch_size) * patch_size
        raise ValueError(
            f"crop={list(spatial)}: a third of it holds no patch of {patch_size} voxels with {jitter} to spare: give "
            f"{least} or more along each axis, or a smaller method.jitter"
        )
    return d, h, w


def cell_corners(spatial: Sequence[int]) -> np.ndarray:
    """First voxel of each cell, `(27, 3)` int64."""
    return PLACES * np.array(cell_size(spatial))


def cut(volume: Tensor, starts: np.ndarray, size: Sequence[int]) -> Tensor:
    """Boxes of one size: volume `(C, D, H, W)` and first voxels `(P, 3)` -> `(P, C, d, h, w)`."""
    d, h, w = size
    return torch.stack([volume[:, z : z + d, y : y + h, x : x + w] for z, y, x in starts.tolist()])


def paste(pieces: Tensor, starts: np.ndarray, shape: Sequence[int]) -> Tensor:
    """The reverse of `cut`: a volume `(C, D, H, W)`, NaN outside the pieces."""
    volume = torch.full(tuple(shape), float("nan"), dtype=pieces.dtype, device=pieces.device)
    d, h, w = pieces.shape[2:]
    for piece, (z, y, x) in zip(pieces, starts.tolist(), strict=True):
        volume[:, z : z + d, y : y + h, x : x + w] = piece
    return volume


def distant_permutations(count: int) -> np.ndarray:
    """Permutations of the 27 cells, of which any two differ in at least 26 places.

    No set of more than 27 permutations has a larger Hamming distance: two of 28 have the same element in the first
    place. They are maps x -> a x + b of the field of 27 elements: two of them agree where (a - a') x = b' - b, for at
    most one x. An element is a cell's three digits of base 3, the coefficients of a polynomial modulo t^3 + 2 t + 1,
    whose root generates all a. (Noroozi and Favaro, ECCV 2016, search for distant permutations among random ones.)

    Args:
        count: of the 702 maps, evenly spaced in the order of a and b; the first is the identity.

    Returns:
        int64 `(count, 27)`, the cell in each place.

    Raises:
        ValueError: a count outside 2..702.
    """
    if type(count) is not int or not 2 <= count <= ORDERS:
        raise ValueError(f"method.permutations={count}: must be a whole number from 2 to {ORDERS}")
    times_t = np.array([[0, 1, 0], [1, 0, 1], [2, 0, 0]])  # t^3 = t + 2
    factors = [np.eye(3, dtype=np.int64)]
    while len(factors) < CELLS - 1:
        factors.append(times_t @ factors[-1] % SIDE)
    scaled = PLACES @ np.stack(factors).swapaxes(1, 2)  # 26 27 3: a, x, with the coefficients of t^2, t and 1 last
    maps = (scaled[:, None] + PLACES[:, None]) % SIDE  # 26 27 27 3: a, b, x
    table: np.ndarray = (maps @ np.array([9, 3, 1])).reshape(ORDERS, CELLS)
    return table[np.arange(count) * ORDERS // count]


def other_cells() -> np.ndarray:
    """The cell in the middle with each of the others, `(26, 2)` int64."""
    return np.array([(CENTRE, cell) for cell in range(CELLS) if cell != CENTRE])
