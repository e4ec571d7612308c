"""The stages that bring a scan to the prepared grid, in order, and what undoes each.

Arrays are `C D H W` in RAS+ (D inferior to superior, H posterior to anterior, W left to right) between the stages.
A stage changes a case in place and returns what its undoing needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from asa.data.volume import axis_codes, from_ras, spacing_of, to_ras

PERCENTILES = (0.5, 99.9)
FWHM_PER_SIGMA = 2.355  # full width at half maximum of a Gaussian in its standard deviations
ZERO_BACKGROUND = 0.01  # below this fraction of zero voxels an image is taken to have no zero background


@dataclass(frozen=True)
class PrepareSettings:
    """How scans are brought to the store.

    The foreground of a channel is its voxels other than 0. An image with (almost) no voxel at 0, like a raw
    head with noise all around, has no such background: everything is foreground.

    Args:
        normalise: "percentile" maps the 0.5 and 99.9 percentiles of the foreground to 0 and 1, clipped;
            "zscore" makes mean 0 and standard deviation 1 in the foreground. The background is 0 in both. Per
            channel.
        spacing: isotropic voxel size in mm to resample to; None keeps the scan's own grid.
        crop: "foreground" (the box of any channel's foreground, with a margin), "none", or a size, one int or
            D, H, W: a box of this size around the middle of the foreground's box, padded with 0 where it is
            larger.
        margin: voxels around the foreground's box, for crop "foreground".
    """

    normalise: str = "percentile"
    spacing: float | None = None
    crop: str | int | list[int] = "foreground"
    margin: int = 4

    def __post_init__(self) -> None:
        if self.normalise not in ("percentile", "zscore"):
            raise ValueError(f"normalise={self.normalise!r}: choose percentile or zscore")
        if self.spacing is not None and not 0.1 <= self.spacing <= 20:
            raise ValueError(f"spacing={self.spacing}: give a voxel size from 0.1 to 20 mm, or null to keep the grid")
        if self.margin < 0:
            raise ValueError(f"margin={self.margin}: give 0 or more voxels")
        if isinstance(self.crop, str):
            valid = self.crop in ("foreground", "none")
        elif isinstance(self.crop, int):
            valid = self.crop > 0
        else:
            object.__setattr__(self, "crop", list(self.crop))  # as JSON gives it back
            valid = len(self.crop) == 3 and all(isinstance(size, int) and size > 0 for size in self.crop)
        if not valid:
            raise ValueError(f"crop={self.crop!r}: choose foreground, none, a size in voxels, or three sizes D, H, W")


@dataclass
class Case:
    """A scan between stages: image and foreground (C, D, H, W), label (D, H, W), affine of (x, y, z)."""

    image: np.ndarray
    foreground: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray


def _orient(case: Case, settings: PrepareSettings) -> dict[str, Any]:
    affine, code = case.affine, axis_codes(case.affine)

    def turned(array: np.ndarray) -> np.ndarray:  # (x, y, z) of the file -> (D, H, W)
        return to_ras(array, affine)[0].transpose(2, 1, 0)

    _, case.affine, axes = to_ras(case.image[0], affine)
    case.image = np.stack([turned(channel) for channel in case.image])
    case.label = None if case.label is None else turned(case.label)
    case.foreground = _foreground(case.image)
    return {"from": code, "axes": axes}


def _undo_orient(array: np.ndarray, step: dict[str, Any], order: int) -> np.ndarray:
    return np.stack([from_ras(channel.transpose(2, 1, 0), step["axes"]) for channel in array])


def _foreground(image: np.ndarray) -> np.ndarray:
    """Bool (C, D, H, W): what is not background; see `PrepareSettings`."""
    foreground = image != 0
    for channel in foreground:
        if channel.mean() > 1 - ZERO_BACKGROUND:
            channel[:] = True
    return foreground


def _resample(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    """To isotropic voxels: trilinear, smoothed first where those are coarser; labels by largest share."""
    before = case.image.shape[1:]
    spacing = spacing_of(case.affine)[::-1]
    if settings.spacing is None or np.allclose(spacing, settings.spacing, rtol=0, atol=1e-3):
        return None
    scale = settings.spacing / spacing  # old voxels per new voxel
    shape = tuple(max(2, round(size / step)) for size, step in zip(before, scale, strict=True))
    # both grids share their centre, so that a symmetric volume stays symmetric: old = scale * new + offset
    offset = (np.array(before) - 1) / 2 - scale * (np.array(shape) - 1) / 2
    blur = np.sqrt(np.maximum(scale**2 - 1, 0)) / FWHM_PER_SIGMA
    image = np.zeros((len(case.image), *shape), np.float32)
    foreground = np.zeros(image.shape, bool)
    for number, inside in enumerate(case.foreground):
        # divided by the foreground's own share: the background stays exactly 0 and does not darken the
        # brain's rim
        share = _sample(ndimage.gaussian_filter(inside.astype(np.float32), blur), scale, offset, shape, order=1)
        total = _sample(ndimage.gaussian_filter(case.image[number], blur), scale, offset, shape, order=1)
        foreground[number] = share >= 0.5
        np.divide(total, share, out=image[number], where=foreground[number])
    case.image, case.foreground = image, foreground
    if case.label is not None:
        case.label = _resample_label(case.label, scale, offset, shape)
    case.affine = _affine_of_part(case.affine, scale, offset)
    return {"scale": scale.tolist(), "offset": offset.tolist(), "before": list(before), "shape": list(shape)}


def _undo_resample(array: np.ndarray, step: dict[str, Any], order: int) -> np.ndarray:
    scale, offset = np.array(step["scale"]), np.array(step["offset"])
    grid = (1 / scale, -offset / scale, tuple(step["before"]))
    if array.dtype.kind != "f":
        return np.stack([_resample_label(channel, *grid) for channel in array])
    return np.stack([_sample(channel, *grid, order) for channel in array])


def _sample(array: np.ndarray, scale: np.ndarray, offset: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """Read an array (D, H, W) at scale * index + offset, voxel centres at whole numbers, edges held."""
    return ndimage.affine_transform(array, scale, offset, shape, order=order, mode="nearest", prefilter=False)


def _resample_label(label: np.ndarray, scale: np.ndarray, offset: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each label's mask linearly, the largest wins: a smoother border than the nearest voxel's value."""
    result = np.zeros(shape, label.dtype)
    best = _sample((label == 0).astype(np.float32), scale, offset, shape, order=1)
    for value in np.unique(label[label > 0]):
        share = _sample((label == value).astype(np.float32), scale, offset, shape, order=1)
        result[share > best] = value
        np.maximum(best, share, out=best)
    return result


def _normalise(case: Case, settings: PrepareSettings) -> dict[str, Any]:
    used: dict[str, list[float]] = (
        {"low": [], "high": []} if settings.normalise == "percentile" else {"mean": [], "sd": []}
    )
    for channel, inside in zip(case.image, case.foreground, strict=True):
        values = channel[inside]
        if values.size == 0 or values.min() == values.max():
            raise ValueError("an image is empty or constant; look at it, and leave the case out")
        if settings.normalise == "percentile":
            low, high = (float(value) for value in np.percentile(values, PERCENTILES))
            if high <= low:
                raise ValueError(f"the {PERCENTILES} percentiles of an image are equal ({low:g}); look at it")
            channel[inside] = np.clip((values - low) / (high - low), 0, 1)
            used["low"].append(low)
            used["high"].append(high)
        else:
            mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
            channel[inside] = (values - mean) / sd
            used["mean"].append(mean)
            used["sd"].append(sd)
        channel[~inside] = 0
    return {"method": settings.normalise, **used}


def _crop(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if settings.crop == "none":
        return None
    before = case.image.shape[1:]
    anywhere = np.asarray(case.foreground.any(axis=0))
    box = ndimage.find_objects(anywhere.astype(np.uint8))[0]
    if settings.crop == "foreground":
        start = [max(0, side.start - settings.margin) for side in box]
        stop = [min(total, side.stop + settings.margin) for side, total in zip(box, before, strict=True)]
        size = [last - first for first, last in zip(start, stop, strict=True)]
    else:
        size = [settings.crop] * 3 if isinstance(settings.crop, int) else [int(side) for side in settings.crop]
        start = [(side.start + side.stop - want) // 2 for side, want in zip(box, size, strict=True)]
    step = {"start": start, "size": size, "before": list(before)}
    lost = anywhere.sum() - _cut(anywhere[None], step).sum()
    if lost:
        warnings.warn(f"the crop to {size} leaves out {lost / anywhere.sum():.1%} of the foreground", stacklevel=2)
    if case.label is not None:
        lost = (case.label > 0).sum() - (_cut(case.label[None], step) > 0).sum()
        if lost:
            warnings.warn(f"the crop to {size} leaves out {lost} labelled voxels", stacklevel=2)
        case.label = _cut(case.label[None], step)[0]
    case.image, case.foreground = _cut(case.image, step), _cut(case.foreground, step)
    case.affine = _affine_of_part(case.affine, np.ones(3), np.array(start, dtype=np.float64))
    return step


def _undo_crop(array: np.ndarray, step: dict[str, Any], order: int) -> np.ndarray:
    whole = np.zeros((len(array), *step["before"]), array.dtype)
    inside, part = _overlap(step)
    whole[(slice(None), *inside)] = array[(slice(None), *part)]
    return whole


def _cut(array: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    """The crop's box out of an array (C, D, H, W), 0 where the box reaches beyond it."""
    part = np.zeros((len(array), *step["size"]), array.dtype)
    inside, where = _overlap(step)
    part[(slice(None), *where)] = array[(slice(None), *inside)]
    return part


def _overlap(step: dict[str, Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where whole and crop overlap, as slices of the whole and as slices of the crop."""
    whole, part = [], []
    for start, size, total in zip(step["start"], step["size"], step["before"], strict=True):
        first, last = max(start, 0), max(start, 0, min(start + size, total))
        whole.append(slice(first, last))
        part.append(slice(first - start, last - start))
    return tuple(whole), tuple(part)


def _affine_of_part(affine: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Affine of a grid whose voxel (d, h, w) lies at scale * index + offset of the old one."""
    step = np.diag([*scale[::-1], 1.0])
    step[:3, 3] = offset[::-1]
    return affine @ step


@dataclass(frozen=True)
class Stage:
    """A step of the preparation.

    Args:
        name: as it stands in the chain.
        apply: changes the case in place; returns JSON-able parameters, or None where there was nothing to do.
        undo: (array (C, ...), parameters, order) -> array before this stage; None where the grid stays as it
            is.
    """

    name: str
    apply: Callable[[Case, PrepareSettings], dict[str, Any] | None]
    undo: Callable[[np.ndarray, dict[str, Any], int], np.ndarray] | None = None


# In this order. What works on the whole head (bias field, skull strip, registration) belongs after `orient`.
STAGES = (
    Stage("orient", _orient, _undo_orient),
    Stage("resample", _resample, _undo_resample),
    Stage("normalise", _normalise),
    Stage("crop", _crop, _undo_crop),
)
