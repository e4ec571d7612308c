"""asa-predict: label maps, asymmetry or classes of new scans, or restored images."""

import sys

from asa.cli.front import run_command
from asa.tasks.run import SETTINGS, predict_task


def main() -> int:
    """Entry point."""
    return run_command(
        "predict",
        "Label maps of new scans from a trained network, or their asymmetry from a SA-Swin, in each scan's own space.",
        predict_task,
        settings=SETTINGS["predict"],
    )


if __name__ == "__main__":
    sys.exit(main())
