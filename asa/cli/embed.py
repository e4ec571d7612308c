"""Features of scans from a frozen encoder, a row for each, for a regression or a classifier of your own."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def embed(config: Config) -> None:
    """Write the table."""
    from asa.tasks.embedding import embed_task

    embed_task(config)


main = partial(run_command, "embed", __doc__, embed)

if __name__ == "__main__":
    sys.exit(main())
