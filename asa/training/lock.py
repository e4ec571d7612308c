"""One run, one writer: a lock file in the run folder."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK = ".lock"
BEAT = 10.0  # seconds between signs of life
WATCH = 45.0  # seconds without one, after which a lock from another machine is stale


@contextmanager
def locked(run: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a run folder's lock.

    A lock whose process is gone is taken over, with a message. On another machine a process cannot be looked up: its
    lock is watched for signs of life. A job that Slurm started again takes over its own lock at once.

    Args:
        run: the folder, which exists.
        say: told of a lock that is taken over.

    Raises:
        ValueError: another process writes here.
    """
    file = run / LOCK
    mine = {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid()), "job": _job()}
    stale: dict[str, Any] | None = None
    while (holder := _take(file, mine, stale)) is not None:
        who = f"process {holder['pid']} on {holder['host'].partition(' ')[0]}"
        if _lives(file, holder):
            raise ValueError(f"{run} is in use by {who}: wait for it, stop it, or choose another out=")
        say(f"{run}: taking over from {who}, which is gone")
        stale = holder
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if _holder(file) == mine:
            file.unlink()


def _take(file: Path, mine: dict[str, Any], stale: dict[str, Any] | None) -> dict[str, Any] | None:
    """Write the lock if it is free or still the stale one; else who holds it."""
    while True:
        with file.open("a+") as handle:
            with suppress(OSError):  # some network file systems cannot
                fcntl.flock(handle, fcntl.LOCK_EX)  # between the processes of this machine, for the moment
            if os.fstat(handle.fileno()).st_ino != _inode(file):
                continue  # its holder has removed it since
            handle.seek(0)
            holder = _read(handle.read())
            if holder is not None and holder != stale:
                return holder
            handle.truncate(0)
            json.dump(mine, handle)
            return None


def _read(text: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
    except ValueError:
        return None  # empty, or of a machine that lost power while writing it
    return holder if isinstance(holder, dict) and holder.keys() == {"host", "pid", "born", "job"} else None


def _holder(file: Path) -> dict[str, Any] | None:
    try:
        return _read(file.read_text())
    except FileNotFoundError:
        return None


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None


def _lives(file: Path, holder: dict[str, Any]) -> bool:
    if holder["host"] == _host():
        born = _born(holder["pid"])
        return born is not None and born == holder["born"]
    if holder["job"] is not None and holder["job"] == _job():
        return False
    first, until = _age(file), time.monotonic() + WATCH
    while time.monotonic() < until:
        if _age(file) != first:
            return True
        time.sleep(min(BEAT, WATCH) / 4)
    return False


def _age(file: Path) -> int:
    try:
        with file.open() as handle:  # opened: a network file system then asks its server
            return os.fstat(handle.fileno()).st_mtime_ns
    except FileNotFoundError:
        return -1


def _born(pid: int) -> str | None:
    """When a process of this machine started, so that a pid that is used again is told apart; None: not running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        return "?"  # no /proc


def _host() -> str:
    """This machine, and the container on it: only here does a process id mean the same process."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(file)
