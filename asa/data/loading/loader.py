"""From crops to batches: an endless sampler that can start at any step, and the loader.

A batch is a dict of the samples' tensors, stacked along a first axis B; "seed" is `(B,)` int64 on the CPU, "id" a list
of record ids.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from asa.data.io.parallel import end_with_parent, end_workers_at_exit, ignore_stop_signals, worker_context
from asa.data.loading.crops import Samples, sample_seed
from asa.settings import LoaderSettings, check_batch

PREFETCH = 2  # batches that each worker loads in advance


@dataclass(frozen=True, eq=False)
class EndlessSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (record index, epoch), starting at any step.

    Sample n of the run is item n % N of the shuffled epoch n // N: the order depends on the seed and n only. A batch
    may reach into the next epoch, so that a cohort may be smaller than a batch. The ranks divide each micro-batch
    evenly, so that a step has the same samples for any number of ranks.

    Raises:
        ValueError: a batch size that micro-batches times ranks do not divide.
    """

    records: int  # number of records N
    batch_size: int  # global batch size: samples per step over all micro-batches and ranks
    _: KW_ONLY
    micro_batches: int = 1  # per step (gradient accumulation)
    seed: int = 0  # of the run
    start_step: int = 0
    rank: int = 0  # of this process
    world_size: int = 1  # number of ranks

    def __post_init__(self) -> None:
        check_batch(self.batch_size, self.micro_batches, self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro_batch = self.batch_size // self.micro_batches
        per_rank = micro_batch // self.world_size
        shuffled, order = -1, list[int]()
        for start in itertools.count(self.start_step * self.batch_size + self.rank * per_rank, micro_batch):
            batch = []
            for n in range(start, start + per_rank):
                epoch, item = divmod(n, self.records)
                if epoch != shuffled:
                    generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch))
                    shuffled, order = epoch, torch.randperm(self.records, generator=generator).tolist()
                batch.append((order[item], epoch))
            yield batch


def make_loader(
    dataset: Samples, batch_size: int, settings: LoaderSettings, *, pin_memory: bool = False, **position: int
) -> DataLoader[dict[str, Any]]:
    """An endless loader of micro-batches of this rank, see `collate`.

    Args:
        dataset: the crops; its seed also determines their order.
        batch_size, position: of `EndlessSampler`.
        pin_memory: page-locked batches, for a GPU.
    """
    if workers := settings.workers:
        end_workers_at_exit()
    return DataLoader(
        dataset,
        batch_sampler=EndlessSampler(len(dataset), batch_size, seed=dataset.seed, **position),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=worker_context(type(dataset).__module__) if workers else None,
    )


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of samples; seeds become an int64 tensor `(B,)`, ids a list."""
    tensors = [key for key, value in samples[0].items() if isinstance(value, Tensor)]
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in tensors}
    seeds = torch.tensor([sample["seed"] for sample in samples], dtype=torch.int64)
    return {**stacked, "seed": seeds, "id": [sample["id"] for sample in samples]}


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # more threads would compete with the training process for its cores
    ignore_stop_signals()
    end_with_parent()
