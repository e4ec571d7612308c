"""Look at a store, predictions or reconstructions in a browser: linked slices with a slider for each layer."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def view(config: Config) -> None:
    """Write the page."""
    from asa.reporting.viewing import view_task

    view_task(config)


main = partial(run_command, "view", __doc__, view)

if __name__ == "__main__":
    sys.exit(main())
