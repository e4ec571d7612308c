"""Write files that store no orientation as NIfTI with a stated orientation."""

import sys
from functools import partial
from pathlib import Path

from asa.cli.front import Config, run_command


def orient(config: Config) -> None:
    """Write the files.

    Raises:
        ValueError: files failed; they are listed first, and the others are written.
    """
    from asa.data.io.orientation import orient_files

    report = orient_files(Path(str(config["input"])), Path(str(config["out"])), str(config["axes"]))
    for name, reason in report.failures.items():
        print(f"{name}: failed: {reason}")
    if report.kept:
        print(f"{len(report.kept)} files store an orientation and were not written, like {report.kept[0]}")
    if report.failures:
        raise ValueError(f"{len(report.failures)} files failed, listed above")
    print(f"wrote {len(report.written)} files to {config['out']}: check some of them, left and right above all")


main = partial(run_command, "orient", __doc__, orient)

if __name__ == "__main__":
    sys.exit(main())
