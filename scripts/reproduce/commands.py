"""Run the commands of this checkout from the other files here."""

import subprocess
import sys
from typing import Any


def asa(command: str, *settings: str, **paths: Any) -> None:
    """Run a command with settings as on the command line, and with paths. What was done before is not done again."""
    quoted = [f"{key}='{path}'" for key, path in paths.items()]
    subprocess.run([sys.executable, "-m", f"asa.cli.{command}", *settings, *quoted], check=True)
