"""asa-phantom: a synthetic cohort from the ICBM template of nilearn, in the layout of a public dataset."""

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
    return run_command("phantom", "Make a phantom cohort, to try every command without a download.", make)


if __name__ == "__main__":
    sys.exit(main())
