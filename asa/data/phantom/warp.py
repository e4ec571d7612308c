"""Smooth random fields and diffeomorphisms for the phantom, on coarse grids that span the field of view.

Fields are (channel, d, h, w); vectors are in mm, in the order (x, y, z). The grid of a field, coarse or fine,
has its first and last voxel at the edges of the same `extent` (mm along D, H, W), so that one can be interpolated to
the other.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

STEP = 4.0  # mm between the points of a velocity field
SQUARINGS = 6


def smooth_noise(
    rng: np.random.Generator, extent: tuple[float, ...], width: float, channels: int = 1, step: float | None = None
) -> Tensor:
    """Smooth Gaussian noise with zero mean and unit SD, (channels, d, h, w) float32 on a coarse grid.

    White noise is smoothed by a Gaussian with the standard deviation `width` in mm. Points are `step` mm apart, 0.8
    widths by default.
    """
    step = step or 0.8 * width
    shape = tuple(round(side / step) + 1 for side in extent)
    sigma = width / step
    reach = int(np.ceil(3 * sigma))  # noise beyond the edges keeps their statistics
    inner = tuple(slice(reach, reach + side) for side in shape)
    fields = []
    for _ in range(channels):
        white = rng.standard_normal([side + 2 * reach for side in shape], dtype=np.float32)
        fields.append(ndimage.gaussian_filter(white, sigma, mode="constant", truncate=3)[inner])
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    unit = (np.sum((kernel / kernel.sum()) ** 2)) ** 1.5  # standard deviation after smoothing
    return torch.from_numpy(np.stack(fields) / np.float32(unit))


def to_grid(field: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A field (channel, d, h, w) on another grid over the same extent, trilinear."""
    return F.interpolate(field[None], size=shape, mode="trilinear", align_corners=True)[0]


def grid_points(shape: tuple[int, ...], extent: tuple[float, ...]) -> Tensor:
    """Points of a grid in mm from its centre, (D, H, W, 3) with x, y, z last."""
    axes = [torch.linspace(-side / 2, side / 2, size) for side, size in zip(extent, shape, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)


def sample(field: Tensor, points: Tensor, extent: tuple[float, ...]) -> Tensor:
    """Sample a field (channel, d, h, w) at points (D, H, W, 3) in mm, trilinear, with repeated edges."""
    half = torch.tensor([side / 2 for side in extent[::-1]])
    return F.grid_sample(field[None], (points / half)[None], padding_mode="border", align_corners=True)[0]


def random_velocity(rng: np.random.Generator, extent: tuple[float, ...], asymmetry: float) -> Tensor:
    """A stationary velocity field (3, d, h, w) in mm with coarse and fine variation.

    It is mirror-symmetric except for one part, whose size relative to the symmetric part is `asymmetry`.
    """
    mirror = torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1, 1)  # the x of a mirrored vector changes its sign
    parts = []
    for width, size in ((24.0, 3.2), (9.0, 1.3)):
        noise = smooth_noise(rng, extent, width, channels=6, step=STEP)
        one, other = noise.split(3)
        symmetric, other = one + mirror * one.flip(-1), other - mirror * other.flip(-1)
        parts.append(size / 2**0.5 * (symmetric + asymmetry * other))
    return parts[0] + parts[1]


def displacement_of(velocity: Tensor, extent: tuple[float, ...]) -> Tensor:
    """The displacement of the diffeomorphism of a stationary velocity, by scaling and squaring.

    Both are (3, d, h, w) in mm; the flow maps point p to p + displacement(p).
    """
    points = grid_points(tuple(velocity.shape[1:]), extent)
    flow = velocity / 2**SQUARINGS
    for _ in range(SQUARINGS):
        flow = flow + sample(flow, points + flow.permute(1, 2, 3, 0), extent)
    return flow
