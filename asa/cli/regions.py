"""Divide each image in a folder into regions, and store the label maps."""

import sys
from functools import partial
from typing import Any

from asa.cli.front import Config, run_command


def compute(config: Config) -> None:
    """Compute and store the label maps.

    Raises:
        ValueError: images failed; they are listed first, and the others are stored.
    """
    from asa.data.restoration.region_maps import store_regions

    provider = config["provider"]
    settings_of: dict[str, dict[str, Any]] = {
        "felzenszwalb": {"scale": config["scale"]},
        "slic": {"regions": config["regions"]},
        "sam": {"weights": config["weights"], "model": config["sam"], "device": config["device"]},
        "stored": {"folder": config["stored"]},
    }
    settings = {"name": provider, **settings_of.get(provider, {})}
    report = store_regions(config["input"], config["out"], settings, window=config["window"], workers=config["workers"])
    for id, reason in sorted(report.failures.items()):
        print(f"{id}: failed: {reason}")
    if report.regions:
        counts = sorted(report.regions.values())
        print(f"{len(counts)} label maps with {counts[0]} to {counts[-1]} regions, median {counts[len(counts) // 2]}")
    if report.kept:
        print(f"{len(report.kept)} label maps existed already")
    if report.failures:
        raise ValueError(f"{len(report.failures)} images failed, listed above")
    print(f"wrote label maps to {config['out']}, and previews to {config['out']}/previews")


main = partial(run_command, "regions", __doc__, compute)

if __name__ == "__main__":
    sys.exit(main())
