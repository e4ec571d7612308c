"""Pairs of degraded and clean 2-D images, with their label maps of regions.

ROOT/low/ID.png       degraded; .nii, .nii.gz and .dcm too
ROOT/high/ID.png      clean; for super-resolution larger by a whole factor s
ROOT/regions/ID.png   label map of the degraded image, as `asa-regions` stores it

A batch is a dict: "image" `(B, C, H, W)` and "target" `(B, C, s*H, s*W)` float32 in [0, 1], "regions" `(B, H, W)`
int64, "seed" and "id" as in `asa.data.loading.loader`.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from asa.data.datasets.record import NIFTI, subject_of
from asa.data.io.nifti import check_same_slice
from asa.data.loading.crops import Samples, sample_seed
from asa.restoration.images import list_pictures, read_picture, read_regions, size_of


class Pair(TypedDict):
    """Files of one case; `regions` is None without label maps."""

    id: str
    subject: str
    low: str
    high: str
    regions: str | None


def find_pairs(
    root: str | Path,
    *,
    low: str = "low",
    high: str = "high",
    regions: str | None = "regions",
    subject: str | None = None,
) -> list[Pair]:
    """The pairs below a folder, sorted by id.

    A ValueError for an image without a partner or a label map, and for two NIfTI files of a case of other slices.

    Args:
        low, high, regions: folders in it; with `regions` None every image is one region.
        subject: regular expression searched in the id, whose group 1 is the subject; None: see `subject_of`.
            All slices of one person should have the same subject, so that they are in one part of a split.
    """
    root = Path(root)
    images = {name: list_pictures(root / name) for name in (low, high)}
    if regions is not None:
        if not (root / regions).is_dir():
            raise FileNotFoundError(
                f"{root / regions}: no label maps: asa-regions input={root / low} out={root / regions}, or "
                "data.regions=null for one region per image"
            )
        images[regions] = list_pictures(root / regions)
    for one, other in product(images, (low, high)):
        if lone := sorted(images[one].keys() - images[other].keys()):
            more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
            raise ValueError(
                f"{root}: {lone[0]}{more} is in {one}/ and not in {other}/: all files of a case must have the same name"
            )
    if regions is not None and (lone := sorted(images[low].keys() - images[regions].keys())):
        raise ValueError(f"{root}: {lone[0]} has no label map in {regions}/: run asa-regions again")
    pairs: list[Pair] = []
    for id, path in images[low].items():
        clean = images[high][id]
        if all(str(file).endswith(NIFTI) for file in (path, clean)):
            check_same_slice(path, clean)
        labels = None if regions is None else str(images[regions][id])
        pairs.append(Pair(id=id, subject=subject_of(id, subject), low=str(path), high=str(clean), regions=labels))
    return pairs


@dataclass(eq=False, repr=False)
class PairDataset(Samples):
    """Random square crops of one pair or more, rotated by a multiple of 90 degrees.

    An item is addressed by (index of the pair, epoch); the same address always gives the same bytes.
    """

    pairs: Sequence[Pair]
    size: int  # edge of the crops in pixels of the degraded image
    _: KW_ONLY
    channels: int = 1  # 1 or 3, of all images
    upscale: int = 1  # factor s between clean and degraded images
    window: Sequence[float] | None = None  # see `asa.restoration.images.read_picture`
    seed: int = 0  # of the run

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("there are no pairs to train on: check the split")

    def __len__(self) -> int:
        return len(self.pairs)

    def check_sizes(self, *, crops: bool) -> None:
        """Raise a ValueError, before any is read whole, for files whose sizes do not fit, or, with `crops`, no crop."""
        for pair in self.pairs:
            size = size_of(pair["low"])
            self._check_target(pair, size, size_of(pair["high"]))
            if pair["regions"] is not None:
                _check_regions(pair["regions"], size_of(pair["regions"]), size)
            if crops:
                self._check_crop(pair, size)

    def whole(self, index: int) -> dict[str, Tensor]:
        """The whole images of a pair: "image" `(C, H, W)`, "target" `(C, s*H, s*W)`, "regions" `(H, W)`."""
        pair = self.pairs[index]
        files = (pair["low"], pair["high"])
        image, target = (torch.from_numpy(read_picture(path, self.window)) for path in files)
        for path, picture in zip(files, (image, target), strict=True):
            check_channels(path, picture, self.channels)
        self._check_target(pair, image.shape[1:], target.shape[1:])
        return {"image": image, "target": target, "regions": regions_of(pair["regions"], image)}

    def __getitem__(self, address: tuple[int, int]) -> dict[str, Any]:
        index, epoch = address
        pair, images = self.pairs[index], self.whole(index)
        seed = sample_seed(self.seed, epoch, pair["id"])
        generator, edge, shape = torch.Generator().manual_seed(seed), self.size, images["image"].shape[1:]
        self._check_crop(pair, shape)
        top, left = (int(torch.randint(n - edge + 1, (), generator=generator)) for n in shape)
        quarter_turns = int(torch.randint(4, (), generator=generator))

        def crop(whole: Tensor, scale: int) -> Tensor:
            rows, columns = (slice(scale * first, scale * (first + edge)) for first in (top, left))
            return torch.rot90(whole[..., rows, columns], quarter_turns, (-2, -1)).contiguous()

        scales = {"image": 1, "target": self.upscale, "regions": 1}
        return {"seed": seed, "id": pair["id"], **{name: crop(images[name], s) for name, s in scales.items()}}

    def _check_target(self, pair: Pair, size: Sequence[int], target: Sequence[int]) -> None:
        expected = [n * self.upscale for n in size]
        if [*target] != expected:
            raise ValueError(
                f"{pair['high']}: is {_pixels(target)} pixels and {pair['low']} {_pixels(size)}: with model.upscale="
                f"{self.upscale} it must be {_pixels(expected)}"
            )

    def _check_crop(self, pair: Pair, size: Sequence[int]) -> None:
        if min(size) < self.size:
            raise ValueError(f"{pair['low']}: is {_pixels(size)} pixels, smaller than crop={self.size}: lower crop")


def check_channels(path: str, image: Tensor, channels: int) -> None:
    """Raise a ValueError if an image `(C, H, W)` has another number of channels than the network."""
    if len(image) != channels:
        kind = {1: "grey", 3: "colour"}
        raise ValueError(
            f"{path}: is a {kind[len(image)]} image, but the network takes {kind[channels]} images: convert it, or "
            f"train with model.in_channels={len(image)}"
        )


def regions_of(path: str | None, image: Tensor) -> Tensor:
    """The label map `(H, W)` int64 of an image `(C, H, W)`, which has to be of its size; one region without a file."""
    if path is None:
        return torch.zeros(image.shape[1:], dtype=torch.int64)
    labels = read_regions(path)
    _check_regions(path, labels.shape, image.shape[1:])
    return torch.from_numpy(labels)


def _check_regions(path: str, labels: Sequence[int], image: Sequence[int]) -> None:
    if [*labels] != [*image]:
        raise ValueError(
            f"{path}: the label map is {_pixels(labels)} pixels, its image {_pixels(image)}: remove it, and compute it "
            "from this image (asa-regions, which keeps the maps that are there)"
        )


def _pixels(size: Sequence[int]) -> str:
    height, width = size
    return f"{width} x {height}"
