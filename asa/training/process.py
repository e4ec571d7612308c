"""Processes of a run: which rank this one is, and how it is asked to stop. Without torch, so that help is fast."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from asa.data.io.parallel import SIGNALS


class MainRankFailed(Exception):
    """The main rank failed, and has printed why."""


def world_size() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number, 0 to `world_size() - 1`."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """This process's number on its machine, which is the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the rank that prints, logs and saves."""
    return rank() == 0


def exit_process(code: int) -> None:
    """End this process immediately with an exit code, if it is one of several; otherwise do nothing.

    The gloo threads of torch 2.13 occasionally abort an interpreter that ends: a finished run would look crashed.
    """
    if world_size() > 1:
        gc.collect()  # ends the loader's workers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# Exit code of a command that saved and stopped: the same command continues (EX_TEMPFAIL of sysexits.h).
RESUME_CODE = 75


class Stopped(Exception):
    """A run was asked to stop and has saved; the same command continues it."""


class StopNow(BaseException):
    """Raised where a stop signal arrives inside `StopRequest.at_once`; no `except Exception` holds it up."""


@dataclass
class StopRequest:
    """Whether this process has received a stop signal."""

    requested: bool = False
    immediate: bool = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that a stop signal ends, or that does not begin after one; what it has changed is not used."""
        self.immediate = True
        try:
            if self.requested:
                raise StopNow
            yield
            if self.requested:  # where it arrived, as in a callback of another library, the exception was discarded
                raise StopNow
        finally:
            self.immediate = False


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGUSR1 instead of being terminated by them. Without effect outside the main thread."""
    stop = StopRequest()

    def record(number: int, frame: FrameType | None) -> None:
        if not stop.requested:  # written at once: nothing else may be printed for minutes
            os.write(2, f"\n{signal.Signals(number).name} received: saving, then stopping\n".encode())
        stop.requested = True
        if stop.immediate:
            stop.immediate = False  # once: a second signal would stop what the first one has left
            raise StopNow

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
