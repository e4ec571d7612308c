"""The grid that a scan is brought to: its own, isotropic, the template's, or one centred on the mid-sagittal plane.

Arrays are (D, H, W) in RAS+ axes. However many of these are asked for, the scan is interpolated once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from asa.data.io.nifti import spacing_of
from asa.data.preprocessing.midsagittal import WORKING_SPACING, MidsagittalPlane, find_midsagittal_plane, has_sides
from asa.data.preprocessing.registration import FIELD, register_to_template, template_overlap
from asa.data.preprocessing.resampling import Lengths, grid_map, sample_image

POOR_OVERLAP = 0.9  # Dice with the template's brain; below it a registration is said to be doubtful


@dataclass(frozen=True)
class Alignment:
    """Where a scan goes, and what was found on the way.

    Args:
        matrix: (4, 4), voxel (d, h, w) of the new grid to voxel of the scan's; None: the scan keeps its grid.
        shape: of the new grid.
        affine: (4, 4) of the new grid, voxel (x, y, z) to mm: of the template's space after registration, else of the
            scanner's.
        found: the mid-sagittal plane before it was made the middle, relative to the centre of the scan's grid (of the
            template's field after registration); None for a volume too small to have one.
        overlap: Dice of the registered brain and the template's; None without registration.
    """

    matrix: np.ndarray | None
    shape: tuple[int, ...]
    affine: np.ndarray
    found: MidsagittalPlane | None
    overlap: float | None = None


def align(
    image: np.ndarray, inside: np.ndarray, affine: np.ndarray, *, spacing: float | None, register: bool, midway: bool
) -> Alignment:
    """Find the grid for a scan.

    Args:
        image: (D, H, W) float32, the channel to go by.
        inside: bool, its foreground.
        affine: (4, 4) of its (x, y, z) axes.
        spacing: isotropic voxel size in mm; None keeps the scan's, and takes 1 mm with `register`.
        register: affine registration to the template.
        midway: make the mid-sagittal plane the middle of the grid.

    Raises:
        ImportError: a package of the `prepare` extra is missing.
        ValueError: no registration, or no plane where one is needed.
    """
    own = spacing_of(affine)[::-1]
    if register:
        return _onto_template(image, inside, affine, spacing or 1.0, midway)
    found = _plane(np.where(inside, image, 0), own, needed=midway)
    step = own if spacing is None else np.full(3, float(spacing))
    if midway:
        assert found is not None
        pose = found.pose()
        shape = _covering(inside, pose, own, step)
    elif np.allclose(step, own, rtol=0, atol=1e-3):
        return Alignment(None, image.shape, affine, found)
    else:
        shape = tuple(max(2, round(size * old / new)) for size, old, new in zip(image.shape, own, step, strict=True))
        pose = np.eye(4)
        pose[:3, 3] = _onto_corner(inside, own, shape, step)
    matrix = grid_map(pose, shape, step, image.shape, own)
    return Alignment(matrix, shape, affine @ _xyz(matrix), found)


def _onto_template(
    image: np.ndarray, inside: np.ndarray, affine: np.ndarray, spacing: float, midway: bool
) -> Alignment:
    if inside.all():
        warnings.warn("registration to a brain, and the skull is still there; set strip", stacklevel=3)
    own = spacing_of(affine)[::-1]
    pose = register_to_template(np.where(inside, image, 0), own, _turn(affine))
    overlap = template_overlap(inside, pose, own)
    if overlap < POOR_OVERLAP:
        warnings.warn(
            f"registered, the brain overlaps the template's by a Dice of {overlap:.2f} only; look at it", stacklevel=3
        )
    low, high = (np.array(edge) for edge in zip(*FIELD, strict=True))
    middle = np.eye(4)
    middle[:3, 3] = (low + high) / 2
    pose = pose @ middle  # from points relative to the field's centre

    def fitting(step: float) -> tuple[tuple[int, ...], np.ndarray]:
        depth, height, width = (int(size) for size in np.round((high - low) / step))
        shape = (depth, height, width + width % 2)  # even: the middle lies between two voxels, as in an even crop
        return shape, grid_map(pose, shape, (step,) * 3, image.shape, own)

    shape, matrix = fitting(WORKING_SPACING)
    found = _plane(sample_image(image, inside, matrix, shape)[0], (WORKING_SPACING,) * 3, needed=midway)
    if midway:
        assert found is not None
        pose = pose @ found.pose()
    shape, matrix = fitting(spacing)
    target = np.diag([spacing, spacing, spacing, 1.0])
    target[:3, 3] = ((low + high) / 2 - spacing * (np.array(shape) - 1) / 2)[::-1]
    return Alignment(matrix, shape, target, found, overlap)


def _plane(image: np.ndarray, spacing: Lengths, *, needed: bool) -> MidsagittalPlane | None:
    if needed:
        return find_midsagittal_plane(image, spacing)
    if not has_sides(image, spacing):
        return None
    try:
        return find_midsagittal_plane(image, spacing)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=3)
        return None


def _onto_corner(inside: np.ndarray, own: np.ndarray, shape: tuple[int, ...], step: np.ndarray) -> np.ndarray:
    """Shift (d, h, w) in mm, at most half a voxel, that lays the foreground's centre of mass where new voxels meet.

    Where voxels are large, a network draws thin structures otherwise on a grid that lies half a voxel further. So the
    head says where the grid lies, and not the air around it in the file.
    """
    if not inside.any():
        return np.zeros(3)
    centre = (np.array(ndimage.center_of_mass(inside)) - (np.array(inside.shape) - 1) / 2) * own / step
    place = centre + np.array(shape) / 2  # of the corner that voxel 0 begins with
    return (place - np.round(place)) * step


def _covering(inside: np.ndarray, pose: np.ndarray, own: np.ndarray, step: np.ndarray) -> tuple[int, ...]:
    """Voxels of a grid around the same centre that holds all of the foreground; even, for a middle between two."""
    box = [np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    ends = [(hit[0], hit[-1]) if len(hit) else (0, size) for hit, size in zip(box, inside.shape, strict=True)]
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3)
    points = (corners - (np.array(inside.shape) - 1) / 2) * own
    back = np.linalg.inv(pose)
    reach = np.abs(points @ back[:3, :3].T + back[:3, 3]).max(axis=0)
    return tuple(int(size) for size in 2 * (np.ceil(reach / step) + 1))


def _turn(affine: np.ndarray) -> np.ndarray:
    """Rotation from the scanner's axes (d, h, w) to the array's: the nearest one, where the affine has shear."""
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing_of(affine))
    rotation = (left @ right).T
    return rotation[::-1, ::-1]


def _xyz(matrix: np.ndarray) -> np.ndarray:
    """A map of voxels (d, h, w) as one of voxels (x, y, z)."""
    turned = np.eye(4)
    turned[:3, :3], turned[:3, 3] = matrix[:3, :3][::-1, ::-1], matrix[:3, 3][::-1]
    return turned
