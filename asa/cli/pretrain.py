"""Pretrain an encoder on unlabelled scans: masked reconstruction (ASA, plain MAE), or symmetry (SA-Swin)."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def pretrain(config: Config) -> None:
    """Call the task."""
    from asa.tasks.run import pretrain_task

    pretrain_task(config)


main = partial(run_command, "pretrain", __doc__, pretrain)

if __name__ == "__main__":
    sys.exit(main())
