"""A lock file in the folder of a run or a store: one writer."""

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

from asa.data.io.files import open_unlinked

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between updates of the lock's modification time
STALE_AFTER = 45.0  # seconds without an update, after which a lock from another machine is stale

Holder = dict[str, Any]  # content of the lock file: {"host", "pid", "born", "job"}, "born" being the process's start


@contextmanager
def locked(run: Path, report: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of a run folder or a store.

    A lock whose process has ended is taken over, with a message. A process of another machine cannot be looked up: its
    lock is stale if its modification time does not change. A job that Slurm restarted takes over its own lock at once.

    Raises:
        ValueError: another process writes to this folder.
    """
    file, pid = run / LOCK, os.getpid()
    own = {"host": _host(), "pid": pid, "born": _start_time(pid), "job": os.environ.get("SLURM_JOB_ID")}
    stale: Holder | None = None
    while (holder := _acquire(file, own, stale)) is not None:
        name = f"process {holder['pid']} on {holder['host'].partition(' ')[0]}"
        if _is_running(file, holder, own):
            raise ValueError(f"{run} is in use by {name}: wait for it, stop it, or choose another out=")
        report(f"{run}: taking over the lock of {name}, which is no longer running")
        stale = holder
    ended = threading.Event()

    def update() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(file)

    heartbeat = threading.Thread(target=update, daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        with suppress(FileNotFoundError):
            if _parse(file.read_text()) == own:
                file.unlink()


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Let processes of this machine change a table of a folder one after another; nothing is written for it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # not supported by some network file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _acquire(file: Path, own: Holder, stale: Holder | None) -> Holder | None:
    """Write the lock if it is free or still the stale one; otherwise return its holder."""
    while True:
        with open_unlinked(file, "a+") as handle:
            with suppress(OSError):  # not supported by some network file systems
                fcntl.flock(handle, fcntl.LOCK_EX)  # against other processes of this machine, while the file is open
            if not _is_same(handle.fileno(), file):
                continue  # its holder has removed it in the meantime
            handle.seek(0)
            holder = _parse(handle.read())
            if holder is not None and holder != stale:
                return holder
            handle.truncate(0)
            json.dump(own, handle)
            return None


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _parse(text: str) -> Holder | None:
    """The holder that a lock file names; None if it is empty, cut off by a power failure, or no lock."""
    with suppress(ValueError, RecursionError):
        holder = json.loads(text)
        if isinstance(holder, dict) and holder.keys() == {"host", "pid", "born", "job"}:
            host, pid = holder["host"], holder["pid"]
            return holder if isinstance(host, str) and isinstance(pid, int) and 0 < pid < 2**31 else None
    return None


def _is_running(file: Path, holder: Holder, own: Holder) -> bool:
    """Whether the holder's process is running; waits for a heartbeat if that is on another machine."""
    if holder["host"] == own["host"]:
        start = _start_time(holder["pid"])
        return start is not None and start == holder["born"]
    if holder["job"] is not None and holder["job"] == own["job"]:
        return False
    first, until = _modified(file), time.monotonic() + STALE_AFTER
    while time.monotonic() < until:
        if _modified(file) != first:
            return True
        time.sleep(min(HEARTBEAT, STALE_AFTER) / 4)
    return False


def _modified(file: Path) -> int:
    try:
        with file.open() as handle:  # opening makes a network file system ask its server
            return os.fstat(handle.fileno()).st_mtime_ns
    except FileNotFoundError:
        return -1


def _start_time(pid: int) -> str | None:
    """Start time of a process of this machine, as process ids are reused; None: it is not running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # of another user
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        return "?"  # no /proc


def _host() -> str:
    """The machine and its PID namespace (container): a process id is valid within these only."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
