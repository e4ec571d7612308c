"""asa-regions and asa-simulate."""

from pathlib import Path
from typing import Any

from asa.data.io.files import read_json, write_json
from asa.restoration.region_maps import store_regions
from asa.restoration.simulation import simulate_folder

PHYSICS = ("window", "photons", "pixel", "counts", "factor", "blur")


def regions(config: dict[str, Any]) -> None:
    """Compute and store the label maps; if images failed, a ValueError after the others are stored."""
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


def simulate(config: dict[str, Any]) -> None:
    """Write low/, high/ and simulated.json; if images failed, a ValueError after the others are written."""
    kind, seed, out = config["kind"], config["seed"], Path(str(config["out"]))
    physics = {key: config[key] for key in PHYSICS}
    settings, file = {"kind": kind, **physics, "seed": seed}, out / "simulated.json"
    if file.exists() and (before := read_json(file)) != settings:
        other = next((key for key in settings if before.get(key) != settings[key]), "them")
        raise ValueError(f"{out}: holds pairs simulated with other settings ({other}): choose another out=")
    count, failures = simulate_folder(config["input"], out, kind, seed=seed, workers=config["workers"], **physics)
    write_json(file, settings)
    for id, reason in sorted(failures.items()):
        print(f"{id}: failed: {reason}")
    if failures:
        raise ValueError(f"{len(failures)} images failed, listed above")
    print(f"wrote {count} simulated pairs to {out}")
