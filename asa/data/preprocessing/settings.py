"""How scans and cohorts are prepared, with all checks. Without torch, so that an error is said at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from asa.data.preprocessing.brain import TOOLS
from asa.errors import listed


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Preprocessing of a scan. Alignment, and the stages for whole heads, are off by default.

    The foreground of a channel is its voxels other than 0. An image with (almost) no voxels at 0, like a raw head with
    noise in the air, has no such background: all of it is foreground. After skull stripping the foreground is the brain
    mask. With `window`, for CT, it is the head: see `asa.data.preprocessing.brain.head_of_ct`.
    Stages that use one channel (strip, registration, mid-sagittal plane) use the first one that the scan has, and apply
    the result to all.

    Args:
        bias: correct the bias field of each channel (N4).
        strip: "none"; "deepbet"; "robex"; or a command with {image} and {mask} in it, which reads a NIfTI file and
            writes the brain mask.
        register: affine registration of the brain to the ICBM 2009a symmetric template (MNI space, 1 mm unless
            `spacing` is given).
        midway: midway alignment: rotate and shift the scan so that its mid-sagittal plane is the middle of the volume.
        normalise: "percentile" maps the 0.5 and 99.9 percentiles of the foreground to 0 and 1, clipped; "zscore" gives
            the foreground zero mean and unit SD. The background is 0 in both. Per channel.
        window: for CT, in place of `normalise`: the values in HU that become 0 and 1, clipped, in every channel.
        spacing: isotropic voxel size in mm to resample to; None keeps the grid of the scan.
        crop: "foreground" (the bounding box of the foreground of any channel, with a margin), "none", or a size, one
            int or D, H, W: a box of this size around the centre of the foreground's bounding box, padded with 0 where
            it is larger. After registration the box lies around the centre of the template's brain, so that an index
            is the same anatomical position in every scan. After registration or midway alignment the box is symmetric
            about the middle of the volume, so that the mid-sagittal plane stays there.
        margin: voxels around the bounding box, for crop "foreground".
        nan: NaN in the background of an image, which reaches the border of the volume: "refuse", or "zero" to set it
            to 0. NaN inside the head is refused.
    """

    bias: bool = False
    strip: str = "none"
    register: bool = False
    midway: bool = False
    normalise: str = "percentile"
    window: list[float] | None = None
    spacing: float | None = None
    crop: str | int | list[int] = "foreground"
    margin: int = 4
    nan: str = "refuse"

    def __post_init__(self) -> None:
        for name in ("bias", "register", "midway"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"prepare.{name}={getattr(self, name)!r}: choose true or false")
        check_strip(self.strip, "prepare.strip")
        if self.normalise not in ("percentile", "zscore"):
            raise ValueError(f"prepare.normalise={self.normalise!r}: choose percentile or zscore")
        if self.nan not in ("refuse", "zero"):
            raise ValueError(f"prepare.nan={self.nan!r}: choose refuse, or zero for a background of NaN")
        if self.window is not None:
            self._check_window(self.window)
        step = self.spacing
        if step is not None and not (type(step) in (int, float) and 0.1 <= step <= 20):
            raise ValueError(f"prepare.spacing={step}: give a voxel size from 0.1 to 20 mm, or null to keep the grid")
        if type(self.margin) is not int or self.margin < 0:
            raise ValueError(f"prepare.margin={self.margin}: give a whole number of voxels, 0 or more")
        if self.crop not in ("foreground", "none"):
            self._check_size()

    def _check_size(self) -> None:
        if not isinstance(self.crop, str | int):
            object.__setattr__(self, "crop", list(self.crop))  # a list, as JSON returns it
        size = self.crop if isinstance(self.crop, list) else [self.crop] * 3
        given = f"prepare.crop={self.crop!r}"
        if len(size) != 3 or not all(type(side) is int and side > 0 for side in size):
            raise ValueError(f"{given}: choose foreground, none, a size in voxels, or three sizes D, H, W")
        if self.centred and size[2] % 2:
            raise ValueError(f"{given}: an even width keeps the mid-sagittal plane in the middle; give one")

    def _check_window(self, window: Sequence[float]) -> None:
        try:
            low, high = (float(value) for value in window)
        except (TypeError, ValueError):
            low, high = 0.0, 0.0
        if not 0 < high - low < float("inf"):
            raise ValueError(
                f"prepare.window={window!r}: give the HU that become 0 and 1, like [0, 80] for brain in CT, or null"
            )
        object.__setattr__(self, "window", [low, high])
        if self.bias:
            raise ValueError("prepare.window= is for CT, which has no bias field: leave out prepare.bias")
        if self.strip in TOOLS:
            raise ValueError(
                f"prepare.strip={self.strip} is made for T1-weighted MR, and there is no skull strip for CT here: give "
                "prepare.strip=none, which keeps the skull, or a command with {image} and {mask} that strips CT in HU"
            )

    @property
    def centred(self) -> bool:
        """Whether the mid-sagittal plane should be the middle of the grid."""
        return self.register or self.midway

    def as_json(self) -> dict[str, Any]:
        """The settings as a store and a checkpoint keep them; those newer than they are, only if used."""
        newer = {"window": None, "nan": "refuse"}
        return {name: value for name, value in asdict(self).items() if name not in newer or value != newer[name]}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In which settings two preparations, as of `as_json`, differ, in words: five of them, and how many more."""
    one, other = ({**asdict(PrepareSettings()), **settings} for settings in (there, here))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    found = [f"prepare.{key}: {json.dumps(one.get(key))} there, {json.dumps(other.get(key))} here" for key in keys]
    return listed(found, 5)


@dataclass(frozen=True)
class CohortSettings:
    """How a cohort is prepared, the same for all of its scans.

    Args:
        labels: label values in the files -> names, without 0; empty for a cohort without labels.
        ignored: label values whose voxels are excluded from losses and scores.
        regions: name -> label values that it joins, for evaluation, in order.
        settings: the preprocessing of each scan.
        missing: "refuse" a scan that lacks a channel, or fill the channel with "zero" and list it in the entry.
        duplicates: of scans with the same voxels, "refuse" all but the first id, or "keep" all.

    Raises:
        ValueError: labels, ignored and regions that contradict each other, or an unknown choice.
    """

    labels: Mapping[int, str] = field(default_factory=dict)
    ignored: Sequence[int] = ()
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    settings: PrepareSettings = field(default_factory=PrepareSettings)
    missing: str = "refuse"
    duplicates: str = "refuse"

    def __post_init__(self) -> None:
        labels, regions = self.labels, self.regions
        if not isinstance(labels, Mapping) or not all(type(value) is int and value > 0 for value in labels):
            example = "{1: csf, 2: gm, 3: wm}; 0 is the background"
            raise ValueError(f"labels: {labels} should be values and names, like {example}")
        if not isinstance(regions, Mapping) or not all(isinstance(values, list | tuple) for values in regions.values()):
            example = "regions={whole: [1, 2], core: [1]}"
            raise ValueError(f"regions={regions}: give the labels of each region, like {example}")
        for kind, names in (("labels", labels.values()), ("regions", regions)):
            for name in names:
                if not isinstance(name, str) or not name or not name.isprintable():
                    raise ValueError(f"{kind}: {name!r} should be a name of printable characters: rename it")
        if len(labels) > 254 or len(set(labels.values())) < len(labels):
            raise ValueError("labels: at most 254 values, each with a name of its own")
        if not isinstance(self.ignored, list | tuple):
            raise ValueError(f"ignored={self.ignored!r}: give a list of label values, like ignored=[4]")
        for value in self.ignored:
            if not isinstance(value, int) or value in labels or value == 0:
                raise ValueError(f"ignored: {value!r} should be a label value that labels does not name")
        for name, values in regions.items():
            undeclared = [value for value in values if value not in [*labels]]  # a list, as they may be of any type
            if undeclared or not values:
                raise ValueError(f"regions: {name} joins {undeclared or 'nothing'}; give values that labels names")
        if self.missing not in ("refuse", "zero"):
            raise ValueError(f"missing={self.missing!r}: choose refuse or zero")
        if self.duplicates not in ("refuse", "keep"):
            raise ValueError(f"duplicates={self.duplicates!r}: choose refuse or keep")
        object.__setattr__(self, "labels", dict(sorted(labels.items())))
        object.__setattr__(self, "ignored", sorted(self.ignored))


def check_strip(strip: Any, setting: str) -> None:
    """Raise a ValueError that names the setting for an unknown way to strip the skull."""
    if strip not in ("none", *TOOLS) and not all(part in str(strip) for part in ("{image}", "{mask}")):
        raise ValueError(
            f"{setting}={strip!r}: choose none, {', '.join(TOOLS)}, or a command with {{image}} and {{mask}} in it"
        )
