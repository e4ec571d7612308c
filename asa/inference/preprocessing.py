"""Preprocessing of new scans: to the grid and the intensities of the network's training scans."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.config import written
from asa.data.io.nifti import Volume, identity_of, read_image, spacing_of, to_ras
from asa.data.preprocessing.pipeline import Case, prepare_case
from asa.data.preprocessing.scan import intensity_statistics
from asa.data.preprocessing.settings import PrepareSettings, differences
from asa.data.store import Store
from asa.errors import reason_of
from asa.settings import LARGEST_OVERLAP

VOLUME_TOLERANCE = 0.25  # of the training scans' smallest and largest brain, beyond which a scan is warned about
INTENSITY_TOLERANCE = 0.1  # the same of mean and SD, in units of the normalised intensities
OWN_COMMAND = "COMMAND {image} {mask}"  # in place of a skull stripping command; the user has to give one
# What an export keeps of them: no subjects.
EXPORTED = (
    *("channels", "labels", "classes", "number", "regions", "prepare", "lateral_pairs", "join_sides", "spacing"),
    *("modalities", "normalised"),
)
SEEN = ("window", "normalise", "strip", "bias", "midway", "register")  # settings of which a network sees the outcome
SPACING_TOLERANCE = 0.1  # relative difference from the training scans' voxel size above which a scan is resampled


def training_scan_metadata(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of the training scans that a checkpoint keeps for prediction, from their records in the store.

    "spacing", the smallest and the largest voxel size in mm along D, H, W; and "range", those of `scan_measures`.
    """
    sizes = np.array([voxel_size(record["chain"]["stored_affine"]) for record in records])
    spacing = [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()]
    measures = [scan_measures(record["quality"], record["intensity"]) for record in records]
    values = {name: [one[name] for one in measures if name in one] for name in measures[0]}
    return {"spacing": spacing, "range": {name: [min(found), max(found)] for name, found in values.items()}}


def scan_measures(quality: Mapping[str, Any], intensity: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What is compared between a prepared scan and the training scans: "brain_ml", "mean CHANNEL" and "sd CHANNEL".

    `intensity` holds the `intensity_statistics` of each channel; {} for one that the scan lacks.
    """
    named = {f"{name} {channel}": one[name] for channel, one in intensity.items() if one for name in ("mean", "sd")}
    return {"brain_ml": quality["brain_ml"], **named}


def prepared_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two settings of preprocessing give the same of a scan that both accept; they may differ in NaN."""
    return {**one, "nan": None} == {**other, "nan": None}


def prepared_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How scans that a network was trained on before differ from those of now in what a network sees, in words.

    Both are metadata of training scans: their `prepare`, and their "spacing" where it is known.
    """
    old, new = ({**PrepareSettings().as_json(), **data["prepare"]} for data in (before, now))
    found = [
        f"prepare.{key}={written(old.get(key))} (here {written(new.get(key))})"
        for key in SEEN
        if old.get(key) != new.get(key)
    ]
    if sizes := other_voxel_sizes(before, now):
        found.append(f"voxels of {sizes[0]} mm (here {sizes[1]})")
    return found


def other_voxel_sizes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The mean voxel size in mm of each of two metadata of training scans, in words, if they differ; else []."""
    sizes = [np.array(data.get("spacing", ())) for data in (one, other)]
    known = all(size.shape == (2, 3) for size in sizes)
    if not known or (np.abs(sizes[0] / sizes[1] - 1) <= SPACING_TOLERANCE).all():
        return []
    return [" x ".join(f"{length:.3g}" for length in size.mean(axis=0)) for size in sizes]


def check_finite(values: Any, what: str) -> None:
    """Raise a ValueError if an array or tensor is not finite: NaN would become a label or a class like any other."""
    finite = values.isfinite() if isinstance(values, torch.Tensor) else np.isfinite(values)
    if not bool(finite.all()):
        raise ValueError(f"{what} has values that are not finite: the weights, or the scan's intensities, are unusable")


def voxel_size(affine: Any) -> np.ndarray:
    """Voxel size in mm along D, H, W of an affine of RAS+ axes (x, y, z), also as a store's `chain` has it."""
    return spacing_of(affine)[::-1]


def check_metadata(path: str, data: Mapping[str, Any]) -> None:
    """Raise a ValueError for an entry of another kind than asa writes in the metadata of a checkpoint of anybody's."""
    try:
        regions = dict(data.get("regions", ()))
        for names in data["channels"], [*data.get("labels", {}).values()], [*regions], data.get("classes", []):
            if not isinstance(names, list) or len({name for name in names if isinstance(name, str)}) < len(names):
                raise ValueError(f"{names} are not different names")
        [int(value) for value in data.get("labels", {})]
        for values in regions.values():
            if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
                raise ValueError(f"a region joins {values}")
        for left, right in data.get("lateral_pairs", []):
            known = {*data["labels"].values()} if "labels" in data or data.get("join_sides") else {left, right}
            if not isinstance(left, str) or not isinstance(right, str) or not {left, right} <= known:
                raise ValueError(f"{[left, right]} is not a pair of labels")
        if not data["channels"]:
            raise ValueError("no channels")
        if not all(low <= high for low, high in data.get("range", {}).values()):
            raise ValueError(f"range={data['range']}")
        size = np.array(data.get("spacing", np.ones((2, 3))), dtype=np.float64)
        if size.shape != (2, 3) or not (size > 0).all() or not np.isfinite(size).all():
            raise ValueError(f"spacing={data['spacing']}")
        if not all(isinstance(digest, str) for digest in data.get("scans", ())):
            raise ValueError("scans are digests")
        for one in data.get("modalities", {}).values():
            check_metadata(path, one)
        if not 0 <= data.get("overlap", 0) <= LARGEST_OVERLAP:
            raise ValueError(f"overlap={data['overlap']}")
        PrepareSettings(**data["prepare"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: its metadata of the training scans is not usable ({reason_of(error)})") from None


def exported(data: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the training scans in an export: no subjects, and no command with somebody's own paths."""
    return without_command({key: data[key] for key in EXPORTED if key in data})


def without_command(data: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata with a skull stripping command replaced, which may name files of somebody's machine."""
    found, prepare = dict(data), data.get("prepare", {})
    if "modalities" in data:
        found["modalities"] = {name: without_command(one) for name, one in data["modalities"].items()}
    if "{mask}" in prepare.get("strip", ""):
        found["prepare"] = {**prepare, "strip": OWN_COMMAND}
    return found


def of_modality(path: str, data: Mapping[str, Any], channels: Collection[str] | None) -> Mapping[str, Any]:
    """The metadata of the training scans with these channels, where they are of several modalities; else `data`.

    A ValueError for several modalities, of which the channels are none; it names the checkpoint, `path`.
    """
    modalities: Mapping[str, Any] = data.get("modalities", {})
    for one in modalities.values():
        if channels is not None and sorted(one["channels"]) == sorted(channels):
            return {**data, **one}
    if modalities:
        known, found = " and ".join(sorted(modalities)), f", got {'+'.join(channels)}" if channels else ""
        example = f"'images={{{', '.join(f'{name}: *.nii.gz' for name in data['channels'])}}}'"
        raise ValueError(f"{path} was trained on scans of {known}{found}: say which these are, like {example}")
    return data


class ScanPreprocessor:
    """Preprocesses new scans with the settings of a checkpoint's training scans, or of the scans of a store.

    A ValueError for unusable metadata, a skull stripping command without `strip`, or as of `of_modality`.

    Args:
        path: of the checkpoint or the store, and `scans`, what it holds, for messages.
        data: the metadata of these scans that a checkpoint holds.
        strip: skull stripping of raw scans, as in `PrepareSettings`; None: that of these scans.
        channels: of the new scans, which say the modality where the training scans are of several.
        networks: the metadata of all networks that predict the scans; None: of one network, `data`.
    """

    def __init__(
        self,
        path: str,
        data: Mapping[str, Any],
        strip: str | None,
        *,
        scans: str = "the training scans",
        channels: Collection[str] | None = None,
        networks: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        check_metadata(path, data)
        data = of_modality(path, data, channels)
        self.path, self.data, self.scans = path, data, f"{scans} of {path}"
        self.channels: list[str] = data["channels"]
        self.networks = [data] if networks is None else networks
        settings = PrepareSettings(**data["prepare"])
        if strip is None and "{mask}" in settings.strip:  # the checkpoint may come from an untrusted source
            raise ValueError(
                f"{self.scans} were skull-stripped by a command, and a command is run only if you give it "
                f"({settings.strip}): give strip= the command, or strip=none for scans that are stripped already"
            )
        try:
            self.settings = settings if strip is None else replace(settings, strip=strip)
        except ValueError as error:  # of asa-predict, whose key it is
            raise ValueError(str(error).removeprefix("prepare.")) from None

    def saw(self, scan: Volume) -> bool | None:
        """Whether the network, or what it started from, was trained on a raw scan, its first channel; None: unknown."""
        known = [one["scans"] for one in self.networks if "scans" in one]  # digests, see `asa.data.splits`
        if known and (digest := identity_of(scan)) and any(digest in scans for scans in known):
            return True
        return None if len(known) < len(self.networks) else False

    def prepare(self, images: Mapping[str, str | Path | None]) -> tuple[Case, Volume]:
        """The prepared scan of a file per channel, as `asa-prepare` makes it, and the first channel as it was read.

        A FileNotFoundError or ValueError for unreadable files, missing or unknown channels, or another voxel size than
        the training scans' that cannot be resampled to it.
        """
        self.check_channels(images)
        volumes: dict[str, Volume] = {}
        for channel in self.channels:
            if (path := images[channel]) is None:
                raise ValueError(f"no file for the channel {channel}, which is needed")
            volumes[channel] = read_image(path, nan=self.settings.nan)
        like = volumes[self.channels[0]]
        case = prepare_case(volumes, None, {}, self._settings_for(like))
        statistics = map(intensity_statistics, case.image)
        self.warn_outside_range(case.quality, dict(zip(self.channels, statistics, strict=True)))
        return case, like

    def check_channels(self, channels: Mapping[str, Any]) -> None:
        """Raise a ValueError unless these are the channels that the network takes."""
        if sorted(channels) != sorted(self.channels):
            raise ValueError(f"{self.path} takes the channels {', '.join(self.channels)}, got {', '.join(channels)}")

    def check_store(self, store: Store, advice: str) -> None:
        """Raise a ValueError, which gives advice, if a store was prepared in another way than these scans.

        With `strip` given its scans may have been stripped in that way, too: whoever gives it says that it is as good.
        """
        own, strip = self.data["prepare"], store.settings.get("strip")
        but_for_strip = prepared_alike({**store.settings, "strip": own.get("strip")}, own)
        if store.channels == self.channels and but_for_strip:
            if strip in (own.get("strip"), self.settings.strip):
                return
            advice = f"if no skull is left, give strip={strip}"
        how = differences({**own, "nan": None}, {**store.settings, "nan": None})
        if store.channels != self.channels:
            how = f"channels: {', '.join(self.channels)} there, {', '.join(store.channels)} here"
        raise ValueError(f"{store.path} was prepared in another way than {self.scans} ({how}): {advice}")

    def warn_unless_centred(self) -> None:
        """Warn if the middle of a prepared volume, where its sides are divided, need not be the mid-sagittal plane."""
        if not self.settings.centred:
            warnings.warn(
                f"{self.path}: its scans were prepared without prepare.midway=true: where the mid-sagittal plane is "
                "not the middle of the volume, the head's position counts as asymmetry",
                stacklevel=3,
            )

    def check_stored(self, chain: Mapping[str, Any]) -> None:
        """Raise a ValueError if a scan of a store has other voxels than the training scans: it is not resampled."""
        if not self._matches(size := voxel_size(chain["stored_affine"])):
            raise ValueError(f"{self._mismatch(size)}: predict the raw scan instead, which is resampled where possible")

    def warn_outside_range(self, quality: Mapping[str, Any], intensity: Mapping[str, Mapping[str, float]]) -> None:
        """Warn about a scan whose `scan_measures` are unlike those of all training scans."""
        measures, unlike = scan_measures(quality, intensity), []
        for name, (low, high) in self.data.get("range", {}).items():  # an older checkpoint has none
            value = measures.get(name, low)
            volume = name == "brain_ml"
            below, above = (VOLUME_TOLERANCE * low, VOLUME_TOLERANCE * high) if volume else (INTENSITY_TOLERANCE,) * 2
            if not low - below <= value <= high + above:
                title, unit, digits = ("brain volume", " ml", 0) if volume else (f"{name} of the intensities", "", 2)
                unlike.append(f"{title} {value:.{digits}f}{unit} (there {low:.{digits}f} to {high:.{digits}f})")
        if unlike:
            warnings.warn(
                f"unlike {self.scans}: {'; '.join(unlike)}: check the prediction, and whether the scan was "
                "prepared as they were (skull, contrast, resolution)",
                stacklevel=4,
            )

    def _settings_for(self, scan: Volume) -> PrepareSettings:
        """The training scans' settings, with resampling added where a raw scan has another voxel size."""
        settings = self.settings
        size = voxel_size(to_ras(scan.data, scan.affine)[1])
        if settings.spacing is not None or settings.register or self._matches(size):
            return settings
        low, high = np.array(self.data["spacing"])
        if high.max() > (1 + SPACING_TOLERANCE) * low.min():
            raise ValueError(f"{self._mismatch(size)}: resample the scan to that, or train with prepare.spacing")
        spacing = round(float((low.mean() + high.mean()) / 2), 4)
        warnings.warn(
            f"{self._mismatch(size)}: resampled to {spacing:g} mm, and the result back to the scan's grid", stacklevel=4
        )
        return replace(settings, spacing=spacing)

    def _matches(self, size: np.ndarray) -> bool:
        """Whether a voxel size (D, H, W) is that of the training scans, within the tolerance."""
        if "spacing" not in self.data:  # an older checkpoint
            return True
        low, high = np.array(self.data["spacing"])
        return bool((size > (1 - SPACING_TOLERANCE) * low).all() and (size < (1 + SPACING_TOLERANCE) * high).all())

    def _mismatch(self, size: np.ndarray) -> str:
        low, high = (" x ".join(f"{length:.3g}" for length in edge) for edge in self.data["spacing"])
        trained = low if low == high else f"{low} to {high}"
        shown = " x ".join(f"{length:.3g}" for length in size)
        return f"voxels of {shown} mm (up, front, right), and this model was trained on {trained}"
