"""asa-ablate: arms x labelled subjects x seeds in one table."""

import sys

from asa.cli.front import run_command
from asa.tasks.ablation import ablate


def main() -> int:
    """Entry point."""
    return run_command(
        "ablate",
        "Compare arms of the method (the paper's Table 4) over numbers of labelled subjects and seeds, in one table.",
        ablate,
    )


if __name__ == "__main__":
    sys.exit(main())
