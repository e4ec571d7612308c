"""Score predicted label maps against true ones under a named policy, or compare such evaluations."""

import sys
from functools import partial

from asa.cli.front import run_command
from asa.tasks.run import evaluate_task

main = partial(run_command, "evaluate", __doc__, evaluate_task)

if __name__ == "__main__":
    sys.exit(main())
