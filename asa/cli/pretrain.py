"""Pretrain an encoder on unlabelled scans: masked reconstruction (ASA, plain MAE), or symmetry (SA-Swin)."""

import sys
from functools import partial

from asa.cli.front import run_command
from asa.tasks.run import SETTINGS, train_task

main = partial(run_command, "pretrain", __doc__, partial(train_task, command="pretrain"), settings=SETTINGS["pretrain"])

if __name__ == "__main__":
    sys.exit(main())
