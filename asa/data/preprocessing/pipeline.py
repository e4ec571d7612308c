"""One scan through all stages in memory, and results back to the grid of the scan."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asa.data.io.nifti import Volume, check_same_geometry, spacing_of, to_ras
from asa.data.preprocessing.midsagittal import MidsagittalPlane, bent_distances
from asa.data.preprocessing.resampling import sample_affine
from asa.data.preprocessing.settings import PrepareSettings
from asa.data.preprocessing.steps import STAGES, Case, measure_quality
from asa.data.store import read_box
from asa.ops.labels import IGNORED


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

    Returns:
        Arrays on the prepared grid, with the chain of steps that is undone for the way back.

    Raises:
        ImportError: a stage needs a package that is not installed.
        ValueError: channels or label on different grids, an undeclared label value, no channel, or a stage that fails.
    """
    present = {channel: volume for channel, volume in images.items() if volume is not None}
    if not present:
        raise ValueError(f"{name}: has none of the channels {', '.join(images)}")
    first, *others = present
    reference = present[first]
    for channel in others:
        check_same_geometry(reference, present[channel], f"{first} and {channel} of {name}")
    indices = None
    if label is not None:
        check_same_geometry(reference, label, f"{first} and label of {name}")
        indices = stored_indices(label.data, labels, ignored, name)[None]
    zeros = np.zeros(reference.data.shape, np.float32)
    stacked = np.stack([zeros if volume is None else volume.data for volume in images.values()]).astype(np.float32)
    numbers = tuple(number for number, volume in enumerate(images.values()) if volume is not None)
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
    """Resample a result from the prepared grid to the grid of the scan.

    Args:
        array: (C, D, H, W), float (probabilities; take the argmax afterwards) or integer (labels). Of a scan that was
            resampled, floats are resampled trilinearly, and integers by `sample_label`.
        chain: of the prepared case.

    Returns:
        (C, x, y, z) in the axes of the file; 0 outside the crop.

    Raises:
        ValueError: the array does not fit the chain.
    """
    expected = _prepared_shape(chain)
    if array.ndim != 4 or array.shape[1:] != expected:
        raise ValueError(f"to_native: array of shape {array.shape} is not (C, D, H, W) with D, H, W = {expected}")
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


def distance_to_the_right(chain: dict[str, Any], paired: np.ndarray) -> np.ndarray:
    """`bent_distances` of a prepared case, by its chain: mm, float32 (D, H, W), positive on the right.

    They are smooth, so that `to_native` gives those of the scan's own voxels.

    Raises:
        ValueError: the chain has no plane, since none was found or the store is older than planes in it.
    """
    plane = plane_of(chain)
    if plane is None:
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


def _prepared_shape(chain: dict[str, Any]) -> tuple[int, ...]:
    """(D, H, W) of the prepared grid, from the last step that changed it."""
    shape = [0, 0, 0]
    for total, (axis, _) in zip(chain["shape"], chain["steps"][0]["axes"], strict=True):  # of orient
        shape[2 - axis] = total
    for step in chain["steps"]:
        shape = step.get("size", step.get("shape", shape))  # of crop, of align
    return tuple(shape)


def stored_indices(label: np.ndarray, labels: Mapping[int, str], ignored: Sequence[int], name: str) -> np.ndarray:
    """Class indices of label values: 0 and the declared values become uint8 0, 1, 2, ..., ignored ones `IGNORED`.

    Args:
        label: values, any shape.
        labels: declared values -> names.
        ignored: values that count neither in a loss nor in a score.
        name: of the case, for the ValueError about any other value.
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
