"""Which rank this process is, of those that torchrun starts. Without torch, so that a command's help takes no time."""

import gc
import os
import sys


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

    torch 2.13 keeps gloo threads running until the interpreter ends, and these occasionally abort it at that point: a
    finished run would look like a crashed one.
    """
    if world_size() > 1:
        gc.collect()  # ends the loader's workers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
