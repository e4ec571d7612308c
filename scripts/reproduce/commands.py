"""Run the commands of this checkout from the other files here."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def quoted(**paths: Any) -> list[str]:
    """Paths as settings on the command line, whatever signs they contain."""
    return [f"{key}='{path}'" for key, path in paths.items()]


def asa(command: str, *settings: str, log: Path | None = None, threads: int | None = None, **paths: Any) -> None:
    """Run a command with settings as on the command line, and with paths. What was done before is not done again.

    Args:
        log: file that the output is added to; None prints it.
        threads: of the command; None: as many as it likes.

    Raises:
        RuntimeError: the command failed.
    """
    arguments = [sys.executable, "-m", f"asa.cli.{command}", *settings, *quoted(**paths)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    output = None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("a")
    done = subprocess.run(arguments, env=environment, stdout=output, stderr=output and subprocess.STDOUT)
    if output is not None:
        output.close()
    if done.returncode:
        raise RuntimeError(f"asa-{command} failed{f': see {log}' if log else ''}")
