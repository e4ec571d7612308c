"""Augmentation: draw parameters, then apply them. Space moves image and label alike; intensity never touches labels.

Letters: image `C D H W`, label `1 D H W`, W left to right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.transforms import AdjustContrast, Affine
from monai.utils import convert_to_tensor
from torch import Tensor


@dataclass
class AugmentSettings:
    """How training crops are varied. Angles in degrees; a probability of 0 switches a transform off."""

    rotation: float = 0.0
    "largest rotation about each axis, degrees"
    rotation_probability: float = 0.2
    "share of the crops that are rotated"
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    "smallest and largest zoom (1.4: things look 1.4 times larger)"
    scale_probability: float = 0.2
    "share of the crops that are zoomed"
    mirror_probability: float = 0.0
    "share of the crops that are mirrored left-right"
    gamma: list[float] = field(default_factory=lambda: [1.0, 1.0])
    "smallest and largest exponent of the intensities"
    gamma_probability: float = 0.3
    "share of the crops whose contrast is bent by gamma"
    noise: float = 0.0
    "largest standard deviation of added Gaussian noise, in units of the intensities"
    brightness: float = 0.0
    "largest relative change of the intensities (0.2: times 0.8 to 1.2)"
    modality_dropout: float = 0.0
    "probability that a channel of a crop is set to zero, never all of them; of no use with one channel"

    def __post_init__(self) -> None:
        for name in ("scale", "gamma"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"augment.{name} is the smallest and the largest factor, above 0, got {list(bounds)}")
        for name in ("rotation", "scale", "mirror", "gamma"):
            share = getattr(self, f"{name}_probability")
            if not 0 <= share <= 1:
                raise ValueError(f"{name}_probability={share}: a share lies between 0 and 1")
        if not 0 <= self.modality_dropout < 1:
            raise ValueError(f"augment.modality_dropout={self.modality_dropout}: give 0 or more, and less than 1")
        for name in ("rotation", "noise", "brightness"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name}={getattr(self, name)}: give 0 or more")


@dataclass(frozen=True)
class Augmentation:
    """The parameters drawn for one crop.

    `matrix` (3 x 3) maps offsets from the crop's centre to offsets in the volume, or None; `noise_seed` draws the
    noise field; `dropped` are the channels that are set to zero.
    """

    matrix: Tensor | None = None
    mirror: bool = False
    gamma: float = 1.0
    gain: float = 1.0
    noise: float = 0.0
    noise_seed: int = 0
    dropped: tuple[int, ...] = ()


def draw_augmentation(settings: AugmentSettings, generator: torch.Generator, channels: int = 1) -> Augmentation:
    """Draw the parameters of one crop of so many channels. The same state of the generator draws the same."""
    draws = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
    rotate = settings.rotation > 0 and draws[0] < settings.rotation_probability
    zoom = draws[1] < settings.scale_probability and list(settings.scale) != [1.0, 1.0]
    angles = [math.radians(settings.rotation) * (2 * u - 1) if rotate else 0.0 for u in draws[2:5]]
    factor = _log_uniform(settings.scale, draws[5]) if zoom else 1.0
    bend = draws[6] < settings.gamma_probability
    return Augmentation(
        matrix=_rotation(angles) / factor if rotate or zoom else None,
        mirror=draws[7] < settings.mirror_probability,
        gamma=_log_uniform(settings.gamma, draws[8]) if bend else 1.0,
        gain=1.0 + settings.brightness * (2 * draws[9] - 1),
        noise=settings.noise * draws[10],
        noise_seed=int(draws[11] * 2**53),
        dropped=_dropped(settings.modality_dropout, channels, generator) if settings.modality_dropout else (),
    )


def _dropped(probability: float, channels: int, generator: torch.Generator) -> tuple[int, ...]:
    """Channels that are set to zero; of those that would all be, one stays, each as likely."""
    draws = torch.rand(channels, generator=generator, dtype=torch.float64)
    return tuple(k for k in range(channels) if draws[k] < probability and k != int(draws.argmax()))


def source_size(size: Sequence[int], drawn: Augmentation) -> tuple[int, ...]:
    """The box of the volume (D, H, W) that a crop of `size` voxels reads from, with a margin for interpolation."""
    if drawn.matrix is None:
        return tuple(size)
    half = torch.tensor(size, dtype=torch.float64) / 2
    # The same parity as the crop: then both have their centre at the same place of the voxel grid.
    reach = (drawn.matrix.abs() @ half).ceil().int() * 2 + 2
    return tuple(int(r) + (int(r) - n) % 2 for r, n in zip(reach, size, strict=True))


def move(volume: Tensor, size: Sequence[int], drawn: Augmentation, *, label: bool = False) -> Tensor:
    """Rotate, zoom and mirror a box of `source_size` into a crop of `size` voxels.

    Args:
        volume: `(C, D, H, W)`, float, or class indices with `label=True`.
        size: the crop's (D, H, W).
        drawn: what was drawn.
        label: take the nearest voxel instead of interpolating.

    Returns:
        `(C, *size)` of the input's type.
    """
    if drawn.matrix is not None:
        affine = torch.eye(4, dtype=torch.float64)
        affine[:3, :3] = drawn.matrix
        warp = Affine(affine=affine, spatial_size=tuple(size), padding_mode="zeros", image_only=True)
        moved = warp(volume.float(), mode="nearest" if label else "bilinear")
        volume = _plain(moved).to(volume.dtype).contiguous()
    return volume.flip(-1) if drawn.mirror else volume


def swap_sides(label: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the classes of each left/right pair: what a mirrored label map needs."""
    swapped = label.clone()
    for left, right in pairs:
        swapped[label == left] = right
        swapped[label == right] = left
    return swapped


def recolour(image: Tensor, drawn: Augmentation) -> Tensor:
    """Change the intensities of an image `(C, D, H, W)`: gamma on each channel's own range, gain, noise, dropout."""
    if drawn.gamma != 1.0:
        bend = AdjustContrast(gamma=drawn.gamma)
        image = torch.stack([_plain(bend(channel[None]))[0] for channel in image])
    if drawn.gain != 1.0:
        image = image * drawn.gain
    if drawn.noise > 0:
        generator = torch.Generator().manual_seed(drawn.noise_seed)
        image = image + drawn.noise * torch.randn(image.shape, generator=generator)
    if drawn.dropped:
        image = image.clone()
        image[list(drawn.dropped)] = 0
    return image


def _plain(array: Any) -> Tensor:
    """MONAI's result as a plain tensor: its own type would follow into the network and slow each operation."""
    return convert_to_tensor(array, track_meta=False)


def _log_uniform(bounds: Sequence[float], u: float) -> float:
    """Between the bounds, so that halving is as likely as doubling."""
    low, high = bounds
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))


def _rotation(angles: Sequence[float]) -> Tensor:
    """Rotation about the axes D, H and W by the angles in radians, 3 x 3 float64."""
    matrix = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        turn = torch.eye(3, dtype=torch.float64)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix
