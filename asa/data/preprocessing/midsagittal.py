"""The mid-sagittal plane of a head, found by comparing the volume with its own mirror image.

Arrays are (D, H, W): inferior to superior, posterior to anterior, left to right. Points are offsets from the volume's
centre in mm, in the same order. A mirror shows yaw, roll and a shift to the side; pitch and the other shifts it cannot.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage, optimize
from torch import Tensor
from torch.nn import functional as F

from asa.data.preprocessing.resampling import Lengths

WORKING_SPACING = 3.0  # mm: a second for a head, and still a few hundredths of a millimetre in the result
SEARCHED = 24.0  # degrees of yaw and roll, and the search widens this by following the slope
LARGEST = 45.0  # degrees: a plane beyond is none
SMALLEST = 24.0  # mm a side, below which there is nothing to compare
SMOOTHING = 0.8  # standard deviation in working voxels: what is left can be interpolated linearly
CONTRAST = 99.5  # percentile that intensities are clipped at: vessels and fat are bright and less symmetric


@dataclass(frozen=True)
class MidsagittalPlane:
    """Where the plane lies in a volume.

    Args:
        yaw: degrees that the head is turned about the inferior-superior axis; positive turns the nose to the left.
        roll: degrees that it is tilted about the posterior-anterior axis; positive tilts the top to the left.
        shift: mm from the volume's centre to the plane, along its normal; positive to the right.
        correlation: of the aligned volume with its mirror image, at most 1.
    """

    yaw: float
    roll: float
    shift: float
    correlation: float

    def pose(self) -> np.ndarray:
        """The rigid map (4, 4) from the aligned volume to this one: points (d, h, w) as offsets in mm."""
        pose = np.eye(4)
        pose[:3, :3] = _rotation(torch.tensor([self.yaw, self.roll], dtype=torch.float64)).numpy()
        pose[:3, 3] = pose[:3, 2] * self.shift
        return pose

    def seen_from(self, centre: np.ndarray) -> MidsagittalPlane:
        """The same plane relative to another centre, which lies (d, h, w) mm from this one."""
        normal = self.pose()[:3, 2]
        return replace(self, shift=self.shift - float(normal @ centre))

    @property
    def angle(self) -> float:
        """Degrees between the plane's normal and the left-right axis."""
        return float(np.degrees(np.arccos(np.clip(self.pose()[2, 2], -1, 1))))


def find_midsagittal_plane(volume: np.ndarray, spacing: Lengths) -> MidsagittalPlane:
    """Find the plane about which a head is most like its mirror image.

    The correlation of the volume, brought upright by yaw, roll and shift, with its own flip is searched on a coarse
    grid of angles and then climbed from there, at 3 mm (midway alignment, as in SA-Swin, MICCAI 2024). Both halves of
    the comparison are interpolated alike, so that interpolation does not favour any pose.

    Args:
        volume: (D, H, W), any intensities; background of any kind.
        spacing: voxel size in mm along D, H, W.

    Returns:
        The plane; 0, 0, 0 for a volume that is symmetric as it is.

    Raises:
        ValueError: constant, too small to have sides, or without a plane within 45 degrees.
    """
    if not has_sides(volume, spacing):
        raise ValueError(
            f"a volume of {' x '.join(map(str, volume.shape))} voxels of "
            f"{' x '.join(f'{side:g}' for side in spacing)} mm is too small or too flat to find its mid-sagittal plane"
        )
    fine = _coarser(volume, spacing, WORKING_SPACING)
    coarse = ndimage.zoom(ndimage.gaussian_filter(fine, 1.0), 0.5, order=1, grid_mode=True, mode="nearest")
    mirrors = _Mirror(coarse, 2 * WORKING_SPACING), _Mirror(fine, WORKING_SPACING)
    place = _search(mirrors[0])
    for mirror in mirrors:
        place, correlation = _climb(mirror, place)
    yaw, roll, shift = (float(number) + 0.0 for number in place)
    plane = MidsagittalPlane(yaw, roll, shift, correlation)
    if plane.angle > LARGEST:
        raise ValueError(
            f"no mid-sagittal plane within {LARGEST:g} degrees of where the header has it; check its orientation"
        )
    return plane


def has_sides(volume: np.ndarray, spacing: Lengths) -> bool:
    """Whether a volume (D, H, W) is large and varied enough to be compared with its mirror image."""
    sides = np.array(volume.shape) * np.asarray(spacing)
    return bool(sides.min() >= SMALLEST and volume.min() < volume.max())


def _coarser(volume: np.ndarray, spacing: Lengths, wanted: float) -> np.ndarray:
    """The volume on isotropic voxels around the same centre, smoothed, clipped, in [0, 1]."""
    step = wanted / np.asarray(spacing, dtype=np.float64)
    shape = np.maximum(1, np.round(np.array(volume.shape) / step)).astype(int)
    high = np.percentile(volume, CONTRAST)
    low = float(volume.min())
    clipped = np.clip((volume.astype(np.float32) - low) / max(float(high) - low, 1e-12), 0, 1)
    smooth = ndimage.gaussian_filter(clipped, SMOOTHING * step, truncate=3)
    offset = (np.array(volume.shape) - 1) / 2 - step * (shape - 1) / 2
    return ndimage.affine_transform(smooth, step, offset, tuple(shape), order=1, mode="nearest")


def _rotation(angles: Tensor) -> Tensor:
    """Rotation (..., 3, 3) of (d, h, w) by yaw and roll in degrees (..., 2): roll first, then yaw."""
    yaw, roll = torch.deg2rad(angles).unbind(-1)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = [one, zero, zero, zero, yaw.cos(), yaw.sin(), zero, -yaw.sin(), yaw.cos()]
    tilt = [roll.cos(), zero, roll.sin(), zero, one, zero, -roll.sin(), zero, roll.cos()]
    about_d, about_h = (torch.stack(rows, -1).unflatten(-1, (3, 3)) for rows in (turn, tilt))
    return about_d @ about_h


class _Mirror:
    """Correlation of a volume under a pose with its flip, as a function of yaw, roll (degrees) and shift (mm).

    It is taken over pairs of mirrored points, one pair a voxel of the right half at a random place in it: on a regular
    grid the blur of linear interpolation would change with the pose, and pull at it by a degree.
    """

    def __init__(self, volume: np.ndarray, spacing: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.volume = torch.from_numpy(volume.astype(np.float64))
        self.reach = (torch.tensor(volume.shape, dtype=torch.float64) - 1) / 2 * spacing  # mm to the outer voxels
        depth, height, width = volume.shape
        places = torch.cartesian_prod(torch.arange(depth), torch.arange(height), torch.arange((width + 1) // 2))
        jitter = torch.rand(places.shape, generator=generator, dtype=torch.float64) - 0.5
        right = (places + jitter) * spacing - self.reach * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        self.points = torch.stack([right, right * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)])  # 2 N 3, mm
        self.both = torch.stack([self.volume, torch.ones_like(self.volume)])[None]

    def __call__(self, place: Tensor) -> Tensor:
        rotation = _rotation(place[:2])
        moved = (self.points + place[2] * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)) @ rotation.T
        grid = (moved / self.reach).flip(-1)[None, None]  # grid_sample wants x (W) first
        value, inside = F.grid_sample(self.both, grid, align_corners=True)[0, :, 0]
        weight = inside[0] * inside[1]
        mean = (weight * value).sum() / (2 * weight.sum()).clamp_min(1e-9)
        one, other = value - mean
        spread = (weight * (one.square() + other.square())).sum() / 2
        return (weight * one * other).sum() / spread.clamp_min(1e-12)


def _search(mirror: _Mirror) -> np.ndarray:
    """The best of a grid of angles, each at the shift of the centre of mass and at none."""
    mass = ndimage.center_of_mass(mirror.volume.numpy())
    offset = (np.array(mass) - (np.array(mirror.volume.shape) - 1) / 2) * WORKING_SPACING * 2
    angles = np.linspace(-SEARCHED, SEARCHED, 7)
    best, place = -np.inf, np.zeros(3)
    # The upright pose first: among equals it stays.
    for yaw, roll in sorted(itertools.product(angles, angles), key=lambda pair: abs(pair[0]) + abs(pair[1])):
        normal = _rotation(torch.tensor([yaw, roll], dtype=torch.float64))[:, 2].numpy()
        for shift in (0.0, float(normal @ offset)):
            found = float(mirror(torch.tensor([yaw, roll, shift], dtype=torch.float64)))
            if found > best + 1e-9:
                best, place = found, np.array([yaw, roll, shift])
    return place


def _climb(mirror: _Mirror, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Follow the slope of the correlation to its top."""

    def loss(place: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        value = -mirror(point)
        value.backward()
        assert point.grad is not None
        return float(value.detach()), point.grad.numpy()

    found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-6, "maxiter": 60})
    return found.x, -float(found.fun)
