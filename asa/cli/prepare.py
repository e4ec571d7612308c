"""Prepare raw scans into a store: checked, parallel and resumable."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def prepare(config: Config) -> None:
    """Call the task."""
    from asa.tasks.preparation import prepare_task

    prepare_task(config)


main = partial(run_command, "prepare", __doc__, prepare)

if __name__ == "__main__":
    sys.exit(main())
