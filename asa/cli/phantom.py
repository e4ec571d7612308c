"""asa-phantom: a cohort made from the anatomy that nilearn ships, in the layout of a real data set."""

import sys
from pathlib import Path

from asa.cli.front import Config, run_command


def make(config: Config) -> None:
    """Write the cohort."""
    from asa.data.phantom.cohort import make_cohort

    out = Path(str(config["out"]))
    files = make_cohort(**{**config, "out": out})
    print(f"wrote {len(files)} files to {out}")


def main() -> int:
    """Entry point."""
    return run_command("phantom", "Make a phantom cohort: every command can be tried on it without a download.", make)


if __name__ == "__main__":
    sys.exit(main())
