"""The stages that bring a scan to the prepared grid, in order, and what undoes each.

Arrays are `C D H W` in RAS+ (D inferior to superior, H posterior to anterior, W left to right) between the stages.
A stage changes a case in place and returns what its undoing needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from asa.data.io.nifti import axis_codes, from_ras, spacing_of, to_ras
from asa.data.preprocessing.alignment import align
from asa.data.preprocessing.brain import TOOLS, brain_mask, correct_bias
from asa.data.preprocessing.midsagittal import MidsagittalPlane
from asa.data.preprocessing.resampling import sample_affine, sample_image, sample_label
from asa.data.preprocessing.template import brain_middle

PERCENTILES = (0.5, 99.9)
ZERO_BACKGROUND = 0.01  # below this fraction of zero voxels an image is taken to have no zero background
PLAUSIBLE_BRAIN = (600.0, 2300.0)  # ml
TILTED, SHIFTED = 2.0, 2.0  # degrees and mm, above which the mid-sagittal plane is said to be off


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """How scans are brought to the store. What works on whole heads, and alignment, is off by default.

    The foreground of a channel is its voxels other than 0. An image with (almost) no voxel at 0, like a raw
    head with noise all around, has no such background: everything is foreground. After skull stripping it is the
    brain mask. Where a stage looks at one channel (strip, registration, symmetry), it is the first one that the scan
    has, and the others follow.

    Args:
        bias: correct the bias field of each channel (N4).
        strip: "none"; "deepbet"; "robex"; or a command with {image} and {mask} in it, which reads a NIfTI file and
            writes the brain's mask.
        register: affine registration of the brain to the ICBM 2009a symmetric template (MNI space, 1 mm unless
            `spacing` says otherwise).
        midway: turn and shift the scan so that its mid-sagittal plane is the middle of the volume.
        normalise: "percentile" maps the 0.5 and 99.9 percentiles of the foreground to 0 and 1, clipped;
            "zscore" makes mean 0 and standard deviation 1 in the foreground. The background is 0 in both. Per
            channel.
        spacing: isotropic voxel size in mm to resample to; None keeps the scan's own grid.
        crop: "foreground" (the box of any channel's foreground, with a margin), "none", or a size, one int or
            D, H, W: a box of this size around the middle of the foreground's box, padded with 0 where it is
            larger. After registration a box of this size lies around the middle of the template's brain, so that a
            place in it is the same place in every brain. After registration or midway alignment the box is symmetric
            about the middle of the volume, so that the mid-sagittal plane stays there.
        margin: voxels around the foreground's box, for crop "foreground".
    """

    bias: bool = False
    strip: str = "none"
    register: bool = False
    midway: bool = False
    normalise: str = "percentile"
    spacing: float | None = None
    crop: str | int | list[int] = "foreground"
    margin: int = 4

    def __post_init__(self) -> None:
        for name in ("bias", "register", "midway"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose true or false")
        if self.strip not in ("none", *TOOLS) and not ("{image}" in self.strip and "{mask}" in self.strip):
            raise ValueError(
                f"strip={self.strip!r}: choose none, {', '.join(TOOLS)}, or a command with {{image}} and {{mask}} in it"
            )
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
        width = self.crop[2] if isinstance(self.crop, list) else self.crop
        if (self.register or self.midway) and isinstance(width, int) and width % 2:
            raise ValueError(f"crop={self.crop!r}: an even width keeps the mid-sagittal plane in the middle; give one")


@dataclass
class Case:
    """A scan between stages.

    Args:
        image: (C, D, H, W) float32.
        foreground: bool, of the same shape; empty for a channel that the scan lacks.
        label: (D, H, W), or None.
        affine: (4, 4) of the (x, y, z) axes.
        absent: numbers of the channels that the scan lacks.
        plane: mid-sagittal plane, relative to the centre of the grid; None before it was looked for.
        found: that plane before midway alignment made it the middle; None without.
        centred: whether the middle of the grid is meant to be that plane.
        quality: figures of merit, JSON-able.
    """

    image: np.ndarray
    foreground: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    absent: tuple[int, ...] = ()
    plane: MidsagittalPlane | None = None
    found: MidsagittalPlane | None = None
    centred: bool = False
    quality: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The channel that the others follow."""
        return next(number for number in range(len(self.image)) if number not in self.absent)

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along D, H, W."""
        return spacing_of(self.affine)[::-1]


def _orient(case: Case, settings: PrepareSettings) -> dict[str, Any]:
    affine, code = case.affine, axis_codes(case.affine)

    def turned(array: np.ndarray) -> np.ndarray:  # (x, y, z) of the file -> (D, H, W)
        return to_ras(array, affine)[0].transpose(2, 1, 0)

    _, case.affine, axes = to_ras(case.image[0], affine)
    case.image = np.stack([turned(channel) for channel in case.image])
    case.label = None if case.label is None else turned(case.label)
    case.foreground = _foreground(case.image)
    for channel in case.absent:
        case.foreground[channel] = False
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


def _bias(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if not settings.bias:
        return None
    for channel, (image, inside) in enumerate(zip(case.image, case.foreground, strict=True)):
        if channel not in case.absent:
            case.image[channel] = correct_bias(image, inside, case.spacing)
    return {"method": "n4"}


def _strip(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if settings.strip == "none":
        return None
    mask = brain_mask(settings.strip, case.image[case.first], case.affine)
    volume = float(mask.sum() * np.prod(case.spacing) / 1000)
    low, high = PLAUSIBLE_BRAIN
    if not low <= volume <= high:
        warnings.warn(f"the brain mask has {volume:.0f} ml, not {low:.0f} to {high:.0f}; look at it", stacklevel=2)
    case.image *= mask
    for channel in range(len(case.image)):
        case.foreground[channel] = mask if channel not in case.absent else False
    return {"method": settings.strip}


def _align(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    found = align(
        case.image[case.first],
        case.foreground[case.first],
        case.affine,
        spacing=settings.spacing,
        register=settings.register,
        midway=settings.midway,
    )
    case.plane = found.found
    if found.overlap is not None:
        case.quality["template_dice"] = round(found.overlap, 4)
    case.centred = settings.register or settings.midway
    if found.matrix is None:
        return None
    before, matrix, shape = case.image.shape[1:], found.matrix, found.shape
    pairs = [
        sample_image(image, inside, matrix, shape) for image, inside in zip(case.image, case.foreground, strict=True)
    ]
    kept = np.count_nonzero(pairs[case.first][1]) * abs(np.linalg.det(matrix[:3, :3]))
    lost = 1 - kept / max(np.count_nonzero(case.foreground[case.first]), 1)
    if case.centred and lost > 0.02:
        warnings.warn(f"{lost:.0%} of the foreground lies outside the new grid; look at it", stacklevel=2)
    case.image, case.foreground = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    if case.label is not None:
        case.label = sample_label(case.label, matrix, shape)
    case.affine = found.affine
    if settings.midway and found.found is not None:
        case.found, case.plane = found.found, MidsagittalPlane(0.0, 0.0, 0.0, found.found.correlation)
    return {"matrix": matrix.tolist(), "before": list(before), "shape": list(shape)}


def _undo_align(array: np.ndarray, step: dict[str, Any], order: int) -> np.ndarray:
    back, before = np.linalg.inv(step["matrix"]), step["before"]
    if array.dtype.kind != "f":
        return np.stack([sample_label(channel, back, before) for channel in array])
    return np.stack([sample_affine(channel, back, before, order) for channel in array])


def _normalise(case: Case, settings: PrepareSettings) -> dict[str, Any]:
    used: dict[str, list[float]] = (
        {"low": [], "high": []} if settings.normalise == "percentile" else {"mean": [], "sd": []}
    )
    for number, (channel, inside) in enumerate(zip(case.image, case.foreground, strict=True)):
        if number in case.absent:
            continue
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
        if case.centred:
            start[2] = min(start[2], before[2] - stop[2])
            stop[2] = before[2] - start[2]
        size = [last - first for first, last in zip(start, stop, strict=True)]
    else:
        size = [settings.crop] * 3 if isinstance(settings.crop, int) else [int(side) for side in settings.crop]
        if settings.register:
            middle = np.linalg.inv(case.affine) @ [*brain_middle(), 1]
            start = [round(place - (want - 1) / 2) for place, want in zip(middle[2::-1], size, strict=True)]
        else:
            start = [(side.start + side.stop - want) // 2 for side, want in zip(box, size, strict=True)]
        if case.centred:
            start[2] = (before[2] - size[2]) // 2
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
    moved = np.array(start) + (np.array(size) - 1) / 2 - (np.array(before) - 1) / 2  # voxels, from centre to centre
    if case.plane is not None:
        case.plane = case.plane.seen_from(moved * case.spacing)
    case.affine = case.affine.copy()
    case.affine[:3, 3] += case.affine[:3, :3] @ np.array(start)[::-1]
    return step


def judge(case: Case) -> dict[str, Any]:
    """Figures of merit of a scan that went through the stages, JSON-able, and warnings about what looks wrong."""
    brain = case.foreground[case.first]
    quality: dict[str, Any] = {"brain_ml": round(float(brain.sum() * np.prod(case.spacing) / 1000), 1)}
    if case.plane is not None:
        shown = case.found or case.plane
        quality |= {
            "yaw_degrees": round(shown.yaw, 3),
            "roll_degrees": round(shown.roll, 3),
            "shift_mm": round(shown.shift, 3),
            "mirror_correlation": round(shown.correlation, 4),
        }
        if case.plane.angle > TILTED or abs(case.plane.shift) > SHIFTED:
            warnings.warn(
                f"the mid-sagittal plane is off by yaw {shown.yaw:.1f}, roll {shown.roll:.1f} degrees and "
                f"{shown.shift:.1f} mm; the symmetric encoding rests on it: prepare.midway=true puts it in the middle",
                stacklevel=3,
            )
    return quality | case.quality


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


STAGES = (
    Stage("orient", _orient, _undo_orient),
    Stage("bias", _bias),
    Stage("strip", _strip),
    Stage("align", _align, _undo_align),
    Stage("normalise", _normalise),
    Stage("crop", _crop, _undo_crop),
)
