"""Make a phantom cohort, to try every command without a download."""

import sys
from functools import partial
from pathlib import Path

from asa.cli.front import Config, run_command


def make(config: Config) -> None:
    """Write the cohort."""
    from asa.data.phantom.cohort import make_cohort

    out = Path(str(config["out"]))
    files = make_cohort(**{**config, "out": out})
    print(f"wrote {len(files)} files to {out}")


main = partial(run_command, "phantom", __doc__, make)

if __name__ == "__main__":
    sys.exit(main())
