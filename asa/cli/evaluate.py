"""Score predicted label maps against true ones under a named policy, or compare such evaluations."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def evaluate(config: Config) -> None:
    """Call the task."""
    from asa.tasks.run import evaluate_task

    evaluate_task(config)


main = partial(run_command, "evaluate", __doc__, evaluate)

if __name__ == "__main__":
    sys.exit(main())
