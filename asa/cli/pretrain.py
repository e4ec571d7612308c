"""asa-pretrain: learn an encoder from unlabelled scans."""

import sys

from asa.cli.front import run_command
from asa.tasks.run import SETTINGS, train_task


def main() -> int:
    """Entry point."""
    return run_command(
        "pretrain",
        "Pretrain an encoder on unlabelled scans: masked reconstruction (ASA, plain MAE), or symmetry (SA-Swin).",
        lambda config: train_task(config, "pretrain"),
        settings=SETTINGS["pretrain"],
    )


if __name__ == "__main__":
    sys.exit(main())
