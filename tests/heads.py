"""A made-up head that is known at every point, so that it can be scanned in any pose without interpolation."""

import nibabel as nib
import numpy as np

from asa.data.io.nifti import Volume

LABELS = {2: "outer", 7: "inner"}  # not consecutive, on purpose


def head_at(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intensity and label of a head, mirror-symmetric in x, at points (..., 3) of (x, y, z) in mm: x right, y front.

    Label 2 is brain, 7 a part of it; the background is 0.
    """
    x, y, z = np.moveaxis(points, -1, 0)
    side = np.abs(x)
    width = 64 - 0.0012 * (y + 15) ** 2 - 0.06 * z
    radius = np.sqrt((x / width) ** 2 + (y / 84) ** 2 + (z / 62) ** 2)
    inner = np.sqrt(((side - 22) / 13) ** 2 + ((y - 4) / 34) ** 2 + ((z - 8) / 17) ** 2)
    texture = np.cos(side / 6 + y / 19) * np.cos(y / 8 - z / 23) * np.cos(z / 7 + side / 31)
    brightness = 500 + 120 * texture + 1.2 * y - 1.5 * z - 200 / (1 + np.exp((inner - 1) * 12))
    image = np.where(radius < 1, np.maximum(brightness, 1), 0).astype(np.float32)
    label = np.select([(inner < 1) & (radius < 1), radius < 1], [7, 2], 0).astype(np.uint8)
    return image, label


def scan(shape: tuple[int, int, int], affine: np.ndarray, pose: np.ndarray | None = None) -> tuple[Volume, Volume]:
    """The head on a grid: image and label volumes (x, y, z) as a file would hold them.

    Args:
        shape: voxels along the file's axes.
        affine: (4, 4), voxel to mm of the scanner, RAS+.
        pose: (4, 4), point of the upright head to point of the scanner, mm; None: upright.
    """
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1).astype(np.float64)
    to_head = np.linalg.inv(np.eye(4) if pose is None else pose) @ affine
    image, label = head_at(grid @ to_head[:3, :3].T + to_head[:3, 3])
    header = nib.Nifti1Image(image, affine).header
    return Volume(image, affine, header), Volume(label, affine, header)


def centred(shape: tuple[int, int, int], axes: np.ndarray) -> np.ndarray:
    """An affine whose columns of mm are given and whose volume has its centre at 0."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ (np.array(shape) - 1) / 2
    return affine


def turn(degrees: tuple[float, float, float]) -> np.ndarray:
    """Rotation about x, then y, then z."""
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[one, one] = step[other, other] = np.cos(angle)
        step[one, other], step[other, one] = -np.sin(angle), np.sin(angle)
        result = step @ result
    return result


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())
