"""Label maps of new scans from a trained network, or their asymmetry from a SA-Swin, in each scan's own space."""

import sys
from functools import partial

from asa.cli.front import Config, run_command


def predict(config: Config) -> None:
    """Call the task."""
    from asa.tasks.run import predict_task

    predict_task(config)


main = partial(run_command, "predict", __doc__, predict)

if __name__ == "__main__":
    sys.exit(main())
