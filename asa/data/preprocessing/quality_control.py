"""Quality control of one prepared scan: its thumbnail, and what the QC table lists about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.nifti import Volume, spacing_of
from asa.data.preprocessing.midsagittal import MidsagittalPlane
from asa.data.preprocessing.pipeline import PreparedCase, to_prepared
from asa.data.preprocessing.steps import PrepareSettings
from asa.data.store import open_array


@dataclass(frozen=True)
class Thumbnail:
    """Three slices of the first channel of a prepared scan, in RAS+ axes on the prepared grid.

    Args:
        grey: axial (H, W), coronal (D, W) and sagittal (D, H) slice, uint8.
        brain: the same shapes, bool: the foreground or the brain mask. After a strip, `grey` shows the head around it.
        spacing: voxel size along D, H, W in mm.
        at: (d, h, w) of the slices.
        midline: the mid-sagittal plane in voxels: (w at h = 0, w at h = H - 1) on the axial slice, and
            (w at d = 0, w at d = D - 1) on the coronal one. None without a plane.
    """

    grey: tuple[np.ndarray, np.ndarray, np.ndarray]
    brain: tuple[np.ndarray, np.ndarray, np.ndarray]
    spacing: tuple[float, float, float]
    at: tuple[int, int, int]
    midline: tuple[tuple[float, float], tuple[float, float]] | None


@dataclass(frozen=True)
class ScanQuality:
    """Quality control of one scan.

    Args:
        id, subject: as in the record.
        site: "" if unknown.
        reason: why the scan failed, "" if it did not.
        warnings: possible problems, one sentence each.
        facts: flat and JSON-able, like `shape` "256x256x180" or `yaw_degrees` -1.25; the ending of a key is its unit
            (`_degrees`, `_mm`, `_ml`), and `seconds_STAGE` is the duration of a stage. Keys may differ between scans.
        thumbnail: None where the scan could not be read.
    """

    id: str
    subject: str
    site: str
    reason: str
    warnings: list[str]
    facts: dict[str, Any]
    thumbnail: Thumbnail | None


def case_thumbnail(case: PreparedCase, head: Volume | None) -> Thumbnail:
    """The thumbnail of a scan that was just prepared; `head` is what a stripped brain is shown in."""
    image = case.image[case.first] if head is None else to_prepared(head, case.chain)
    return make_thumbnail(image, case.brain, case.chain, case.plane)


def stored_thumbnail(entry: dict[str, Any], root: Path, settings: PrepareSettings, head: Volume | None) -> Thumbnail:
    """The thumbnail of a scan that the store holds already; `head` is what a stripped brain is shown in."""
    image = open_array(root, entry, "image")
    assert image is not None
    first = next(channel for channel in image if channel.any())
    quality = entry["quality"]
    plane = None
    if "shift_mm" in quality:
        yaw, roll, shift = (
            0.0 if settings.midway else quality[key] for key in ("yaw_degrees", "roll_degrees", "shift_mm")
        )
        plane = MidsagittalPlane(yaw, roll, shift, quality["mirror_correlation"])
    shown = np.asarray(first) if head is None else to_prepared(head, entry["chain"])
    return make_thumbnail(shown, first != 0, entry["chain"], plane)


def make_thumbnail(
    image: np.ndarray, brain: np.ndarray, chain: dict[str, Any], plane: MidsagittalPlane | None
) -> Thumbnail:
    """Three slices through the middle of a brain.

    Args:
        image: (D, H, W), any intensities.
        brain: bool, not empty.
        chain: of the prepared case, with the affine of its grid.
        plane: the mid-sagittal plane relative to the centre of the grid.
    """
    spacing = spacing_of(np.array(chain["stored_affine"]))[::-1]  # mm along D, H, W
    extents = [np.flatnonzero(brain.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    depth, height, width = (int(found[0] + found[-1]) // 2 for found in extents)
    low, high = np.percentile(image, 0.5), np.percentile(image[brain], 99.5)
    cuts = (np.s_[depth], np.s_[:, height], np.s_[:, :, width])
    scale = 255 / max(float(high) - float(low), 1e-6)
    greys = [np.clip((image[cut].astype(np.float32) - low) * scale, 0, 255).astype(np.uint8) for cut in cuts]
    axial, coronal, sagittal = (np.array(brain[cut]) for cut in cuts)
    midline = None
    if plane is not None:
        centre = (np.array(image.shape) - 1) / 2
        normal = plane.pose()[:3, 2]

        def across(d: float, h: float) -> float:  # w of the plane at (d, h), in voxels
            offset = (np.array([d, h]) - centre[:2]) * spacing[:2]
            return float((plane.shift - normal[:2] @ offset) / normal[2] / spacing[2] + centre[2])

        last = np.array(image.shape) - 1
        midline = (across(depth, 0), across(depth, last[1])), (across(0, height), across(last[0], height))
    size = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    return Thumbnail((greys[0], greys[1], greys[2]), (axial, coronal, sagittal), size, (depth, height, width), midline)
