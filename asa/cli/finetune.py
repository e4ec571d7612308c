"""Fine-tune a segmentation or classification network, from a pretrained encoder or from scratch."""

import sys
from functools import partial

from asa.cli.front import run_command
from asa.tasks.commands import finetune_task
from asa.tasks.run import SETTINGS

main = partial(run_command, "finetune", __doc__, finetune_task, settings=SETTINGS["finetune"])

if __name__ == "__main__":
    sys.exit(main())
