"""Training crops of prepared volumes, cropped at random, at the centre or along the mid-sagittal plane, and augmented.

Every random draw of a sample comes from a seed of its own, made of (run seed, epoch, record id). It does not depend on
the worker that draws it, on the number of workers, or on where the run was interrupted.

A sample is a dict: "image" `(C, D, H, W)` float32; "label" `(1, D, H, W)` uint8 of labelled records (class indices as
stored, and `asa.ops.labels.IGNORED`); "mirror" like "image" if asked for (voxel i is the counterpart of voxel i of the
image on the other side of the volume); "air" bool `(L,)` if asked for, the patches of constant intensity; "excluded"
likewise, the patches with an `IGNORED` voxel; the numbers attached to the record; "seed" int; "id" of the record.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from asa.data.io.nifti import spacing_of
from asa.data.loading.augment import (
    Augmentation,
    AugmentSettings,
    draw_augmentation,
    intensity_transform,
    source_size,
    spatial_transform,
    swap_sides,
)
from asa.data.store import Records, read_box
from asa.ops.labels import IGNORED
from asa.ops.patches import constant_patches, patchify
from asa.ops.symmetry import flip, mirrored_start
from asa.settings import check_placement


class VolumeSource(Protocol):
    """What crops are read from: the prepared store, or anything with arrays `C D H W` by record id."""

    def image(self, record_id: str) -> np.ndarray: ...

    def label(self, record_id: str) -> np.ndarray | None: ...


@dataclass(frozen=True)
class JoinedSides:
    """A source of crops in whose label maps the left and the right label of a pair are one class."""

    source: VolumeSource
    joined: Sequence[int]  # class index -> joined one, see `asa.ops.labels.joined_sides`

    def image(self, record_id: str) -> np.ndarray:
        """`C D H W`."""
        return self.source.image(record_id)

    def label(self, record_id: str) -> np.ndarray | None:
        """Joined class indices `(1, D, H, W)` uint8, in memory."""
        label = self.source.label(record_id)
        table = np.array([*self.joined, *[IGNORED] * (IGNORED + 1 - len(self.joined))], dtype=np.uint8)
        return None if label is None else table[label]


class Samples(Dataset[dict[str, Any]], ABC):
    """A dataset for `make_loader`: items addressed by (index, epoch), each with its "seed" and "id"."""

    seed: int

    @abstractmethod
    def __len__(self) -> int: ...


@dataclass(eq=False, repr=False)
class CropDataset(Samples):
    """Augmented crops of prepared volumes.

    An item is addressed by (index of the record, epoch), or by the index for epoch 0; the same address always gives the
    same bytes.

    Args:
        source: the store.
        records: its records to read, dicts with "id".
        size: crop size (D, H, W) in voxels. A volume that is smaller is padded with zeros, evenly on both sides.
        crop: `"centre"`, `"random"` along each axis where the volume is larger than the crop, or `"midplane"`: random
            along D and H and centred along W, so that the mid-sagittal plane of aligned scans stays in the middle.
        labelled: read label maps too.
        foreground: probability that a random crop is centred on a voxel of a labelled class, or as near to it as a crop
            inside the volume can be: first a class is drawn from those that the scan has, then one of its voxels.
        augment: settings; None switches augmentation off.
        lateral_pairs: stored class indices (left, right) that are exchanged in a mirrored crop.
        mirrored: also read the crop at the mirrored position, flipped, with the same transforms.
        air: edge of the patches in voxels for "air"; None: without it.
        excluded: the same for "excluded"; a record without a label map has none.
        attached: numbers that belong to a scan, by record id and then by their key in the batch.
        seed: of the run.

    Raises:
        ValueError: a size that is not three edges, an unknown crop, no records, a record without label, or a foreground
            probability that is out of range or has no effect.
    """

    source: VolumeSource
    records: Sequence[Mapping[str, Any]]
    size: Sequence[int]
    _: KW_ONLY
    crop: str = "centre"
    labelled: bool = False
    foreground: float = 0.0
    augment: AugmentSettings | None = None
    lateral_pairs: Sequence[tuple[int, int]] = ()
    mirrored: bool = False
    air: int | None = None
    excluded: int | None = None
    attached: Mapping[str, Mapping[str, float]] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_placement(self.crop)
        if isinstance(self.size, int) or len(self.size) != 3 or not all(edge >= 1 for edge in self.size):
            raise ValueError(f"size={self.size}: give the three edges (D, H, W) of a crop in voxels, like (96, 96, 96)")
        if not self.records:
            raise ValueError("there are no records to train on: check the split")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"data.foreground={self.foreground}: a probability must be from 0 to 1")
        if self.foreground and not (self.labelled and self.crop != "centre"):
            raise ValueError(
                f"data.foreground={self.foreground} needs random crops of labelled scans: set data.placement=random"
            )
        for record in self.records if self.labelled else ():
            told = "arrays" in record  # else the label map is opened
            if not ("label" in record["arrays"] if told else self.source.label(record["id"]) is not None):
                raise ValueError(f"{record['id']}: has no label map; leave it out of the split or prepare it with one")
        self.ids = self.records.ids if isinstance(self.records, Records) else [record["id"] for record in self.records]
        self._augment = self.augment or AugmentSettings()
        self.foregrounds: dict[str, Foreground] = {}  # by record id, made when the record is first read
        self.missing: dict[str, tuple[int, ...]] = {}  # likewise

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.size))
        extras = "".join(f", {name}" for name in ("labelled", "mirrored") if getattr(self, name))
        augment = "" if self.augment is None else ", augmented"
        return f"CropDataset({len(self)} scans, crops of {size} voxels, {self.crop}{extras}{augment})"

    def __getitem__(self, address: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = (address, 0) if isinstance(address, int) else address
        record_id = self.ids[index]
        seed = sample_seed(self.seed, epoch, record_id)
        generator = torch.Generator().manual_seed(seed)
        image = self.source.image(record_id)
        missing = self._missing(index, image)
        drawn = draw_augmentation(self._augment, generator, len(image), self.size, self._spacing(index), missing)
        box = source_size(self.size, drawn)
        start = self._start(record_id, image.shape[1:], generator, box)
        crop = spatial_transform(torch.from_numpy(read_box(image, start, box)).float(), self.size, drawn)
        sample: dict[str, Any] = {"image": intensity_transform(crop, drawn).contiguous(), "seed": seed, "id": record_id}
        if self.mirrored:
            across = torch.from_numpy(read_box(image, mirrored_start(start, box, image.shape[-1]), box)).float()
            across = spatial_transform(flip(across), self.size, drawn)
            sample["mirror"] = intensity_transform(across, drawn).contiguous()
        if self.air is not None:
            sample["air"] = constant_patches(sample["image"][None], self.air)[0]
        label = self._label(record_id, start, box, drawn) if self.labelled or self.excluded else None
        if self.excluded is not None:
            ignored = torch.zeros(1, *self.size, dtype=torch.bool) if label is None else label == IGNORED
            sample["excluded"] = patchify(ignored[None], self.excluded)[0].any(dim=1)
        if self.labelled:
            assert label is not None
            sample["label"] = label.contiguous()
        return sample | {key: torch.tensor(value) for key, value in (self.attached or {}).get(record_id, {}).items()}

    def _label(self, id: str, start: Sequence[int], box: Sequence[int], drawn: Augmentation) -> torch.Tensor | None:
        """The crop of the label map `(1, D, H, W)`; None for a record without one."""
        if (source := self.source.label(id)) is None:
            return None
        label = spatial_transform(torch.from_numpy(read_box(source, start, box)), self.size, drawn, label=True)
        return swap_sides(label, self.lateral_pairs) if "W" in drawn.mirror else label

    def _spacing(self, index: int) -> Sequence[float]:
        """Voxel size along D, H, W in mm of a record of a store; 1 where it does not tell."""
        in_mm = any((self._augment.rotation, self._augment.deform, self._augment.bias_field))
        chain = self.records[index].get("chain") if in_mm else None
        return (1.0, 1.0, 1.0) if chain is None else spacing_of(np.array(chain["stored_affine"]))[::-1].tolist()

    def _missing(self, index: int, image: np.ndarray) -> tuple[int, ...]:
        """The channels that a scan lacks, which are 0 everywhere; only where something would fill or drop them."""
        if len(image) == 1 or not (self._augment.noise or self._augment.modality_dropout):
            return ()
        if (id := self.ids[index]) not in self.missing:
            record = self.records[index]
            whole = "arrays" in record and "missing" not in record  # else the volume is read
            self.missing[id] = () if whole else tuple(k for k, channel in enumerate(image) if not channel.any())
        return self.missing[id]

    def _start(self, record_id: str, shape: Sequence[int], generator: torch.Generator, box: Sequence[int]) -> list[int]:
        """First voxel of the box to read, which surrounds a crop at the centre or at a random position."""
        draws = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        centre = self._foreground_centre(record_id, generator) if self.foreground else None
        start = []
        for axis, (n, size, edge) in enumerate(zip(shape, self.size, box, strict=True)):
            slack = n - size
            if self.crop == "centre" or slack <= 0 or (self.crop == "midplane" and axis == 2):
                first = slack // 2
            elif centre is None:
                first = int(draws[axis] * (slack + 1))
            else:
                first = min(max(centre[axis] - size // 2, 0), slack)
            start.append(first - (edge - size) // 2)
        return start

    def _foreground_centre(self, record_id: str, generator: torch.Generator) -> tuple[int, int, int] | None:
        """A voxel of a labelled class with probability `foreground`, else None."""
        chosen, *draws = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if chosen >= self.foreground:
            return None
        label = self.source.label(record_id)
        assert label is not None
        if record_id not in self.foregrounds:
            self.foregrounds[record_id] = Foreground(label)
        return self.foregrounds[record_id].draw(label, draws)


class Foreground:
    """Draws voxels of the classes of a label map `(1, D, H, W)` uint8, whose number in every slice it keeps.

    The volume is read once, and the counts take a few kilobytes; a draw then reads one slice. Neither the background
    nor `IGNORED` is a class.
    """

    def __init__(self, label: np.ndarray) -> None:
        counts = np.stack([np.bincount(part.ravel(), minlength=IGNORED + 1) for part in label[0]])
        self.classes = [int(index) for index in np.flatnonzero(counts.sum(axis=0)) if 0 < index != IGNORED]
        self.cumulative = counts[:, self.classes].cumsum(axis=0)  # D K, up to and including each slice

    def draw(self, label: np.ndarray, draws: Sequence[float]) -> tuple[int, int, int] | None:
        """A class with equal probabilities, then (d, h, w) of one of its voxels; None where there is no class.

        The label map is the same one, and the draws are two numbers in [0, 1).
        """
        if not self.classes:
            return None
        column = int(draws[0] * len(self.classes))
        cumulative = self.cumulative[:, column]
        number = int(draws[1] * cumulative[-1])
        depth = int(np.searchsorted(cumulative, number, side="right"))
        before = int(cumulative[depth - 1]) if depth else 0
        indices = np.flatnonzero(label[0, depth] == self.classes[column])
        height, width = divmod(int(indices[number - before]), label.shape[3])
        return depth, height, width


def sample_seed(*parts: object) -> int:
    """A seed from 0 to 2^63 - 1, determined by what identifies a draw, like (run seed, epoch, record id)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
