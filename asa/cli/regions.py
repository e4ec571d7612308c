"""asa-regions: the label maps that restoration attends inside, for a folder of images."""

import sys
from typing import Any

from asa.cli.front import Config, run_command


def compute(config: Config) -> None:
    """Compute and store the label maps.

    Raises:
        ValueError: images failed; they are listed before, and the others are done.
    """
    from asa.data.restoration.region_maps import store_regions

    provider = config["provider"]
    own: dict[str, dict[str, Any]] = {
        "felzenszwalb": {"scale": config["scale"]},
        "slic": {"regions": config["regions"]},
        "sam": {"weights": config["weights"], "model": config["sam"], "device": config["device"]},
        "stored": {"folder": config["stored"]},
    }
    settings = {"name": provider, **own.get(provider, {})}
    report = store_regions(config["input"], config["out"], settings, window=config["window"], workers=config["workers"])
    for id, reason in sorted(report.failures.items()):
        print(f"{id}: failed: {reason}")
    if report.regions:
        counts = sorted(report.regions.values())
        middle = counts[len(counts) // 2]
        print(f"{len(counts)} label maps with {counts[0]} to {counts[-1]} regions, {middle} in the middle")
    if report.kept:
        print(f"{len(report.kept)} were there already")
    if report.failures:
        raise ValueError(f"{len(report.failures)} images failed, listed above")
    print(f"wrote label maps to {config['out']}, and pictures of them to {config['out']}/previews")


def main() -> int:
    """Entry point."""
    return run_command("regions", "Divide each image of a folder into regions, and store the label maps.", compute)


if __name__ == "__main__":
    sys.exit(main())
