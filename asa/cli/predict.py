"""Label maps of new scans from a trained network, or their asymmetry from a SA-Swin, in each scan's own space."""

import sys
from functools import partial

from asa.cli.front import run_command
from asa.tasks.run import SETTINGS, predict_task

main = partial(run_command, "predict", __doc__, predict_task, settings=SETTINGS["predict"])

if __name__ == "__main__":
    sys.exit(main())
