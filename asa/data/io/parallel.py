"""A parallel map in processes or on a cluster, and workers that end with their parent and leave its signals to it."""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from multiprocessing import get_all_start_methods
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from asa.errors import one_line, reason_of, require

J = TypeVar("J")
T = TypeVar("T")

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # that stop a run
KILLED = "a worker process was killed each time that it was tried, perhaps because memory ran out"
AHEAD = 2000  # jobs that a dask scheduler holds at a time: enough for the workers, and little of its memory
PATIENCE = 30  # seconds that it has to answer


def in_processes(
    function: Callable[[J], T], jobs: Sequence[J], workers: int, *, title: str, unit: str, progress: bool = True
) -> Iterator[tuple[J, T | None]]:
    """Call a function for each job in worker processes, under a progress bar.

    Args:
        function: can be pickled, like its jobs and results. An exception in it is raised here, and jobs that have not
            started are cancelled.
        workers: number of processes; 1 calls the function in this process.
        title, unit, progress: text of the progress bar, and whether to show it.

    Yields:
        (job, result) as they finish; the result is None where the worker was killed, see `KILLED`, in the end alone.
    """
    results = _in_pool(function, jobs, workers) if workers > 1 else ((job, function(job)) for job in jobs)
    with tqdm(total=len(jobs), desc=title, unit=unit, disable=not progress) as bar, closing(results):
        for pair in results:
            yield pair
            bar.update()


def each_tried(
    function: Callable[[J], T], jobs: Sequence[J], workers: int = 1, *, title: str, unit: str
) -> Iterator[tuple[J, T | None, str]]:
    """As `in_processes`, but a failure stops no other job: (job, result, "") or (job, None, reason in one line)."""
    for job, outcome in in_processes(partial(_tried, function), jobs, workers, title=title, unit=unit):
        result, reason = (None, KILLED) if outcome is None else outcome
        yield job, result, reason


def _tried(function: Callable[[J], T], job: J) -> tuple[T | None, str]:
    try:
        return function(job), ""
    except Exception as error:
        return None, reason_of(error)


def _in_pool(function: Callable[[J], T], jobs: Sequence[J], workers: int) -> Generator[tuple[J, T | None], None, None]:
    left = list(jobs)
    while left:
        left = yield from _in_one_pool(function, left, workers)
        # A killed worker ends its pool. Whose it was is not known: what may have been running is tried alone.
        running, left = left[: 2 * workers + 1], left[2 * workers + 1 :]
        for job in running:
            if (yield from _in_one_pool(function, [job], 1)):
                yield job, None


def _in_one_pool(
    function: Callable[[J], T], jobs: Sequence[J], workers: int
) -> Generator[tuple[J, T | None], None, list[J]]:
    """The results of a pool until a worker is killed; returns the jobs that are left then, in their order."""
    called: Any = function
    while isinstance(called, partial):
        called = called.args[0] if called.func is _tried else called.func
    count, left = min(workers, len(jobs)), []
    with ProcessPoolExecutor(count, mp_context=worker_context(called.__module__), initializer=end_with_parent) as pool:
        futures = {pool.submit(function, job): k for k, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                k = futures.pop(future)
                try:
                    result = future.result()
                except BrokenExecutor:
                    left.append(k)
                else:
                    yield jobs[k], result
        finally:
            pool.shutdown(cancel_futures=True)
    return [jobs[k] for k in sorted(left)]


def on_cluster(
    function: Callable[[J], T],
    jobs: Sequence[J],
    scheduler: str,
    *,
    title: str,
    unit: str,
    shared: Path | None = None,
    made_with: Callable[[], dict[str, str]] = dict,
    progress: bool = True,
) -> Iterator[tuple[J, T | None]]:
    """Call a function for each job on the workers of a dask scheduler, which may run on other machines.

    A job whose worker is lost is given to another one, and waits for it if there is none. So a function may be called
    twice for a job, even at the same time, and must then do the same.

    Args:
        scheduler: its address, like tcp://login1:8786.
        shared: a file that every worker has to find as it is here.
        made_with: versions of what the function computes with, which have to be the same here and in every worker.

    Yields:
        (job, result) as they finish; the result is None where several workers were lost with the job.

    Raises:
        ImportError, ConnectionError: dask is not installed; no scheduler answers, or it was lost.
        ValueError: a worker has several threads or other versions, or does not have the shared file.
    """
    dask = require("distributed", "dask", "executor=dask")
    content = b"" if shared is None else shared.read_bytes()
    call = partial(_on_worker, function, shared, content, made_with, made_with())
    with ExitStack() as stack:
        try:
            client = stack.enter_context(dask.Client(scheduler, timeout=PATIENCE, set_as_default=False))
        except (OSError, ValueError, TypeError) as error:
            raise ConnectionError(
                f"scheduler={scheduler}: no dask scheduler answers there ({one_line(error)}); start it with "
                "dask scheduler, and give the address that it prints"
            ) from error
        bar = stack.enter_context(tqdm(total=len(jobs), desc=title, unit=unit, disable=not progress))
        waiting = iter(jobs)
        running: dict[str, J] = {}
        finished = dask.as_completed(loop=client.loop)

        def submit(count: int) -> None:
            for job in islice(waiting, count):
                future = client.submit(call, job, pure=False)
                running[future.key] = job
                finished.add(future)

        try:
            submit(AHEAD)
            for future in finished:
                job = running.pop(future.key)
                try:
                    yield job, future.result()
                except dask.KilledWorker:
                    yield job, None
                bar.update()
                submit(1)
        except (dask.CancelledError, dask.comm.CommClosedError) as error:
            advice = "give the same command again, which goes on where this one stopped"
            raise ConnectionError(f"scheduler={scheduler}: the dask scheduler was lost; {advice}") from error


def _on_worker(
    function: Callable[[J], T],
    shared: Path | None,
    content: bytes,
    made_with: Callable[[], dict[str, str]],
    ours: dict[str, str],
    job: J,
) -> T:
    worker: Any = require("distributed", "dask", "executor=dask").get_worker()
    if worker.state.nthreads != 1:  # warnings and the number of torch's threads are those of the whole process
        raise ValueError(
            f"dask worker {worker.address} has {worker.state.nthreads} threads: start it with --nthreads 1, and "
            "with --nworkers for several at once"
        )
    if shared is not None and not (shared.is_file() and shared.read_bytes() == content):
        raise ValueError(
            f"dask worker {worker.address} does not see {shared.parent}: choose an out= on a file system that "
            "all workers share, under the same path"
        )
    theirs = made_with()
    if others := [name for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)]:
        shown = ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in others)
        raise ValueError(f"dask worker {worker.address} has {shown}: install the same versions on all machines")
    return function(job)


def worker_context(module: str) -> BaseContext:
    """How workers are started: as forks of one process that has imported `module`, which takes seconds, for all.

    On Windows, without forks, each imports it.
    """
    if "forkserver" not in get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])  # of no effect once that process has been started
    return context


def check_workers(workers: int) -> None:
    """Raise a ValueError for what is no number of processes."""
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers={workers}: give 1 or more processes")


def end_with_parent() -> None:
    """In a worker: exit as soon as the parent process has ended, also when it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def ignore_stop_signals() -> None:
    """In a worker: ignore SIGTERM and SIGUSR1. The parent then needs `end_workers_at_exit` to exit.

    Slurm sends them to the whole process group, and the training process needs its workers until it has saved.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers_at_exit() -> None:
    """In the parent: kill, at its exit, workers of an open loader, for which Python waits as they ignore SIGTERM."""
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)  # runs before Python's own, which was registered earlier


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
