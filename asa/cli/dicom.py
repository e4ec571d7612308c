"""Convert DICOM series to NIfTI files, which asa-prepare reads."""

import sys
from functools import partial
from pathlib import Path

from asa.cli.front import Config, run_command


def convert(config: Config) -> None:
    """Convert the series.

    Raises:
        ValueError: no series could be converted; those that are no volumes are listed.
    """
    from asa.data.io.dicom import convert_series

    report = convert_series(Path(str(config["input"])), Path(str(config["out"])))
    for name, reason in report.failures.items():
        print(f"{name}: not converted: {reason}")
    if not report.written:
        raise ValueError(f"{config['input']}: no series is a volume")
    print(f"wrote {len(report.written)} volumes to {config['out']}; their names hold the patients' ids")


main = partial(run_command, "dicom", __doc__, convert)

if __name__ == "__main__":
    sys.exit(main())
