"""Stopping a run on SIGTERM and SIGUSR1, as Slurm and torchrun send them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Exit code of a command that saved and stopped: the same command continues (EX_TEMPFAIL of sysexits.h).
RESUME_CODE = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A run was asked to stop and has saved; the same command continues it."""


@dataclass
class StopRequest:
    """Whether this process has received a stop signal."""

    requested: bool = False


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGUSR1 instead of being terminated by them. Without effect outside the main thread."""
    stop = StopRequest()

    def record(number: int, frame: FrameType | None) -> None:
        stop.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
