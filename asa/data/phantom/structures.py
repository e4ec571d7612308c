"""Deep structures of the phantom, drawn on the template.

Arrays are (D, H, W) in RAS+ axes. Both sides of a structure have one label.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from asa.data.datasets.freesurfer import SIDED
from asa.data.preprocessing.resampling import largest_part


class Ellipsoid(NamedTuple):
    """An ellipsoid and its mirror image, in MNI mm."""

    centre: tuple[float, float, float]  # along (|x|, y, z)
    radii: tuple[float, float, float]
    slope: float = 0.0  # mm of z per mm of y along its long axis


# Drawn by eye on the template: where they lie, and whether white matter belongs to them as well as grey.
ELLIPSOIDS: dict[str, tuple[bool, tuple[Ellipsoid, ...]]] = {
    "thalamus": (True, (Ellipsoid((11, -18, 7), (10, 14, 10)),)),
    "caudate": (False, (Ellipsoid((12, 13, 6), (8, 11, 13)), Ellipsoid((15, -2, 19), (6, 16, 6)))),
    "putamen": (False, (Ellipsoid((26, 3, 1), (8, 19, 12)),)),
    "hippocampus": (False, (Ellipsoid((27, -23, -14), (9, 20, 9), slope=-0.35),)),
    "brainstem": (True, (Ellipsoid((0, -26, -30), (15, 16, 32), slope=0.35),)),
}
STRUCTURES = dict(enumerate(("ventricle", *ELLIPSOIDS), start=1))

# FreeSurfer's values on the left of the structures, and of CSF, GM and WM elsewhere.
_ASEG = np.array([0, 4, 10, 11, 12, 17, 16], np.uint8)
_ASEG_TISSUES = np.array([0, 24, 3, 2], np.uint8)


def structure_maps(fractions: np.ndarray, centre: np.ndarray) -> dict[str, np.ndarray]:
    """The structures' bool masks (D, H, W), by name, which do not overlap.

    Args:
        fractions: of CSF, GM and WM in the template, (3, D, H, W).
        centre: of its grid in MNI mm (x, y, z), with voxels of 1 mm.
    """
    csf, gm, wm = fractions
    x, y, z = _mni(csf.shape, centre)
    free = ~lateral_ventricles(csf, centre)
    maps = {"ventricle": ~free}
    for name, (with_white, ellipsoids) in ELLIPSOIDS.items():
        inside = np.zeros(csf.shape, bool)
        for (cx, cy, cz), (rx, ry, rz), slope in ellipsoids:
            height = z - cz - slope * (y - cy)
            inside |= ((abs(x) - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + (height / rz) ** 2 < 1
        maps[name] = inside & (gm + with_white * wm > 0.5) & free
        free = free & ~maps[name]
    return maps


def lateral_ventricles(csf: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Bool mask of the lateral ventricles: the largest connected region of CSF in a box around them.

    The arguments are as for `structure_maps`.
    """
    x, y, z = _mni(csf.shape, centre)
    box = (abs(x) < 40) & (y > -75) & (y < 45) & (z > -10) & (z < 32)
    lateral = largest_part((csf > 0.5) & box)
    return lateral | lateral[..., ::-1]  # the septum may separate the two


def structure_label(maps: dict[str, Tensor], brain: Tensor) -> np.ndarray:
    """Label map (D, H, W) of the values of `STRUCTURES`, from the structures' warped masks."""
    label = np.zeros(tuple(brain.shape), np.uint8)
    for value, name in STRUCTURES.items():
        label[((maps[name] > 0.5) & brain).numpy()] = value
    return label


def aseg_label(structures: np.ndarray, tissues: np.ndarray) -> np.ndarray:
    """Label map (D, H, W) of FreeSurfer's values, from those of `STRUCTURES` and of tissues (1 CSF, 2 GM, 3 WM).

    The sides are those of the middle of the volume.
    """
    left = np.where(structures > 0, _ASEG[structures], _ASEG_TISSUES[tissues])
    right = left.copy()
    for value, (other, _) in SIDED.items():
        right[left == value] = other
    middle = structures.shape[2] // 2
    return np.concatenate([left[..., :middle], right[..., middle:]], axis=2)


def _mni(shape: tuple[int, ...], centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MNI coordinates of a 1 mm grid: x (1, 1, W), y (1, H, 1), z (D, 1, 1)."""
    z, y, x = (np.arange(size) - (size - 1) / 2 for size in shape)
    return (x + centre[0])[None, None], (y + centre[1])[None, :, None], (z + centre[2])[:, None, None]
