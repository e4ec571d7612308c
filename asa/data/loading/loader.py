"""From the store to batches: training crops, and an endless sampler that can start at any step.

Every random draw of a sample comes from its own seed, made of (run seed, epoch, record id): it does not depend on the
worker that draws it, on how many there are, or on where the run was stopped.

A batch is a dict: "image" `(B, C, D, H, W)` float32, "label" `(B, 1, D, H, W)` uint8 where the records are labelled
(as stored: class indices, and `asa.data.store.IGNORED`), "mirror" like "image" where it is asked for (voxel i is the
counterpart of voxel i of the image, on the other side of the volume), numbers that were attached to the records, "seed"
`(B,)` int64 on the CPU, "id" a list of record ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from asa.data.io.parallel import end_with_parent, end_workers_at_exit, leave_stopping_to_parent
from asa.data.loading.augment import (
    AugmentSettings,
    draw_augmentation,
    move,
    recolour,
    source_size,
    swap_sides,
)
from asa.data.loading.foreground import Foreground
from asa.data.loading.seeds import sample_seed
from asa.ops.symmetry import flip, mirrored_start

CROPS = ("centre", "random")


@dataclass
class LoaderSettings:
    """How crops reach the device."""

    workers: int = 2
    "processes that read and augment crops; 0 reads in the training process"
    prefetch: int = 2
    "batches that each worker keeps ready"

    def __post_init__(self) -> None:
        if self.workers < 0 or self.prefetch < 1:
            raise ValueError(
                f"loader.workers={self.workers}, loader.prefetch={self.prefetch}: give 0 or more, 1 or more"
            )


class VolumeSource(Protocol):
    """What crops are read from: the prepared store, or anything with arrays `C D H W` by record id."""

    def image(self, record_id: str) -> np.ndarray: ...

    def label(self, record_id: str) -> np.ndarray | None: ...


class Samples(Dataset[dict[str, Any]], ABC):
    """What the loader reads: items addressed by (record, epoch), each with its "seed" and "id"."""

    seed: int

    @abstractmethod
    def __len__(self) -> int: ...


class CropDataset(Samples):
    """Crops of prepared volumes, augmented.

    An item is addressed by (record, epoch), so that the same address always gives the same bytes.

    Args:
        source: the store.
        records: its records to read, dicts with "id".
        size: crop size (D, H, W) in voxels. A volume that is smaller is padded with zeros, evenly on both sides.
        crop: `"centre"`, or `"random"` along each axis where the volume is larger than the crop.
        labelled: read label maps too.
        foreground: share of the random crops that have a voxel of a labelled class in their middle, or as near to it as
            a crop inside the volume can: first a class is drawn of those that the scan has, then one of its voxels.
        augment: settings; None changes nothing.
        lateral_pairs: stored class indices (left, right) that change places in a mirrored crop.
        mirrored: read the crop at the mirrored place too, flipped, moved and recoloured alike.
        attached: numbers that go with a scan, by record id and then by their key in the batch.
        seed: the run's seed.

    Raises:
        ValueError: an unknown crop, no records, a record without label, or a share of foreground that is none or that
            nothing would come of.
    """

    def __init__(
        self,
        source: VolumeSource,
        records: Sequence[Mapping[str, Any]],
        size: Sequence[int],
        *,
        crop: str = "centre",
        labelled: bool = False,
        foreground: float = 0.0,
        augment: AugmentSettings | None = None,
        lateral_pairs: Sequence[tuple[int, int]] = (),
        mirrored: bool = False,
        attached: Mapping[str, Mapping[str, float]] | None = None,
        seed: int = 0,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"a crop is {' or '.join(CROPS)}, not {crop!r}")
        if not records:
            raise ValueError("there are no records to train on: check the split")
        if not 0 <= foreground <= 1:
            raise ValueError(f"data.foreground={foreground}: a share lies between 0 and 1")
        if foreground and not (labelled and crop == "random"):
            raise ValueError(f"data.foreground={foreground} moves random crops of labelled scans: placement=random")
        self.source, self.records, self.size = source, list(records), tuple(size)
        self.crop, self.labelled, self.augment = crop, labelled, augment
        self.lateral_pairs, self.seed = tuple(lateral_pairs), seed
        self.foreground = foreground
        self.places: dict[str, Foreground] = {}  # by record, found when it is first read
        self.mirrored, self.attached = mirrored, attached or {}
        if labelled:
            for record in self.records:
                if source.label(record["id"]) is None:
                    raise ValueError(
                        f"{record['id']}: has no label map; leave it out of the split or prepare it with one"
                    )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, address: tuple[int, int]) -> dict[str, Any]:
        index, epoch = address
        record_id = self.records[index]["id"]
        seed = sample_seed(self.seed, epoch, record_id)
        generator = torch.Generator().manual_seed(seed)
        image = self.source.image(record_id)
        drawn = draw_augmentation(self.augment or AugmentSettings(), generator, channels=len(image))
        box = source_size(self.size, drawn)
        start = self._place(record_id, image.shape[1:], generator, box)
        crop = move(torch.from_numpy(read_box(image, start, box)).float(), self.size, drawn)
        sample = {"image": recolour(crop, drawn).contiguous(), "seed": seed, "id": record_id}
        if self.mirrored:
            across = torch.from_numpy(read_box(image, mirrored_start(start, box, image.shape[-1]), box)).float()
            sample["mirror"] = recolour(move(flip(across), self.size, drawn), drawn).contiguous()
        for key, value in self.attached.get(record_id, {}).items():
            sample[key] = torch.tensor(value)
        if self.labelled:
            label = self.source.label(record_id)
            assert label is not None
            moved = move(torch.from_numpy(read_box(label, start, box)), self.size, drawn, label=True)
            if drawn.mirror:
                moved = swap_sides(moved, self.lateral_pairs)
            sample["label"] = moved.contiguous()
        return sample

    def _place(self, record_id: str, shape: Sequence[int], generator: torch.Generator, box: Sequence[int]) -> list[int]:
        """First voxel of the box that is read, around a crop at the centre or at a random place inside the volume."""
        draws = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        middle = self._middle(record_id, generator) if self.foreground else None
        start = []
        for axis, (n, size, edge) in enumerate(zip(shape, self.size, box, strict=True)):
            slack = n - size
            if self.crop == "centre" or slack <= 0:
                first = slack // 2
            elif middle is None:
                first = int(draws[axis] * (slack + 1))
            else:
                first = min(max(middle[axis] - size // 2, 0), slack)
            start.append(first - (edge - size) // 2)
        return start

    def _middle(self, record_id: str, generator: torch.Generator) -> tuple[int, int, int] | None:
        """A voxel of a class for the share of the crops that have one in their middle."""
        chosen, *draws = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if chosen >= self.foreground:
            return None
        label = self.source.label(record_id)
        assert label is not None
        if record_id not in self.places:
            self.places[record_id] = Foreground(label)
        return self.places[record_id].draw(label, draws)


def read_box(volume: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Copy a box out of `(C, D, H, W)`, zeros where it lies outside. Only the pages of the box are read.

    Args:
        volume: the array, memory-mapped or not.
        start: first voxel of the box (D, H, W); may be negative.
        size: the box (D, H, W).

    Returns:
        `(C, *size)`.
    """
    inner = [slice(max(a, 0), max(min(a + n, m), 0)) for a, n, m in zip(start, size, volume.shape[1:], strict=True)]
    box = np.zeros((volume.shape[0], *size), dtype=volume.dtype)
    place = [slice(s.start - a, s.start - a + max(s.stop - s.start, 0)) for s, a in zip(inner, start, strict=True)]
    box[(slice(None), *place)] = volume[(slice(None), *inner)]
    return box


class EndlessSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (record, epoch) without end, from any step on.

    Sample n of the run is place n % N of the shuffled epoch n // N, so the order follows from the seed and n alone. A
    batch may reach into the next epoch: a cohort smaller than a batch works. Several processes share each micro-batch
    evenly, so a step sees the same samples however many there are.

    Args:
        records: number of records N.
        batch_size: samples a step, over all its micro-batches and processes.
        micro_batches: parts a step is split into.
        seed: the run's seed.
        start_step: first step to give.
        rank: which of the processes this is.
        world_size: how many there are.

    Raises:
        ValueError: a batch that the micro-batches and processes do not divide.
    """

    def __init__(
        self,
        records: int,
        batch_size: int,
        *,
        micro_batches: int = 1,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_batch(batch_size, micro_batches, world_size)
        self.records, self.seed = records, seed
        self.micro_batch = batch_size // micro_batches
        self.share = self.micro_batch // world_size
        self.first = start_step * batch_size + rank * self.share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        shuffled = -1
        n = self.first
        while True:
            batch = []
            for _ in range(self.share):
                epoch, place = divmod(n, self.records)
                if epoch != shuffled:
                    generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch))
                    order = torch.randperm(self.records, generator=generator).tolist()
                    shuffled = epoch
                batch.append((order[place], epoch))
                n += 1
            n += self.micro_batch - self.share
            yield batch


def check_batch(batch_size: int, micro_batches: int, world_size: int) -> None:
    """Raise a ValueError for a batch that cannot be shared evenly."""
    if batch_size < 1 or batch_size % micro_batches:
        raise ValueError(f"train.accumulate={micro_batches} does not divide train.batch_size={batch_size}")
    if batch_size % (micro_batches * world_size):
        raise ValueError(
            f"{world_size} processes with train.accumulate={micro_batches} do not divide "
            f"train.batch_size={batch_size}, the samples a step of all processes together"
        )


def make_loader(
    dataset: Samples,
    batch_size: int,
    settings: LoaderSettings,
    *,
    micro_batches: int = 1,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """An endless loader of micro-batches from `start_step` on.

    Args:
        dataset: the crops; its seed orders them too.
        batch_size: samples a step, of all processes.
        settings: workers and prefetching.
        micro_batches: parts a step is split into.
        start_step: steps that were done before.
        rank, world_size: which of how many processes this is.
        pin_memory: page-locked batches, for a GPU.
    """
    sampler = EndlessSampler(
        len(dataset),
        batch_size,
        micro_batches=micro_batches,
        seed=dataset.seed,
        start_step=start_step,
        rank=rank,
        world_size=world_size,
    )
    workers = settings.workers
    if workers:
        end_workers_at_exit()
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=settings.prefetch if workers else None,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context="forkserver" if workers else None,
    )


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack the samples' tensors; seeds become an int64 tensor, ids stay a list."""
    batch: dict[str, Any] = {
        key: torch.stack([sample[key] for sample in samples])
        for key, value in samples[0].items()
        if isinstance(value, Tensor)
    }
    batch["seed"] = torch.tensor([sample["seed"] for sample in samples], dtype=torch.int64)
    batch["id"] = [sample["id"] for sample in samples]
    return batch


def _start_worker(_: int) -> None:
    # Beside a training process: more threads would take its cores.
    torch.set_num_threads(1)
    leave_stopping_to_parent()
    end_with_parent()
