"""Fine-tune a segmentation, classification or regression network, from a pretrained encoder or from scratch."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def finetune(config: Config) -> None:
    """Call the task."""
    from asa.tasks.studies import finetune_task

    finetune_task(config)


main = partial(run_command, "finetune", __doc__, finetune)

if __name__ == "__main__":
    sys.exit(main())
