"""The stages of preprocessing in order, each with its inverse: one scan through all of them, and results back.

Between the stages, arrays are `C D H W` in RAS+ (D inferior to superior, H posterior to anterior, W left to right).
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asa.data.io.formats import check_memory
from asa.data.io.nifti import Volume, axis_codes, check_same_geometry, from_ras, spacing_of, to_ras
from asa.data.preprocessing.alignment import align
from asa.data.preprocessing.brain import brain_mask, correct_bias, head_of_ct
from asa.data.preprocessing.midsagittal import MidsagittalPlane
from asa.data.preprocessing.registration import brain_centre
from asa.data.preprocessing.resampling import (
    bounding_box,
    sample_affine,
    sample_image,
    sample_label,
    sample_where_not_zero,
)
from asa.data.preprocessing.settings import PrepareSettings
from asa.data.store import read_box
from asa.ops.labels import IGNORED

PERCENTILES = (0.5, 99.9)
LARGEST_SCORE = 30.0  # SDs from the mean, above which a thousandth of the voxels or fewer decide about both
ZERO_BACKGROUND = 0.01  # below this fraction of zero voxels an image is taken to have no zero background
PLAUSIBLE_BRAIN = (600.0, 2300.0)  # ml
LARGEST_TILT, LARGEST_SHIFT = 2.0, 2.0  # degrees and mm of the mid-sagittal plane, above which a warning is given


@dataclass
class Case:
    """A scan between stages, and as it is stored or given to a network after them; quality and chain are JSON-able."""

    image: np.ndarray  # (C, D, H, W) float32; before the first stage (C, x, y, z), like the label
    foreground: np.ndarray  # bool, of the same shape; empty for a channel that the scan lacks
    label: np.ndarray | None  # (1, D, H, W) uint8, class indices (0 is background) and `IGNORED`
    affine: np.ndarray  # (4, 4) of the (x, y, z) axes
    present: tuple[int, ...] = (0,)  # indices of the channels that the scan has
    plane: MidsagittalPlane | None = None  # relative to the centre of the grid; None before it is estimated, or without
    original_plane: MidsagittalPlane | None = None  # that plane before midway alignment
    quality: dict[str, Any] = field(default_factory=dict)  # the mid-sagittal plane and figures of merit of the stages
    chain: dict[str, Any] = field(default_factory=dict)  # steps with parameters, and the affine of the last grid
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage

    @property
    def first(self) -> int:
        """Index of the reference channel, the first one that the scan has."""
        return self.present[0]

    @property
    def brain(self) -> np.ndarray:
        """(D, H, W) bool, the foreground of the reference channel."""
        return self.foreground[self.first]

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along D, H, W."""
        return spacing_of(self.affine)[::-1]


def prepare_case(
    images: Mapping[str, Volume | None],
    label: Volume | None,
    labels: Mapping[int, str],
    settings: PrepareSettings,
    *,
    ignored: Sequence[int] = (),
    name: str = "case",
) -> Case:
    """Run all stages on one scan in memory; both `asa-prepare` and `asa-predict` call this.

    Args:
        images: channel name -> volume, all on one grid; None where the scan lacks a channel, which is filled with 0.
        label: label map on the same grid, or None.
        labels, settings, ignored: as of `CohortSettings`.
        name: of the case, for messages.

    Raises:
        ImportError: a stage needs a package that is not installed.
        ValueError: channels or label on different grids, an undeclared label value, no channel, or a stage that fails.
    """
    present = {channel: volume for channel, volume in images.items() if volume is not None}
    if not present:
        raise ValueError(f"{name}: has none of the channels {', '.join(images)}")
    first, reference = next(iter(present.items()))
    for channel, volume in present.items():
        check_same_geometry(reference, volume, f"{first} and {channel} of {name}")
    indices = None
    if label is not None:
        check_same_geometry(reference, label, f"{first} and label of {name}")
        indices = stored_indices(label.data, labels, ignored, name)[None]
    zeros = np.zeros(reference.data.shape, np.float32)
    stacked = np.stack([zeros if volume is None else volume.data for volume in images.values()]).astype(np.float32)
    numbers = tuple(number for number, channel in enumerate(images) if channel in present)
    case = Case(stacked, np.zeros(0, bool), indices, reference.affine, numbers)
    case.chain = {"shape": list(reference.data.shape), "affine": reference.affine.tolist(), "steps": []}
    for stage, (apply, _) in STAGES.items():
        started = time.perf_counter()
        try:
            parameters = apply(case, settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        duration = time.perf_counter() - started
        if parameters is not None:
            case.chain["steps"].append({"stage": stage, **parameters})
        if parameters is not None or duration > 0.1:  # align may only estimate the plane
            case.seconds[stage] = duration
    case.chain["stored_affine"] = case.affine.tolist()
    if (plane := case.plane) is not None:
        case.chain["plane"] = [plane.yaw, plane.roll, plane.shift]
    case.quality = measure_quality(case)
    case.image = np.ascontiguousarray(case.image)
    case.label = None if case.label is None else np.ascontiguousarray(case.label)
    return case


def to_native(array: np.ndarray, chain: dict[str, Any]) -> np.ndarray:
    """Resample a result from the prepared grid to the grid of the scan; a ValueError if it does not fit the chain.

    Args:
        array: (C, D, H, W), float (probabilities; take the argmax afterwards) or integer (labels). Of a scan that was
            resampled, floats are resampled trilinearly, and integers by `sample_label`.
        chain: of the prepared case.

    Returns:
        (C, x, y, z) in the axes of the file; 0 outside the crop.
    """
    shape = [0, 0, 0]
    for total, (axis, _) in zip(chain["shape"], chain["steps"][0]["axes"], strict=True):  # of orient
        shape[2 - axis] = total
    for step in chain["steps"]:
        shape = step.get("size", step.get("shape", shape))  # of crop, of align
    if array.ndim != 4 or list(array.shape[1:]) != list(shape):
        raise ValueError(f"to_native: array of shape {array.shape} is not (C, D, H, W) with D, H, W = {tuple(shape)}")
    if array.dtype == np.float16:
        array = array.astype(np.float32)  # scipy does not interpolate float16
    for step in reversed(chain["steps"]):
        if (undo := STAGES[step["stage"]][1]) is not None:
            array = undo(array, step)
    return np.ascontiguousarray(array)


def to_prepared(volume: Volume, chain: dict[str, Any]) -> np.ndarray:
    """Resample a scan as it was read, with its skull, to the prepared grid: (D, H, W), trilinear."""
    array = to_ras(volume.data, volume.affine)[0].transpose(2, 1, 0).astype(np.float32)
    for step in chain["steps"]:
        if step["stage"] == "align":
            array = sample_affine(array, np.array(step["matrix"]), step["shape"])
        elif step["stage"] == "crop":
            array = read_box(array[None], step["start"], step["size"])[0]
    return array


def stored_indices(label: np.ndarray, labels: Mapping[int, str], ignored: Sequence[int], name: str) -> np.ndarray:
    """Class indices of label values: 0 and the declared values become uint8 0, 1, 2, ..., ignored ones `IGNORED`.

    Any other value is a ValueError, which begins with the name.
    """
    values = np.array([0, *sorted(labels)])
    found, counts = np.unique(label, return_counts=True)
    for value, count in zip(found, counts, strict=True):
        if value not in values and value not in ignored:
            declared = ", ".join(f"{key} {labels[key]}" for key in sorted(labels)) or "none"
            raise ValueError(
                f"{name}: label value {value} ({count} voxels) is not declared (declared: {declared}); "
                "declare it in labels or in ignored, or leave the scan out"
            )
    indices = np.searchsorted(values, label).astype(np.uint8)
    return np.where(np.isin(label, ignored), np.uint8(IGNORED), indices) if len(ignored) else indices


def _orient(case: Case, settings: PrepareSettings) -> dict[str, Any]:
    affine = case.affine

    def reoriented(array: np.ndarray) -> np.ndarray:  # (x, y, z) of the file -> (D, H, W)
        return to_ras(array, affine)[0].transpose(2, 1, 0)

    _, case.affine, axes = to_ras(case.image[0], affine)
    case.image = np.stack([reoriented(channel) for channel in case.image])
    case.label = None if case.label is None else reoriented(case.label[0])[None]
    if settings.window is not None:
        case.foreground = np.stack([head_of_ct(channel, case.spacing) for channel in case.image])
    else:
        case.foreground = case.image != 0
        for channel in case.foreground:
            if channel.mean() > 1 - ZERO_BACKGROUND:
                channel[:] = True
    return {"from": axis_codes(affine), "axes": axes}


def _undo_orient(array: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    return np.stack([from_ras(channel.transpose(2, 1, 0), step["axes"]) for channel in array])


def _bias(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if not settings.bias:
        return None
    for number in case.present:
        case.image[number] = correct_bias(case.image[number], case.foreground[number], case.spacing)
    return {"method": "n4"}


def _strip(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if settings.strip == "none":
        return None
    mask = brain_mask(settings.strip, case.image[case.first], case.affine)
    case.image *= mask
    case.foreground[list(case.present)] = mask
    return {"method": settings.strip, "ml": round(float(mask.sum() * np.prod(case.spacing) / 1000), 1)}


def _window(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if settings.window is None:
        return None
    low, high = settings.window
    case.image = np.clip((case.image - low) / (high - low), 0, 1, dtype=np.float32) * case.foreground
    return {"low": low, "high": high}


def _measure_brain(case: Case, settings: PrepareSettings) -> None:
    """Record the volume of the brain on the scan's own grid: registration would change it. Warn if it is implausible.

    Without a strip there may be a skull, so that only a volume that is too large is reported, and in CT none.
    """
    volume = float(case.brain.sum() * np.prod(case.spacing) / 1000)
    case.quality["brain_ml"] = round(volume, 1)
    low, high = PLAUSIBLE_BRAIN
    if settings.strip != "none" and not low <= volume <= high:
        warnings.warn(f"the brain mask has {volume:.0f} ml, not {low:.0f} to {high:.0f}; check it", stacklevel=3)
    elif volume > high and settings.window is None:
        warnings.warn(
            f"the foreground has {volume:.0f} ml, and a brain at most {high:.0f}: is it a head with its skull? "
            "prepare.strip=deepbet removes it",
            stacklevel=3,
        )


def _align(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    _measure_brain(case, settings)
    alignment = align(case.image[case.first], case.brain, case.affine, settings)
    case.plane = alignment.plane
    if alignment.overlap is not None:
        case.quality["template_dice"] = round(alignment.overlap, 4)
    if alignment.raw_plane is not None:
        case.quality |= {f"raw_{name}": number for name, number in _pose_of(alignment.raw_plane).items()}
    if alignment.matrix is None:
        return None
    before, matrix, shape = case.image.shape[1:], alignment.matrix, alignment.shape
    check_memory(len(case.image) * math.prod(shape), f"prepare.spacing={settings.spacing} gives a grid of {shape}")
    pairs = [sample_image(*channel, matrix, shape) for channel in zip(case.image, case.foreground, strict=True)]
    kept = np.count_nonzero(pairs[case.first][1]) * abs(np.linalg.det(matrix[:3, :3]))
    lost = 1 - kept / max(np.count_nonzero(case.brain), 1)
    if settings.centred and lost > 0.02:
        warnings.warn(f"{lost:.0%} of the foreground lies outside the new grid; check the alignment", stacklevel=2)
    case.image, case.foreground = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    if case.label is not None:
        inverse = np.linalg.inv(matrix)
        places = np.argwhere(case.label[0]) @ inverse[:3, :3].T + inverse[:3, 3]
        if left_out := np.count_nonzero(((places < -0.5) | (places > np.array(shape) - 0.5)).any(axis=1)):
            warnings.warn(f"the new grid leaves out {left_out} labelled voxels", stacklevel=2)
        case.label = sample_label(case.label[0], matrix, shape)[None]
    case.affine = alignment.affine
    if settings.midway and case.plane is not None:
        case.original_plane, case.plane = case.plane, MidsagittalPlane(0.0, 0.0, 0.0, case.plane.correlation)
    return {"matrix": matrix.tolist(), "before": list(before), "shape": list(shape)}


def _undo_align(array: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    inverse, before = np.linalg.inv(step["matrix"]), step["before"]
    if array.dtype.kind != "f":
        return np.stack([sample_label(channel, inverse, before) for channel in array])
    result = np.zeros((len(array), *before), array.dtype)
    for channel, found in zip(array, result, strict=True):
        if channel.any():
            box, values = sample_where_not_zero(channel, inverse, before)
            found[box] = values
    return result


def _normalise(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if settings.window is not None:  # scaled before the alignment, which adds the value 0 outside
        if not case.foreground[list(case.present)].any(axis=(1, 2, 3)).all():
            raise ValueError("an image is empty; check it, or leave the case out")
        case.image[~case.foreground] = 0
        return None
    names = ("low", "high") if settings.normalise == "percentile" else ("mean", "sd")
    pairs = []
    for number in case.present:
        channel, inside = case.image[number], case.foreground[number]
        values = channel[inside]
        if values.size == 0 or values.min() == values.max():
            raise ValueError("an image is empty or constant; check it, or leave the case out")
        if settings.normalise == "percentile":
            low, high = (float(value) for value in np.percentile(values, PERCENTILES))
            if high <= low:
                raise ValueError(f"the {PERCENTILES} percentiles of an image are equal ({low:g}); check it")
            channel[inside] = np.clip((values - low) / (high - low), 0, 1)
            pairs.append((low, high))
        else:
            mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
            channel[inside] = (values - mean) / sd
            pairs.append((mean, sd))
            if (largest := float(np.abs(values - mean).max()) / sd) > LARGEST_SCORE:
                warnings.warn(
                    f"a voxel is {largest:.0f} SD from the mean, which single voxels like it decide about: the rest of "
                    "the brain is nearly flat. prepare.normalise=percentile clips them; or correct the scan",
                    stacklevel=2,
                )
        channel[~inside] = 0
    return {"method": settings.normalise} | {name: [pair[k] for pair in pairs] for k, name in enumerate(names)}


def _crop(case: Case, settings: PrepareSettings) -> dict[str, Any] | None:
    if settings.crop == "none":
        return None
    before, anywhere = case.image.shape[1:], np.asarray(case.foreground.any(axis=0))
    box = bounding_box(anywhere)
    if settings.crop == "foreground":
        start = [max(0, side.start - settings.margin) for side in box]
        stop = [min(total, side.stop + settings.margin) for side, total in zip(box, before, strict=True)]
        if settings.centred:
            start[2] = min(start[2], before[2] - stop[2])
            stop[2] = before[2] - start[2]
        size = [last - first for first, last in zip(start, stop, strict=True)]
    else:
        size = [settings.crop] * 3 if isinstance(settings.crop, int) else [int(side) for side in settings.crop]
        if settings.register:
            centre = np.linalg.inv(case.affine) @ [*brain_centre(), 1]
            start = [round(middle - (edge - 1) / 2) for middle, edge in zip(centre[2::-1], size, strict=True)]
        else:
            start = [(side.start + side.stop - edge) // 2 for side, edge in zip(box, size, strict=True)]
        if settings.centred:
            start[2] = (before[2] - size[2]) // 2
    check_memory(len(case.image) * math.prod(size), f"prepare.crop={settings.crop}")
    if lost := anywhere.sum() - read_box(anywhere[None], start, size).sum():
        warnings.warn(f"the crop to {size} leaves out {lost / anywhere.sum():.1%} of the foreground", stacklevel=2)
    if case.label is not None:
        label = read_box(case.label, start, size)
        if lost := (case.label > 0).sum() - (label > 0).sum():
            warnings.warn(f"the crop to {size} leaves out {lost} labelled voxels", stacklevel=2)
        case.label = label
    case.image, case.foreground = read_box(case.image, start, size), read_box(case.foreground, start, size)
    offset = np.array(start) + (np.array(size) - 1) / 2 - (np.array(before) - 1) / 2  # voxels, from centre to centre
    if case.plane is not None:
        case.plane = case.plane.relative_to(offset * case.spacing)
    case.affine = case.affine.copy()
    case.affine[:3, 3] += case.affine[:3, :3] @ np.array(start)[::-1]
    return {"start": start, "size": size, "before": list(before)}


def _pose_of(plane: MidsagittalPlane) -> dict[str, float]:
    pose = {"yaw_degrees": plane.yaw, "roll_degrees": plane.roll, "shift_mm": plane.shift}
    return {name: round(number, 3) for name, number in pose.items()}


def _undo_crop(array: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    return read_box(array, [-first for first in step["start"]], step["before"])


def measure_quality(case: Case) -> dict[str, Any]:
    """Figures of merit of a scan after all stages, JSON-able; warns about a mid-sagittal plane that is off."""
    quality: dict[str, Any] = {"brain_ml": case.quality["brain_ml"]}
    if case.plane is not None:
        shown = case.original_plane or case.plane
        quality |= {**_pose_of(shown), "mirror_correlation": round(shown.correlation, 4)}
        if case.plane.angle > LARGEST_TILT or abs(case.plane.shift) > LARGEST_SHIFT:
            warnings.warn(
                f"the mid-sagittal plane is off by yaw {shown.yaw:.1f}, roll {shown.roll:.1f} degrees and "
                f"{shown.shift:.1f} mm; the symmetric position encoding assumes that it is the middle of the volume: "
                "prepare.midway=true aligns it",
                stacklevel=3,
            )
    return quality | case.quality


Apply = Callable[[Case, PrepareSettings], dict[str, Any] | None]
Undo = Callable[[np.ndarray, dict[str, Any]], np.ndarray]
# By the name in the chain. The first function changes a case in place, and returns JSON-able parameters, or None if
# there was nothing to do. The second returns an array (C, ...) to the grid before the stage; None if that is the same.
STAGES: dict[str, tuple[Apply, Undo | None]] = {
    "orient": (_orient, _undo_orient),
    "bias": (_bias, None),
    "strip": (_strip, None),
    "window": (_window, None),
    "align": (_align, _undo_align),
    "normalise": (_normalise, None),
    "crop": (_crop, _undo_crop),
}
