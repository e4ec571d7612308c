"""A parallel map on the workers of a dask scheduler, which may run on other machines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from asa.errors import one_line, require

J = TypeVar("J")
T = TypeVar("T")

AHEAD = 2000  # jobs that the scheduler holds at a time: enough for the workers, and little of its memory
PATIENCE = 30  # seconds that a scheduler has to answer


def on_cluster(
    function: Callable[[J], T],
    jobs: Sequence[J],
    scheduler: str,
    *,
    title: str,
    unit: str,
    shared: Path | None = None,
    progress: bool = True,
) -> Iterator[tuple[J, T | None]]:
    """Call a function for each job on a cluster, under a progress bar, as `in_processes` does on this machine.

    A job whose worker is lost is given to another one, and waits for it if there is none. So a function may be called
    twice for a job, even at the same time, and must then do the same.

    Args:
        function: can be pickled, like its jobs and results.
        jobs: arguments of the calls.
        scheduler: address of the scheduler, like tcp://login1:8786.
        title, unit: text of the progress bar.
        shared: a file that every worker has to find as it is here.
        progress: show the bar.

    Yields:
        (job, result) in the order in which they finish; the result is None where several workers were lost with the
        job.

    Raises:
        ImportError: dask is not installed.
        ConnectionError: no scheduler answers, or it was lost.
        ValueError: a worker has several threads, or does not have the shared file.
    """
    dask = require("distributed", "dask", "executor=dask")
    call = _Call(function, shared, b"" if shared is None else shared.read_bytes())
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

        def submit() -> None:
            for job in waiting:
                future = client.submit(call, job, pure=False)
                running[future.key] = job
                finished.add(future)
                return

        for _ in range(AHEAD):
            submit()
        for future in finished:
            job = running.pop(future.key)
            try:
                yield job, future.result()
            except dask.KilledWorker:
                yield job, None
            except dask.CancelledError as error:
                raise ConnectionError(
                    f"scheduler={scheduler}: the dask scheduler was lost; give the same command again, which goes on "
                    "where this one stopped"
                ) from error
            bar.update()
            submit()


@dataclass(frozen=True)
class _Call(Generic[J, T]):
    """The function as a worker calls it."""

    function: Callable[[J], T]
    shared: Path | None
    content: bytes

    def __call__(self, job: J) -> T:
        worker: Any = require("distributed", "dask", "executor=dask").get_worker()
        if worker.state.nthreads != 1:  # warnings and the number of torch's threads are those of the whole process
            raise ValueError(
                f"dask worker {worker.address} has {worker.state.nthreads} threads: start it with --nthreads 1, and "
                "with --nworkers for several at once"
            )
        if self.shared is not None and not (self.shared.is_file() and self.shared.read_bytes() == self.content):
            raise ValueError(
                f"dask worker {worker.address} does not see {self.shared.parent}: choose an out= on a file system that "
                "all workers share, under the same path"
            )
        return self.function(job)
