"""Leaving a run in order when the machine is needed: SIGTERM and SIGUSR1, as Slurm and torchrun send them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# What a command exits with when it saved and left: give it again to go on (EX_TEMPFAIL of sysexits.h).
RESUME_CODE = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A run was asked to stop, has saved, and goes on when it is started again."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    asked: bool = False


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGUSR1 instead of dying of them. Outside the main thread nothing is changed."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
