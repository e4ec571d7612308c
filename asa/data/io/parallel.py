"""Worker processes, and what one owes the process that started it: to end with it, and to leave stopping to it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from typing import TypeVar

J = TypeVar("J")
T = TypeVar("T")

KILLED = "a worker process was killed, out of memory perhaps; run again with fewer workers"


def in_processes(function: Callable[[J], T], jobs: Mapping[str, J], workers: int) -> Iterator[tuple[str, T | None]]:
    """A function of each job, as they are done: the job's name and what came out, None where its process was killed.

    Args:
        function: can be pickled, as its jobs and results; it raises nothing that is expected.
        jobs: by name.
        workers: processes; 1 works in this one.
    """
    if workers == 1:
        for name, job in jobs.items():
            yield name, function(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(function, job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                name = futures.pop(future)
                try:
                    yield name, future.result()
                except BrokenExecutor:
                    yield name, None
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """In a worker: end as soon as the parent is gone, killed perhaps. It would go on alone, or wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def leave_stopping_to_parent() -> None:
    """In a worker: ignore SIGTERM and SIGUSR1. See `end_workers_at_exit`, without which the parent cannot exit.

    Slurm and others signal the whole group. The training process saves then, and needs its workers until it has.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_workers_at_exit() -> None:
    """In the parent: kill workers that are still there when it exits, of a loader that nobody closed.

    Python would send them SIGTERM, which they ignore, and wait for them.
    """
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)  # runs before Python's own, which was registered earlier


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
