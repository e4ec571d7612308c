"""Prepare raw scans into a store: checked, parallel and resumable."""

import sys
from functools import partial

from asa.cli.front import run_command
from asa.tasks.preparation import prepare_task

main = partial(run_command, "prepare", __doc__, prepare_task)

if __name__ == "__main__":
    sys.exit(main())
