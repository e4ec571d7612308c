"""Compare arms of the method (the paper's Table 4) over numbers of labelled subjects and seeds, in one table."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def ablate(config: Config) -> None:
    """Call the task."""
    from asa.tasks.studies import ablate as run

    run(config)


main = partial(run_command, "ablate", __doc__, ablate)

if __name__ == "__main__":
    sys.exit(main())
