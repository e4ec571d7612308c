"""The mid-sagittal plane of a head, estimated by comparing the volume with its own mirror image.

Arrays are (D, H, W): inferior to superior, posterior to anterior, left to right. Points are offsets from the centre of
the volume in mm, in the same order. The comparison determines yaw, roll and the lateral shift; it cannot determine
pitch or the other shifts.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage, optimize
from torch import Tensor
from torch.nn import functional as F

from asa.data.io.nifti import spacing_of
from asa.data.preprocessing.resampling import Lengths, affine_transform, grid_map, moved_corners, sample_affine

WORKING_SPACING = 3.0  # mm: takes a second per head, with an error of a few hundredths of a millimetre
SEARCH_RANGE = 24.0  # degrees of yaw and roll in the grid search; the gradient-based search may go further
LARGEST_ANGLE = 45.0  # degrees, beyond which no plane is returned
SMALLEST_SIDE = 24.0  # mm: smaller volumes cannot be compared with their mirror image
SMOOTHING = 0.8  # standard deviation in working voxels, enough for linear interpolation
CLIPPING = 99.5  # percentile at which intensities are clipped: vessels and fat are bright and less symmetric
BEND, BEND_STEP, BEND_GRID = 8.0, 0.5, 2.0  # mm: how far the plane is bent, in which steps, and on points how far apart
BEND_COST = 0.003  # of a bend by 1 mm, where that of a voxel that is cut is 1; grows with the square
# Coarse to fine: standard deviation in mm of the smoothing of a bend, and the cost of 1 mm from the smooth surface.
BEND_LEVELS = ((12.0, 0.005), (8.0, 0.0125), (6.0, 0.025), (4.0, 0.05), (3.0, 0.1), (2.0, 0.2))


@dataclass(frozen=True)
class MidsagittalPlane:
    """The pose of the plane in a volume."""

    yaw: float  # degrees, of the head about the inferior-superior axis; positive turns the nose to the left
    roll: float  # degrees, about the posterior-anterior axis; positive tilts the top to the left
    shift: float  # mm from the centre of the volume to the plane, along its normal; positive to the right
    correlation: float  # of the aligned volume with its mirror image, at most 1

    def pose(self) -> np.ndarray:
        """The rigid map (4, 4) from the aligned volume to this one: points (d, h, w) as offsets in mm."""
        pose = np.eye(4)
        pose[:3, :3] = _rotation(torch.tensor([self.yaw, self.roll], dtype=torch.float64)).numpy()
        pose[:3, 3] = pose[:3, 2] * self.shift
        return pose

    def relative_to(self, centre: np.ndarray) -> "MidsagittalPlane":
        """The same plane relative to another centre, at offset (d, h, w) in mm from this one."""
        normal = self.pose()[:3, 2]
        return replace(self, shift=self.shift - float(normal @ centre))

    def mapped(self, pose: np.ndarray) -> "MidsagittalPlane":
        """The plane that an affine map (4, 4) of points (d, h, w) in mm makes of this one."""
        normal = self.pose()[:3, 2] @ np.linalg.inv(pose[:3, :3])
        length = float(np.linalg.norm(normal))
        shift = (self.shift + float(normal @ pose[:3, 3])) / length
        d, h, w = normal / length
        yaw, roll = float(np.degrees(np.arctan2(h, w))), float(np.degrees(np.arcsin(d)))
        return replace(self, yaw=yaw, roll=roll, shift=shift)

    def distances(self, shape: tuple[int, ...], spacing: Lengths) -> np.ndarray:
        """Distance of each voxel of the volume from the plane in mm, float32 (D, H, W), positive on the right."""
        axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
        d, h, w = np.ix_(*(axis * part for axis, part in zip(axes, self.pose()[:3, 2], strict=True)))
        return np.asarray(d + h + w - self.shift, dtype=np.float32)

    @property
    def angle(self) -> float:
        """Degrees between the plane's normal and the left-right axis."""
        return float(np.degrees(np.arccos(np.clip(self.pose()[2, 2], -1, 1))))


def bent_distances(plane: MidsagittalPlane, paired: np.ndarray, spacing: Lengths) -> np.ndarray:
    """Distance of each voxel from the plane, bent to where it cuts the fewest voxels of paired structures.

    The longitudinal fissure of most brains is not flat: one hemisphere reaches over the middle by some millimetres. The
    bend is smooth and at most `BEND`. It minimises what the surface cuts by quadratic relaxation, from coarse to fine:
    the best offset of each point by itself, near a smooth surface, in turn with the smooth surface through these.

    Args:
        plane: relative to the centre of the volume.
        paired: bool (D, H, W), the voxels of structures of which there is one on each side.
        spacing: voxel size in mm along D, H, W.

    Returns:
        Like `MidsagittalPlane.distances`.
    """
    distances = plane.distances(paired.shape, spacing)
    half = [(n - 1) / 2 * step for n, step in zip(paired.shape, spacing, strict=True)]
    reach = np.abs(moved_corners([(-end, end) for end in half], np.linalg.inv(plane.pose()))).max(axis=0)
    steps = np.array([BEND_GRID, BEND_GRID, BEND_STEP])
    shape = 2 * np.ceil(np.array([*reach[:2], BEND]) / steps).astype(int) + 1
    to_voxels = grid_map(plane.pose(), shape, steps, paired.shape, spacing)
    offsets = (np.arange(shape[2]) - (shape[2] - 1) / 2) * BEND_STEP
    cut = ndimage.gaussian_filter1d(sample_affine(paired.astype(np.float32), to_voxels, shape), 1.0)
    bend = np.zeros(shape[:2])
    for width, coupling in BEND_LEVELS:
        width /= BEND_GRID
        cost = ndimage.gaussian_filter(cut, (width / 2, width / 2, 0)) + BEND_COST * offsets**2
        for _ in range(4):
            nearest = offsets[(cost + coupling * (offsets - bend[..., None]) ** 2).argmin(axis=2)]
            bend = ndimage.gaussian_filter(nearest, width)
    near = np.abs(distances) < BEND  # beyond, no bend changes the side
    to_points = np.linalg.inv(to_voxels)[:2]
    points = to_points[:, :3] @ np.array(near.nonzero()) + to_points[:, 3:]
    distances[near] -= ndimage.map_coordinates(bend, points, order=1, mode="nearest")
    return distances


def distance_to_the_right(chain: dict[str, Any], paired: np.ndarray) -> np.ndarray:
    """`bent_distances` of a prepared case, by its chain: mm, float32 (D, H, W), positive on the right.

    They are smooth, so that `to_native` gives those of the scan's own voxels. A chain without a plane is a ValueError.
    """
    if (plane := plane_of(chain)) is None:
        raise ValueError(
            "left and right labels are separated by the mid-sagittal plane, and none is known here: none was found in "
            "the scan, or its store is of an older release: predict the raw scan, or prepare a new store"
        )
    return bent_distances(plane, paired, spacing_of(chain["stored_affine"])[::-1])


def plane_of(chain: dict[str, Any]) -> MidsagittalPlane | None:
    """The mid-sagittal plane relative to the centre of the prepared grid; None if none is known."""
    if "plane" not in chain:
        return None
    yaw, roll, shift = chain["plane"]
    return MidsagittalPlane(yaw, roll, shift, correlation=math.nan)


def find_midsagittal_plane(volume: np.ndarray, spacing: Lengths) -> MidsagittalPlane:
    """Find the plane about which a head is most similar to its mirror image.

    The volume is aligned by yaw, roll and shift and compared with its own flip. The correlation is maximised by a
    search on a coarse grid of angles, then by BFGS, at 3 mm (midway alignment, as in SA-Swin, MICCAI 2024). Both sides
    of the comparison are interpolated in the same way, so that interpolation does not favour any pose.

    The volume (D, H, W) has any intensities and any background; one that is constant, too small, or without a plane
    within 45 degrees is a ValueError.
    """
    if not can_find_plane(volume, spacing):
        sides = " x ".join(f"{side:g}" for side in spacing)
        what = f"a volume of {' x '.join(map(str, volume.shape))} voxels of {sides} mm"
        raise ValueError(f"{what} is too small, or constant: it has no mid-sagittal plane")
    fine = _coarser(volume, spacing)
    coarse = ndimage.zoom(ndimage.gaussian_filter(fine, 1.0), 0.5, order=1, grid_mode=True, mode="nearest")
    levels = _MirrorCorrelation(coarse, 2 * WORKING_SPACING), _MirrorCorrelation(fine, WORKING_SPACING)
    pose = _grid_search(levels[0])
    for level in levels:
        pose, correlation = _maximise(level, pose)
    yaw, roll, shift = (float(number) + 0.0 for number in pose)  # never -0.0
    plane = MidsagittalPlane(yaw, roll, shift, correlation)
    if plane.angle > LARGEST_ANGLE:
        raise ValueError(
            f"no mid-sagittal plane within {LARGEST_ANGLE:g} degrees of the middle by the header; check its orientation"
        )
    return plane


def can_find_plane(volume: np.ndarray, spacing: Lengths) -> bool:
    """Whether a volume (D, H, W) is large enough, and not constant, to be compared with its mirror image."""
    sides = np.array(volume.shape) * np.asarray(spacing)
    return bool(sides.min() >= SMALLEST_SIDE and volume.min() < volume.max())


def _coarser(volume: np.ndarray, spacing: Lengths) -> np.ndarray:
    """The volume on voxels of `WORKING_SPACING` with the same centre, smoothed, clipped, in [0, 1]."""
    step = WORKING_SPACING / np.asarray(spacing, dtype=np.float64)
    shape = np.maximum(1, np.round(np.array(volume.shape) / step)).astype(int)
    low, high = np.percentile(volume, (100 - CLIPPING, CLIPPING)).tolist()
    clipped = np.clip((volume.astype(np.float32) - low) / max(high - low, 1e-12), 0, 1)
    smooth = ndimage.gaussian_filter(clipped, SMOOTHING * step, truncate=3)
    offset = (np.array(volume.shape) - 1) / 2 - step * (shape - 1) / 2
    return affine_transform(smooth, step, offset, tuple(shape), order=1, mode="nearest")


def _rotation(angles: Tensor) -> Tensor:
    """Rotation (..., 3, 3) of (d, h, w) by yaw and roll in degrees (..., 2): roll first, then yaw."""
    yaw, roll = torch.deg2rad(angles).unbind(-1)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    about_d = [one, zero, zero, zero, yaw.cos(), yaw.sin(), zero, -yaw.sin(), yaw.cos()]
    about_h = [roll.cos(), zero, roll.sin(), zero, one, zero, -roll.sin(), zero, roll.cos()]
    yaw_matrix, roll_matrix = (torch.stack(rows, -1).unflatten(-1, (3, 3)) for rows in (about_d, about_h))
    return yaw_matrix @ roll_matrix


class _MirrorCorrelation:
    """Correlation of a volume under a pose with its flip, as a function of yaw, roll (degrees) and shift (mm).

    It is computed over pairs of mirrored points, one pair per voxel of the right half at a random position in the
    voxel: on a regular grid the blur of linear interpolation would change with the pose and bias it by a degree.
    """

    def __init__(self, volume: np.ndarray, spacing: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.volume = torch.from_numpy(volume.astype(np.float64))
        self.reach = (torch.tensor(volume.shape, dtype=torch.float64) - 1) / 2 * spacing  # mm to the outer voxels
        *others, width = volume.shape
        indices = torch.cartesian_prod(*map(torch.arange, (*others, (width + 1) // 2)))
        jitter = torch.rand(indices.shape, generator=generator, dtype=torch.float64) - 0.5
        right = (indices + jitter) * spacing - self.reach * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        self.points = torch.stack([right, right * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)])  # 2 N 3, mm
        self.channels = torch.stack([self.volume, torch.ones_like(self.volume)])[None]

    def __call__(self, pose: Tensor) -> Tensor:
        rotation = _rotation(pose[:2])
        moved = (self.points + pose[2] * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)) @ rotation.T
        grid = (moved / self.reach).flip(-1)[None, None]  # grid_sample takes x (W) first
        value, inside = F.grid_sample(self.channels, grid, align_corners=True)[0, :, 0]
        weight = inside[0] * inside[1]
        mean = (weight * value).sum() / (2 * weight.sum()).clamp_min(1e-9)
        one, other = value - mean
        variance = (weight * (one.square() + other.square())).sum() / 2
        return (weight * one * other).sum() / variance.clamp_min(1e-12)


def _grid_search(correlation: _MirrorCorrelation) -> np.ndarray:
    """The best pose of a grid of angles, each with the shift of the centre of mass and without shift."""
    mass = ndimage.center_of_mass(correlation.volume.numpy())
    offset = (np.array(mass) - (np.array(correlation.volume.shape) - 1) / 2) * WORKING_SPACING * 2
    angles = np.linspace(-SEARCH_RANGE, SEARCH_RANGE, 7)
    best, pose = -np.inf, np.zeros(3)
    # Small angles first: among equal correlations the first pose is kept.
    for yaw, roll in sorted(itertools.product(angles, angles), key=lambda pair: abs(pair[0]) + abs(pair[1])):
        normal = _rotation(torch.tensor([yaw, roll], dtype=torch.float64))[:, 2].numpy()
        for shift in (0.0, float(normal @ offset)):
            value = float(correlation(torch.tensor([yaw, roll, shift], dtype=torch.float64)))
            if value > best + 1e-9:
                best, pose = value, np.array([yaw, roll, shift])
    return pose


def _maximise(correlation: _MirrorCorrelation, start: np.ndarray) -> tuple[np.ndarray, float]:
    """The pose of the nearest maximum of the correlation, and its value."""

    def loss(pose: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(pose, dtype=torch.float64, requires_grad=True)
        value = -correlation(point)
        value.backward()
        assert point.grad is not None
        return float(value.detach()), point.grad.numpy()

    found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-6, "maxiter": 60})
    return found.x, -float(found.fun)
