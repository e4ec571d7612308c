"""asa-evaluate: predictions against the truth, and evaluations against each other."""

import sys

from asa.cli.front import run_command
from asa.tasks.run import evaluate_task


def main() -> int:
    """Entry point."""
    return run_command(
        "evaluate",
        "Score predicted label maps against true ones under a named policy, or compare such evaluations.",
        evaluate_task,
    )


if __name__ == "__main__":
    sys.exit(main())
