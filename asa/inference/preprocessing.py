"""How scans come to a trained network: brought to the grid and the intensities of its training scans."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.nifti import Volume, read_image, spacing_of, to_ras
from asa.data.preprocessing.pipeline import PreparedCase, prepare_case
from asa.data.preprocessing.steps import PrepareSettings

SPACING_TOLERANCE = 0.1  # relative; a scan whose voxels are further from those of the training scans is resampled


def learnt_from(lateral_pairs: Sequence[Sequence[str]], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says of its training scans that prediction rests on.

    Args:
        lateral_pairs: names of labels that change places in a mirror, `[left, right]`.
        records: the store's, of the training scans.

    Returns:
        "lateral_pairs", and "spacing": the smallest and the largest voxel size in mm along D, H, W.
    """
    sizes = np.array([_spacing(np.array(record["chain"]["stored_affine"])) for record in records])
    return {
        "lateral_pairs": [list(pair) for pair in lateral_pairs],
        "spacing": [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()],
    }


def _spacing(affine: np.ndarray) -> np.ndarray:
    """Voxel size in mm along D, H, W of an affine of RAS+ axes (x, y, z)."""
    return spacing_of(affine)[::-1]


class Intake:
    """Prepares scans as a checkpoint says that its training scans were.

    Args:
        path: names the checkpoint.
        data: what it says of its training scans.
        strip: how raw scans are skull-stripped, as in `PrepareSettings`; None: as the training scans were.

    Raises:
        ValueError: its scans were stripped by a command.
    """

    def __init__(self, path: str, data: Mapping[str, Any], strip: str | None) -> None:
        self.data = data
        self.channels: list[str] = data["channels"]
        prepare = PrepareSettings(**data["prepare"])
        if strip is None and "{mask}" in prepare.strip:  # a checkpoint often comes from somebody else
            raise ValueError(
                f"{path}: its scans were stripped by a command, and a checkpoint may not start one "
                f"({prepare.strip}): give strip= the command, or none for scans that are stripped"
            )
        self.settings = prepare if strip is None else replace(prepare, strip=strip)

    def prepared(self, images: Mapping[str, str | Path | None]) -> tuple[PreparedCase, Volume]:
        """A raw scan as `asa-prepare` would have brought it in, and its first channel as it was read.

        Args:
            images: file of each channel.

        Raises:
            FileNotFoundError, ValueError: unreadable files, channels that are missing or that the network does not
                know, or voxels unlike those of the training scans and no way to resample to them.
        """
        self.check_channels(images)
        volumes: dict[str, Volume | None] = {}
        for channel in self.channels:
            path = images[channel]
            if path is None:
                raise ValueError(f"no file of the channel {channel}, which this model needs")
            volumes[channel] = read_image(path)
        like = volumes[self.channels[0]]
        assert like is not None
        return prepare_case(volumes, None, {}, self._preparation(like)), like

    def check_channels(self, channels: Mapping[str, Any]) -> None:
        """Raise a ValueError unless these are the channels that the network takes."""
        if sorted(channels) != sorted(self.channels):
            raise ValueError(f"this model takes the channels {', '.join(self.channels)}, got {', '.join(channels)}")

    def check_stored(self, chain: Mapping[str, Any]) -> None:
        """Raise a ValueError for a scan of a store whose voxels are unlike those of the training scans."""
        if not self._knows(size := _spacing(np.array(chain["stored_affine"]))):
            raise ValueError(f"{self._unlike(size)}: predict the raw scan, which is resampled if that can be done")

    def _preparation(self, scan: Volume) -> PrepareSettings:
        """How to prepare a raw scan: as the training scans, resampled where it has other voxels than they had."""
        settings = self.settings
        size = _spacing(to_ras(scan.data, scan.affine)[1])
        if settings.spacing is not None or settings.register or self._knows(size):
            return settings
        low, high = np.array(self.data["spacing"])
        if high.max() > (1 + SPACING_TOLERANCE) * low.min():
            raise ValueError(f"{self._unlike(size)}: resample the scan to that, or train with prepare.spacing")
        spacing = round(float((low.mean() + high.mean()) / 2), 4)
        warnings.warn(f"{self._unlike(size)}: resampled to {spacing:g} mm, and the result back", stacklevel=4)
        return replace(settings, spacing=spacing)

    def _knows(self, size: np.ndarray) -> bool:
        """Whether voxels of this size (D, H, W) are like those of the training scans, as far as those are known."""
        if "spacing" not in self.data:  # an older checkpoint
            return True
        low, high = np.array(self.data["spacing"])
        return bool((size > (1 - SPACING_TOLERANCE) * low).all() and (size < (1 + SPACING_TOLERANCE) * high).all())

    def _unlike(self, size: np.ndarray) -> str:
        low, high = (" x ".join(f"{length:.3g}" for length in edge) for edge in self.data["spacing"])
        trained = low if low == high else f"{low} to {high}"
        shown = " x ".join(f"{length:.3g}" for length in size)
        return f"voxels of {shown} mm (up, front, right), and this model was trained on {trained}"
