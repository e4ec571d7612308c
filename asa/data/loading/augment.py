"""Augmentation: draw parameters, then apply them. Spatial transforms apply to image and label alike, intensity
transforms to the image only. MONAI is imported where it is called: it takes longer than PyTorch to import.

Letters: image `C D H W`, label `1 D H W`, W left to right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asa.ops.symmetry import flip
from asa.settings import AugmentSettings

CONTRAST_PROBABILITY = 0.15  # of a change of contrast
BLUR_PROBABILITY = 0.1  # of each channel by itself
KNOTS = 32.0  # mm between the control points of smooth fields
# Below this fraction of KNOTS, displacements of control points never fold space (Choi & Lee, IEEE TVCG 2000).
UNFOLDED = 0.4
SPLINE_SD = (151 / 315) ** 1.5  # standard deviation of a cubic B-spline field, where its coefficients have 1


@dataclass(frozen=True)
class Augmentation:
    """The parameters drawn for one crop; None and empty ones have no effect."""

    matrix: Tensor | None = None  # (3, 3): offset from the centre of the crop to offset in the volume
    # Control points (3, *) of `smooth_field`, voxels along D, H, W, added to the offset before the matrix.
    displacement: Tensor | None = None
    mirror: str = ""  # axes that are flipped, like "DW"
    gamma: float = 1.0  # exponent of the intensities
    gain: float = 1.0  # factor of the intensities
    noise: float = 0.0  # standard deviation
    noise_seed: int = 0
    dropped: tuple[int, ...] = ()  # channels that are set to zero
    contrast: float = 1.0  # factor of the distances from the mean
    blur: tuple[float, ...] = ()  # standard deviation for each channel in voxels
    bias: Tensor | None = None  # control points (*) of the logarithm of a factor of the intensities
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)  # mm along D, H, W: gives the number of the fields' control points


def draw_augmentation(
    settings: AugmentSettings,
    generator: torch.Generator,
    channels: int = 1,
    size: Sequence[int] = (1, 1, 1),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    missing: Sequence[int] = (),
) -> Augmentation:
    """Draw the parameters of one crop.

    Args:
        channels: number of them in the image.
        size, spacing: of the crop (D, H, W), in voxels and in mm; rotations and smooth fields are in mm.
        missing: channels that the scan lacks, which stay 0.
    """
    draws = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
    rotate = settings.rotation > 0 and draws[0] < settings.rotation_probability
    zoom = draws[1] < settings.scale_probability and list(settings.scale) != [1.0, 1.0]
    angles = [math.radians(settings.rotation) * (2 * u - 1) if rotate else 0.0 for u in draws[2:5]]
    factor = _log_uniform(settings.scale, draws[5]) if zoom else 1.0
    change_gamma = draws[6] < settings.gamma_probability
    flipped = draws[7] < settings.mirror_probability and "W" in settings.mirror_axes
    # From a generator of their own: the draws of the settings above, and the crop's place, do not depend on these.
    more = torch.Generator().manual_seed(int(draws[11] * 2**53) + 1)
    up, front, changed, u = (float(torch.rand((), generator=more, dtype=torch.float64)) for _ in range(4))
    fields = torch.Generator().manual_seed(int(draws[11] * 2**53) + 2)
    others = [axis for axis, draw in (("D", up), ("H", front)) if draw < settings.mirror_probability]
    # Control points around the crop: along each axis three more than it has whole intervals.
    points = [int((n - 1) * mm / KNOTS) + 4 for n, mm in zip(size, spacing, strict=True)]
    return Augmentation(
        matrix=_rotation(angles, spacing) / factor if rotate or zoom else None,
        displacement=_displacement(settings, points, spacing, fields) if settings.deform else None,
        mirror="".join(axis for axis in others if axis in settings.mirror_axes) + "W" * flipped,
        gamma=_log_uniform(settings.gamma, draws[8]) if change_gamma else 1.0,
        gain=1.0 + settings.brightness * (2 * draws[9] - 1),
        noise=settings.noise * draws[10],
        noise_seed=int(draws[11] * 2**53),
        dropped=_dropped(settings.modality_dropout, channels, missing, generator),
        contrast=_log_uniform(settings.contrast, u) if changed < CONTRAST_PROBABILITY else 1.0,
        blur=_blur(settings, channels, more) if settings.blur[1] else (),
        bias=_bias(settings, points, fields) if settings.bias_field else None,
        spacing=tuple(spacing),
    )


def _displacement(
    settings: AugmentSettings, points: Sequence[int], spacing: Sequence[float], generator: torch.Generator
) -> Tensor | None:
    """Control points of a displacement in voxels, which are bounded so that it cannot fold."""
    if float(torch.rand((), generator=generator, dtype=torch.float64)) >= settings.deform_probability:
        return None
    draws = torch.randn(3, *points, generator=generator, dtype=torch.float64)
    mm = (draws * settings.deform / SPLINE_SD).clamp(-UNFOLDED * KNOTS, UNFOLDED * KNOTS)
    return mm / torch.tensor(spacing, dtype=torch.float64)[:, None, None, None]


def _bias(settings: AugmentSettings, points: Sequence[int], generator: torch.Generator) -> Tensor:
    """Control points of the logarithm of a factor, whose standard deviation is drawn from 0 to the largest."""
    strength = settings.bias_field * float(torch.rand((), generator=generator, dtype=torch.float64))
    return torch.randn(*points, generator=generator, dtype=torch.float64) * strength / SPLINE_SD


def smooth_field(points: Tensor, size: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """Values of a uniform cubic B-spline with control points every `KNOTS` mm, at all voxels of a box.

    Control points `(..., P, Q, R)`, as many as `draw_augmentation` draws for the box -> `(..., D, H, W)` float32; size
    and spacing are those of the box, in voxels and in mm.
    """
    for axis, (n, mm) in enumerate(zip(size, spacing, strict=True), start=-3):
        at = torch.arange(n, dtype=torch.float64) * mm / KNOTS
        first, t = at.long(), at.frac()
        bases = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        weights = torch.zeros(n, points.shape[axis], dtype=torch.float64)
        for k, basis in enumerate(bases):
            weights[torch.arange(n), first + k] = basis / 6
        points = (points.movedim(axis, -1).float() @ weights.T.float()).movedim(-1, axis)
    return points


def _blur(settings: AugmentSettings, channels: int, generator: torch.Generator) -> tuple[float, ...]:
    """Standard deviation of each channel, 0 for a channel that stays sharp; empty if all do."""
    draws = torch.rand(channels, 2, generator=generator, dtype=torch.float64).tolist()
    low, high = settings.blur
    widths = [low + u * (high - low) if chosen < BLUR_PROBABILITY else 0.0 for chosen, u in draws]
    return tuple(widths) if any(widths) else ()


def _dropped(probability: float, channels: int, missing: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
    """Channels that are set to zero, missing ones too; of the others one is kept, each with the same probability."""
    if not probability:
        return tuple(missing)
    draws = torch.rand(channels, generator=generator, dtype=torch.float64)
    kept = max((k for k in range(channels) if k not in missing), key=lambda k: float(draws[k]), default=None)
    return tuple(k for k in range(channels) if k in missing or (draws[k] < probability and k != kept))


def source_size(size: Sequence[int], drawn: Augmentation) -> tuple[int, ...]:
    """Size (D, H, W) of the box to read for a crop of `size` voxels, with a margin for interpolation."""
    if drawn.matrix is None and drawn.displacement is None:
        return tuple(size)
    reach = torch.tensor(size, dtype=torch.float64) / 2
    if drawn.displacement is not None:  # the spline lies between its smallest and its largest control point
        reach = reach + drawn.displacement.abs().amax(dim=(1, 2, 3))
    if drawn.matrix is not None:
        reach = drawn.matrix.abs() @ reach
    # With the parity of the crop, so that both centres coincide on the voxel grid.
    edges = reach.ceil().int() * 2 + 2
    return tuple(int(edge) + (int(edge) - n) % 2 for edge, n in zip(edges, size, strict=True))


def spatial_transform(volume: Tensor, size: Sequence[int], drawn: Augmentation, *, label: bool = False) -> Tensor:
    """Rotate, zoom, deform and flip a box of `source_size` into a crop of `size` voxels, in one interpolation.

    `(C, D, H, W)` float -> `(C, *size)`; class indices, with `label=True`, keep their type, and are read by nearest
    neighbour instead of linear interpolation.
    """
    from monai.transforms import Affine, Resample

    mode = "nearest" if label else "bilinear"
    warped: Any = volume
    if drawn.displacement is not None:
        warped = Resample(padding_mode="zeros")(volume.float(), sampling_offsets(size, drawn), mode=mode)
    elif drawn.matrix is not None:
        affine = torch.eye(4, dtype=torch.float64)
        affine[:3, :3] = drawn.matrix
        warp = Affine(affine=affine, spatial_size=tuple(size), padding_mode="zeros", image_only=True)
        warped = warp(volume.float(), mode=mode)
    volume = _plain(warped).to(volume.dtype).contiguous()
    return flip(volume, drawn.mirror) if drawn.mirror else volume


def sampling_offsets(size: Sequence[int], drawn: Augmentation) -> Tensor:
    """Where each voxel of a deformed crop is read: offsets from the centre of the box, `(3, D, H, W)` in voxels."""
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    assert drawn.displacement is not None
    offsets += smooth_field(drawn.displacement, size, drawn.spacing)
    return offsets if drawn.matrix is None else torch.einsum("ij,jdhw->idhw", drawn.matrix.float(), offsets)


def swap_sides(label: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the classes of each (left, right) pair, as a mirrored label map needs."""
    swapped = label.clone()
    for left, right in pairs:
        swapped[label == left] = right
        swapped[label == right] = left
    return swapped


def intensity_transform(image: Tensor, drawn: Augmentation) -> Tensor:
    """Blur, gamma, contrast (both within a channel's range), smooth factor, gain, noise, dropout of `(C, D, H, W)`."""
    from monai.networks.layers import gaussian_1d, separable_filtering
    from monai.transforms import AdjustContrast

    channels = list(image)
    for k, width in enumerate(drawn.blur):
        if width:
            kernel = gaussian_1d(torch.tensor(width), approx="sampled", normalize=True)
            channels[k] = separable_filtering(channels[k][None, None], [kernel] * 3, mode="replicate")[0, 0]
    for k, channel in enumerate(channels):
        if drawn.gamma != 1.0:
            channel = _plain(AdjustContrast(gamma=drawn.gamma)(channel[None]))[0]
        if drawn.contrast != 1.0:
            mean = channel.mean()
            channel = ((channel - mean) * drawn.contrast + mean).clamp(channel.min(), channel.max())
        channels[k] = channel
    image = torch.stack(channels)
    if drawn.bias is not None:
        image = image * smooth_field(drawn.bias, image.shape[1:], drawn.spacing).exp()
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
    """A plain tensor: MONAI's MetaTensor would reach the network and slow down each operation."""
    from monai.utils import convert_to_tensor

    return convert_to_tensor(array, track_meta=False)


def _log_uniform(bounds: Sequence[float], u: float) -> float:
    """A log-uniform draw between the bounds from a uniform u in [0, 1)."""
    low, high = bounds
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))


def _rotation(angles: Sequence[float], spacing: Sequence[float]) -> Tensor:
    """Rotation about the axes D, H and W by angles in radians, (3, 3) float64, of offsets in voxels of a size in mm."""
    matrix = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        about_axis = torch.eye(3, dtype=torch.float64)
        about_axis[i, i] = about_axis[j, j] = math.cos(angle)
        about_axis[i, j], about_axis[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ about_axis
    if len(set(spacing)) == 1:
        return matrix
    sizes = torch.tensor(spacing, dtype=torch.float64)
    return matrix * sizes / sizes[:, None]
