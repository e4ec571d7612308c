"""Ranks: the processes that torchrun starts, and what they tell each other.

Nothing else in the package touches `torch.distributed`. In one process everything here is the identity, so the training
loop reads the same for one process and for many. Rank, size and local rank come from torchrun's environment.
"""

import faulthandler
import gc
import os
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

T = TypeVar("T")


class StoppedElsewhere(Exception):
    """The main rank failed, and has said why."""


def world_size() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number, 0 to `world_size() - 1`."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the rank that prints, logs and saves."""
    return rank() == 0


@contextmanager
def joined(device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """Be one of the job's ranks: connect to the others, and leave them at the end.

    Args:
        device: a GPU's ranks talk over NCCL about tensors and over gloo about the rest, those of a CPU over gloo.
        timeout_minutes: a rank that waits for another, or makes no progress itself (see `alive`), for so long ends
            with an error.
    """
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, me, world = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(backend, store=_meet(store, me, world, timeout), rank=me, world_size=world, timeout=timeout)
    _Watch.seconds = 60 * timeout_minutes
    alive()
    try:
        yield
        dist.barrier()
        dist.destroy_process_group()  # not after an error: the others learn of it by the end of this process
    finally:
        faulthandler.cancel_dump_traceback_later()
        _Watch.seconds = 0.0


def _meet(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of the launcher's store that belongs to the processes that are alive now.

    torchrun keeps its store when it starts processes again (torch 2.13), and they would take the addresses that the
    dead ones left there for their own. So the main rank opens a part under a new name, and the others look until they
    find the one that knows them.

    Raises:
        TimeoutError: they do not all come.
    """
    me, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("asa/main", me)
        names = [store.get(f"asa/{me}/{other}").decode() for other in range(1, world)]
        store.set(f"asa/{me}/all", " ".join(names))
        return dist.PrefixStore(me, store)
    while time.monotonic() < until:
        main = store.get("asa/main").decode()
        store.set(f"asa/{main}/{rank}", me)
        while store.get("asa/main").decode() == main and time.monotonic() < until:
            if store.check([f"asa/{main}/all"]) and me in store.get(f"asa/{main}/all").decode():
                return dist.PrefixStore(main, store)
            time.sleep(0.05)
    raise TimeoutError(f"process {rank} of {world} found no others within {timeout}")


def leave(code: int) -> None:
    """End this process at once with an exit code, if it is one of several.

    torch 2.13 keeps threads of gloo until the interpreter ends, and now and then these abort it then: a run that is
    done would look like one that died.
    """
    if world_size() > 1:
        gc.collect()  # ends the loader's workers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Watch:
    seconds = 0.0


def alive() -> None:
    """Say that this rank makes progress: one that does not for the timeout prints where it hangs, and ends."""
    if _Watch.seconds:
        faulthandler.dump_traceback_later(_Watch.seconds, exit=True, file=sys.__stderr__ or sys.stderr)


def on_main(function: Callable[[], T]) -> T:
    """Call a function on the main rank only, and give its result, which is plain data, to all.

    Raises:
        StoppedElsewhere: on the other ranks, if it raised on the main one.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [("value", function())]
        except BaseException:
            dist.broadcast_object_list([("error", None)], src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "error":
        raise StoppedElsewhere("the main process failed")
    return value


def any_rank(*flags: bool) -> Callable[[], tuple[bool, ...]]:
    """Start asking whether a flag is up on any rank; the function that is returned waits for the answers.

    The ranks ask over the CPU, so a GPU is not waited for.
    """
    if world_size() == 1:
        return lambda: flags
    votes = torch.tensor(flags, dtype=torch.uint8)
    work = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)

    def answer() -> tuple[bool, ...]:
        work.wait()
        return tuple(bool(vote) for vote in votes)

    return answer


def gathered(part: T) -> list[T]:
    """Each rank's plain data, on all ranks, in their order."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over the ranks, which have the same names."""
    if world_size() == 1:
        return dict(values)
    stacked = torch.stack([values[name].float() for name in sorted(values)])
    dist.all_reduce(stacked)
    return dict(zip(sorted(values), stacked / world_size(), strict=True))


def spread(items: Sequence[T], function: Callable[[T], Any]) -> list[Any]:
    """A function of each item, plain data, in the items' order: each rank computes its share, all get the whole."""
    mine = []
    for item in items[rank() :: world_size()]:
        mine.append(function(item))
        alive()
    parts = gathered(mine)
    return [parts[n % world_size()][n // world_size()] for n in range(len(items))]


def wrapped(method: nn.Module) -> nn.Module:
    """The method as the loop calls it: its gradients become the mean over the ranks in the backward pass."""
    if world_size() == 1:
        return method
    with warnings.catch_warnings():
        # Buffers are constants. The name that newer versions want is unknown to torch 2.8.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Without device_ids: these would move the batch's seeds to the GPU.
        return DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)


def exchange(method: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward pass of a wrapped method: whether gradients are exchanged, or added up first."""
    return nullcontext() if now or not isinstance(method, DistributedDataParallel) else method.no_sync()
