"""Ranks: the processes that torchrun starts, and the communication between them.

In a single process every function here is the identity, so the training loop reads the same for one and for many.
"""

import faulthandler
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asa.training.process import MainRankFailed, is_main, rank, world_size

T = TypeVar("T")
_heartbeat_timeout = 0.0  # seconds; 0: not in a process group


@contextmanager
def process_group(device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """Connect this rank to the other ranks of the job inside the context.

    Ranks on GPUs exchange CUDA tensors over NCCL and everything else over gloo; ranks on a CPU use gloo. A rank that
    waits for another one, or makes no progress itself (see `heartbeat`), for the timeout ends with an error.
    """
    global _heartbeat_timeout
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and streams are those of the current one
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, me, world = next(dist.rendezvous("env://", timeout=timeout))
    store = _fresh_store(store, me, world, timeout)
    dist.init_process_group(backend, store=store, rank=me, world_size=world, timeout=timeout)
    _heartbeat_timeout = 60 * timeout_minutes
    heartbeat()
    try:
        yield
        dist.barrier()
        dist.destroy_process_group()  # not after an error: the end of this process tells the other ranks
    finally:
        faulthandler.cancel_dump_traceback_later()
        _heartbeat_timeout = 0.0


def _fresh_store(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of the launcher's store that only the present processes use; a TimeoutError if a rank is missing.

    torchrun keeps its store when it restarts processes (torch 2.13), with the addresses of the previous ones. So the
    main rank opens a part under a new name, and every other rank announces itself until it finds one that lists it.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("asa/main", me)
        names = [store.get(f"asa/{me}/{other}").decode() for other in range(1, world)]
        store.set(f"asa/{me}/all", " ".join(names))
        return dist.PrefixStore(me, store)
    while time.monotonic() < deadline:
        main = store.get("asa/main").decode()
        store.set(f"asa/{main}/{rank}", me)
        while store.get("asa/main").decode() == main and time.monotonic() < deadline:
            if store.check([f"asa/{main}/all"]) and me in store.get(f"asa/{main}/all").decode():
                return dist.PrefixStore(main, store)
            time.sleep(0.05)
    raise TimeoutError(f"process {rank} of {world} did not find the others within {timeout}")


def heartbeat() -> None:
    """Report progress of this rank: without a call for the timeout, it prints its stack and ends."""
    if _heartbeat_timeout:
        faulthandler.dump_traceback_later(_heartbeat_timeout, exit=True, file=sys.__stderr__ or sys.stderr)


def on_main(function: Callable[[], T]) -> T:
    """The result, plain data, of a function that only the main rank calls; if it raises, a MainRankFailed elsewhere."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [(False, None)]
    try:
        if is_main():
            outcome = [(True, function())]
    finally:
        dist.broadcast_object_list(outcome, src=0)
    done, value = outcome[0]
    if not done:
        raise MainRankFailed("the main process failed")
    return value


def any_rank(*flags: bool) -> Callable[[], tuple[bool, ...]]:
    """Start asking, on the CPU, whether each flag is set on any rank; the returned function waits for the answers."""
    if world_size() == 1:
        return lambda: flags
    votes = torch.tensor(flags, dtype=torch.uint8)
    work = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)

    def answers() -> tuple[bool, ...]:
        work.wait()
        return tuple(bool(vote) for vote in votes)

    return answers


def gather_objects(item: T) -> list[T]:
    """Each rank's plain data, on all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def take_from_main(tensor: Tensor) -> None:
    """Replace a tensor by that of the main process, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars, or tensors, averaged over the ranks, which have the same names and shapes."""
    if world_size() == 1:
        return dict(values)
    names = sorted(values)
    joined = torch.cat([values[name].float().flatten() for name in names])
    dist.all_reduce(joined)
    parts = (joined / world_size()).split([values[name].numel() for name in names])
    return {name: part.view(values[name].shape) for name, part in zip(names, parts, strict=True)}


def map_over_ranks(items: Sequence[T], function: Callable[[T], Any]) -> list[Any]:
    """Apply a function that returns plain data to each item; the ranks divide the items, and all get all results."""
    own = []
    for item in items[rank() :: world_size()]:
        own.append(function(item))
        heartbeat()
    parts = gather_objects(own)
    return [parts[n % world_size()][n // world_size()] for n in range(len(items))]


def data_parallel(method: nn.Module) -> nn.Module:
    """The method as the loop calls it: its backward pass averages the gradients over the ranks."""
    if world_size() == 1:
        return method
    with warnings.catch_warnings():
        # Buffers are constant, or see `RunningStatistics`. The argument's new name is unknown to torch 2.8.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Without device_ids, which would move the batch's seeds to the GPU.
        return DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)


def gradient_sync(method: nn.Module, sync: bool) -> AbstractContextManager[Any]:
    """Context of a forward and backward pass: whether gradients are averaged over the ranks or only accumulated."""
    return nullcontext() if sync or not isinstance(method, DistributedDataParallel) else method.no_sync()
