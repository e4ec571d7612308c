"""The target grid of a scan: its own, isotropic, that of the template, or one centred on the mid-sagittal plane.

Arrays are (D, H, W) in RAS+ axes. All of these are combined into one map, so that the scan is interpolated once.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from asa.data.io.nifti import spacing_of
from asa.data.preprocessing.midsagittal import WORKING_SPACING, MidsagittalPlane, can_find_plane, find_midsagittal_plane
from asa.data.preprocessing.registration import FIELD_OF_VIEW, register_to_template, template_overlap
from asa.data.preprocessing.resampling import (
    Lengths,
    bounding_box,
    grid_map,
    moved_corners,
    reversed_axes,
    sample_image,
    translation,
)
from asa.data.preprocessing.settings import PrepareSettings

POOR_OVERLAP = 0.9  # Dice with the template's brain, below which a warning is given


@dataclass(frozen=True)
class Alignment:
    """The map from a new grid to the grid of a scan."""

    matrix: np.ndarray | None  # (4, 4), voxel (d, h, w) of the new grid to voxel of the scan; None: it keeps its grid
    shape: tuple[int, ...]  # of the new grid
    affine: np.ndarray  # (4, 4) of the new grid, voxel (x, y, z) to mm of the template if registered, else the scanner
    # The mid-sagittal plane relative to the centre of the new grid; before midway alignment, to that of the scan's grid
    # (of the template's field of view after registration). None for a volume that is too small.
    plane: MidsagittalPlane | None
    overlap: float | None = None  # Dice of the registered brain and the template's
    raw_plane: MidsagittalPlane | None = None  # if registered, the plane relative to the centre of the scan's own grid


def align(image: np.ndarray, inside: np.ndarray, affine: np.ndarray, settings: PrepareSettings) -> Alignment:
    """Determine the target grid of a scan.

    The image (D, H, W) and its foreground (bool) are of the reference channel, the affine (4, 4) is of its (x, y, z)
    axes. A ValueError if registration fails, or midway alignment finds no plane.
    """
    own = spacing_of(affine)[::-1]
    if settings.register:
        return _register(image, inside, affine, settings.spacing or 1.0, settings.midway)
    plane = _plane(np.where(inside, image, 0), own, needed=settings.midway)
    step = own if settings.spacing is None else np.full(3, float(settings.spacing))
    if plane is not None and settings.midway:
        pose = plane.pose()
        shape = _covering_shape(inside, pose, own, step)
    elif np.allclose(step, own, rtol=0, atol=1e-3):
        return Alignment(None, image.shape, affine, plane)
    else:
        shape = tuple(max(2, round(size * old / new)) for size, old, new in zip(image.shape, own, step, strict=True))
        moved = _corner_shift(inside, own, shape, step)
        pose, plane = translation(moved), None if plane is None else plane.relative_to(moved)
    matrix = grid_map(pose, shape, step, image.shape, own)
    return Alignment(matrix, shape, affine @ reversed_axes(matrix), plane)


def _register(image: np.ndarray, inside: np.ndarray, affine: np.ndarray, spacing: float, midway: bool) -> Alignment:
    if inside.all():
        warnings.warn("registration to a brain, but the skull is not stripped; set prepare.strip", stacklevel=3)
    own = spacing_of(affine)[::-1]
    left, _, right = np.linalg.svd(affine[:3, :3] / own[::-1])  # the nearest rotation, if the affine has shear
    from_scanner = (left @ right).T[::-1, ::-1]
    dark = float(np.percentile(image[inside], 0.5)) if inside.any() else 0
    above = np.maximum(image - dark, -dark / 1000) if dark < 0 else image  # as for a z-scored brain: 0 is outside alone
    pose = register_to_template(np.where(inside, above, 0), own, from_scanner)
    overlap = template_overlap(inside, pose, own)
    if overlap < POOR_OVERLAP:
        poor = f"after registration the Dice with the template's brain is only {overlap:.2f}; check it"
        warnings.warn(poor, stacklevel=3)
    low, high = (np.array(edge) for edge in zip(*FIELD_OF_VIEW, strict=True))
    pose = pose @ translation((low + high) / 2)  # from points relative to the centre of the field of view

    def grid_of(step: float) -> tuple[tuple[int, ...], np.ndarray]:
        depth, height, width = (int(size) for size in np.round((high - low) / step))
        shape = (depth, height, width + width % 2)  # even: the middle lies between two voxels, as in an even crop
        return shape, grid_map(pose, shape, (step,) * 3, image.shape, own)

    shape, matrix = grid_of(WORKING_SPACING)
    plane = _plane(sample_image(image, inside, matrix, shape)[0], (WORKING_SPACING,) * 3, needed=midway)
    raw_plane = None if plane is None else plane.mapped(pose)
    if plane is not None and midway:
        pose = pose @ plane.pose()
    shape, matrix = grid_of(spacing)
    target = np.diag([spacing, spacing, spacing, 1.0])
    target[:3, 3] = ((low + high) / 2 - spacing * (np.array(shape) - 1) / 2)[::-1]
    return Alignment(matrix, shape, target, plane, overlap, raw_plane)


def _plane(image: np.ndarray, spacing: Lengths, *, needed: bool) -> MidsagittalPlane | None:
    if not (needed or can_find_plane(image, spacing)):
        return None
    try:
        return find_midsagittal_plane(image, spacing)
    except ValueError as error:
        if needed:
            raise
        warnings.warn(str(error), stacklevel=3)
        return None


def _corner_shift(inside: np.ndarray, own: np.ndarray, shape: tuple[int, ...], step: np.ndarray) -> np.ndarray:
    """Shift (d, h, w) in mm, at most half a voxel, that puts the foreground's centre of mass on a corner of new voxels.

    With large voxels, a shift of the grid by half a voxel changes how a network segments thin structures. So the grid
    is defined by the head, not by the amount of air around it in the file.
    """
    if not inside.any():
        return np.zeros(3)
    centre = (np.array(ndimage.center_of_mass(inside)) - (np.array(inside.shape) - 1) / 2) * own / step
    position = centre + np.array(shape) / 2  # in new voxels, from the outer corner of voxel 0
    return (position - np.round(position)) * step


def _covering_shape(inside: np.ndarray, pose: np.ndarray, own: np.ndarray, step: np.ndarray) -> tuple[int, ...]:
    """Shape of a grid with the same centre that contains the foreground; even, so that the middle is between voxels."""
    ends = [
        ((side.start - (size - 1) / 2) * length, (side.stop - 1 - (size - 1) / 2) * length)
        for side, size, length in zip(bounding_box(inside), inside.shape, own, strict=True)
    ]
    reach = np.abs(moved_corners(ends, np.linalg.inv(pose))).max(axis=0)
    return tuple(int(size) for size in 2 * (np.ceil(reach / step) + 1))
