"""asa-finetune: learn a segmentation or a classification from labelled scans, or restoration from pairs of images."""

import sys

from asa.cli.front import run_command
from asa.tasks.commands import finetune_task
from asa.tasks.run import SETTINGS


def main() -> int:
    """Entry point."""
    return run_command(
        "finetune",
        "Fine-tune a segmentation or classification network, from a pretrained encoder or from scratch.",
        finetune_task,
        settings=SETTINGS["finetune"],
    )


if __name__ == "__main__":
    sys.exit(main())
