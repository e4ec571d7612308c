"""What a preparation that only checks finds out about one scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from asa.data.preprocessing.midsagittal import MidsagittalPlane


@dataclass(frozen=True)
class Look:
    """What is drawn of a prepared scan: three slices of its first channel, RAS+ axes, on the prepared grid.

    Args:
        gray: axial (H, W), coronal (D, W) and sagittal (D, H) slice, uint8.
        brain: the same shapes, bool: the foreground or the brain mask.
        spacing: voxel size along D, H, W in mm.
        at: (d, h, w) of the slices.
        midline: the symmetry plane found, in voxels: (w at h = 0, w at h = H - 1) on the axial slice, and
            (w at d = 0, w at d = D - 1) on the coronal one. None if none was looked for.
    """

    gray: tuple[np.ndarray, np.ndarray, np.ndarray]
    brain: tuple[np.ndarray, np.ndarray, np.ndarray]
    spacing: tuple[float, float, float]
    at: tuple[int, int, int]
    midline: tuple[tuple[float, float], tuple[float, float]] | None


@dataclass(frozen=True)
class Visit:
    """One scan's row: who, what was found, what is wrong.

    Args:
        id, subject: as in the record.
        site: "" if unknown.
        reason: why it failed, "" if it did not.
        warnings: what is suspicious, a sentence each.
        facts: flat and JSON-able, like `shape` "256x256x180" or `yaw_degrees` -1.25; a key's ending is its unit
            (`_degrees`, `_mm`, `_ml`), and `seconds_STAGE` is a stage's time. Scans may have different keys.
        look: None where the scan could not be read.
    """

    id: str
    subject: str
    site: str
    reason: str
    warnings: list[str]
    facts: dict[str, Any]
    look: Look | None


def look_at(image: np.ndarray, brain: np.ndarray, spacing: np.ndarray, plane: MidsagittalPlane | None) -> Look:
    """Three slices through the middle of a brain.

    Args:
        image: (D, H, W), any intensities.
        brain: bool, not empty.
        spacing: voxel size along D, H, W in mm.
        plane: the mid-sagittal plane relative to the grid's centre.
    """
    places = [np.flatnonzero(brain.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    depth, height, width = (int(found[0] + found[-1]) // 2 for found in places)
    low, high = np.percentile(image[brain], (0.5, 99.5))
    cuts = (np.s_[depth], np.s_[:, height], np.s_[:, :, width])
    scale = 255 / max(float(high) - float(low), 1e-6)
    grays = [np.clip((image[cut].astype(np.float32) - low) * scale, 0, 255).astype(np.uint8) for cut in cuts]
    axial, coronal, sagittal = (np.array(brain[cut]) for cut in cuts)
    midline = None
    if plane is not None:
        centre = (np.array(image.shape) - 1) / 2
        normal = plane.pose()[:3, 2]

        def across(d: float, h: float) -> float:
            offset = (np.array([d, h]) - centre[:2]) * spacing[:2]
            return float((plane.shift - normal[:2] @ offset) / normal[2] / spacing[2] + centre[2])

        last = np.array(image.shape) - 1
        midline = (across(depth, 0), across(depth, last[1])), (across(0, height), across(last[0], height))
    size = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    return Look((grays[0], grays[1], grays[2]), (axial, coronal, sagittal), size, (depth, height, width), midline)
